from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.collection.beir import Collection
from sparsekd.mining.candidates import CandidateRow, Candidates
from sparsekd.mining.miners import judged_queries, mine_candidates
from sparsekd.mining.selection import REASONS

BM25 = {"kind": "bm25", "quota": 3, "depth": 5}
DENSE = {"kind": "dense", "quota": 2, "depth": 6, "model": "some/encoder"}


@pytest.fixture
def mine(
    tmp_path: Path, collection: Collection, make_recipe: Any, word_vectors: Any, fields_of: Any
) -> Callable[..., Candidates]:
    def run(
        mining: dict[str, Any],
        *,
        over: Collection = collection,
        similarity: str = "dot",
        name: str = "cache",
        path: Path = Path("somewhere"),
    ) -> Candidates:
        recipe = make_recipe(mining, collection={"path": str(path)})
        fields = fields_of(recipe, over, similarity)
        return mine_candidates(recipe, over, cache=tmp_path / name, fields=fields, source=word_vectors(similarity))

    return run


def by_query(candidates: Candidates) -> dict[str, CandidateRow]:
    return {row.query_id: row for row in candidates}


def test_each_query_gets_bm25_then_dense_candidates_without_positives_or_duplicates(mine: Any) -> None:
    candidates = mine({"miners": [BM25, DENSE]})

    rows = by_query(candidates)
    assert list(rows) == ["q0", "q1", "q2", "q3"]
    assert rows["q0"].positive_ids == ["p0", "p1"]
    assert not {"p0", "p1", "p3"} & set(rows["q0"].passage_ids)  # p3 has the text of p0
    assert not {"p2", "p7"} <= set(rows["q1"].passage_ids)  # one text
    assert rows["q1"].miner == sorted(rows["q1"].miner)  # bm25 before dense
    for row in rows.values():
        assert len(row.passage_ids) == len(set(row.passage_ids)) == len(row.miner) == len(row.miner_score) == len(row.rank)


def test_a_query_nobody_can_answer_keeps_its_row_and_is_counted(mine: Any) -> None:
    candidates = mine({"miners": [BM25]})

    assert by_query(candidates)["q3"].passage_ids == []
    assert candidates.counts["queries_empty"] == 1
    assert candidates.counts["queries_short"] >= 1
    assert candidates.counts["queries"] == len(candidates) == 4


@pytest.mark.parametrize("negative_filter", [{}, {"absolute_margin": 0.1}, {"relative_margin": 0.05}])
def test_counts_add_up(mine: Any, negative_filter: dict[str, float]) -> None:
    counts = mine({"miners": [BM25, DENSE], "filter": negative_filter}).counts

    assert counts["proposed"] == counts["kept"] + sum(counts[reason] for reason in REASONS)
    assert counts["kept"] + counts["shortfall"] == 5 * counts["queries"]
    assert (counts["dropped_filter"] > 0) is bool(negative_filter)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean"])
def test_the_filter_compares_with_the_weakest_positive_of_the_same_miner(
    mine: Any, collection: Collection, word_vectors: Any, similarity: str
) -> None:
    def score(query_id: str, passage_id: str) -> float:
        texts = [collection.queries[query_id], collection.passages[passage_id]]
        query, passage = word_vectors().vectors(None, texts, "query").astype(np.float64)
        lengths = float(np.linalg.norm(query) * np.linalg.norm(passage))
        return {"dot": query @ passage, "cosine": query @ passage / lengths, "euclidean": -np.linalg.norm(query - passage)}[
            similarity
        ]

    miners = {"miners": [{**DENSE, "quota": 6}]}
    free = by_query(mine(miners, similarity=similarity, name="free"))
    filtered = by_query(mine({**miners, "filter": {"absolute_margin": 0.05}}, similarity=similarity, name="filtered"))

    for query_id, row in filtered.items():
        ceiling = min(score(query_id, passage_id) for passage_id in row.positive_ids) - 0.05
        assert row.passage_ids == [other for other in free[query_id].passage_ids if score(query_id, other) <= ceiling]


def test_a_percentile_compares_with_all_positives_of_the_same_miner(mine: Any, collection: Collection, word_vectors: Any) -> None:
    def score(query_id: str, passage_id: str) -> float:
        texts = [collection.queries[query_id], collection.passages[passage_id]]
        query, passage = word_vectors().vectors(None, texts, "query").astype(np.float64)
        return float(query @ passage)

    miners = {"miners": [{**DENSE, "quota": 6}]}
    free = by_query(mine(miners, name="free"))
    filtered = by_query(mine({**miners, "filter": {"percentile": 60.0}}, name="filtered"))

    positives = [score(query_id, passage_id) for query_id, row in free.items() for passage_id in row.positive_ids]
    ceiling = np.percentile(positives, 60)
    dropped = 0
    for query_id, row in filtered.items():
        assert row.passage_ids == [other for other in free[query_id].passage_ids if score(query_id, other) <= ceiling]
        dropped += len(free[query_id].passage_ids) - len(row.passage_ids)
    assert dropped > 0


def test_near_duplicates_of_positives_are_taken_out_and_counted(mine: Any) -> None:
    free = mine({"miners": [BM25, DENSE]}, name="free")
    filtered = mine({"miners": [BM25, DENSE], "filter": {"near_duplicate": 0.5}}, name="filtered")

    assert filtered.counts["dropped_near_duplicate"] > free.counts["dropped_near_duplicate"] == 0
    assert "p1" in by_query(free)["q1"].passage_ids  # "a cat and a dog"; q1's positive is "a dog and a garden"
    assert "p1" not in by_query(filtered)["q1"].passage_ids


def test_queries_with_too_few_candidates_are_listed_beside_the_shards(mine: Any) -> None:
    candidates = mine({"miners": [BM25, DENSE]})

    lines = (candidates.artifact.folder / "shortfall.tsv").read_text("utf-8").splitlines()
    short = {query_id: len(row.passage_ids) for query_id, row in by_query(candidates).items() if len(row.passage_ids) < 5}
    assert lines == ["query_id\tcandidates\twanted", *(f"{query_id}\t{kept}\t5" for query_id, kept in short.items())]
    assert len(short) == candidates.counts["queries_short"] > 0


def test_a_filter_by_a_teacher_drops_nothing_while_mining(mine: Any) -> None:
    free = mine({"miners": [BM25, DENSE]}, name="free")
    later = mine({"miners": [BM25, DENSE], "filter": {"by": "judge", "absolute_margin": 9.0}}, name="later")

    assert list(free) == list(later)


def test_adding_a_query_changes_no_other_row(mine: Any, collection: Collection) -> None:
    mining = {"miners": [BM25, DENSE], "filter": {"relative_margin": 0.01}}
    more = replace(
        collection,
        queries={"new": "cats in the city", **collection.queries},
        qrels={"train": {"new": {"p5": 1}, **collection.qrels["train"]}},
    )

    before, after = by_query(mine(mining, name="before")), by_query(mine(mining, over=more, name="after"))

    assert after.pop("new").positive_ids == ["p5"]
    assert after == before


def test_mining_twice_gives_equal_bytes(mine: Any) -> None:
    first, second = mine({"miners": [BM25, DENSE]}, name="first"), mine({"miners": [BM25, DENSE]}, name="second")

    assert first.artifact.manifest | {"wall_seconds": 0} == second.artifact.manifest | {"wall_seconds": 0}


RANDOM = {"kind": "random", "quota": 3, "depth": 9}


def test_random_candidates_are_a_draw_seeded_per_query(mine: Any, collection: Collection) -> None:
    more = replace(
        collection,
        queries={"new": "cats in the city", **collection.queries},
        qrels={"train": {"new": {"p5": 1}, **collection.qrels["train"]}},
    )

    rows, again = by_query(mine({"miners": [RANDOM]}, name="1")), by_query(mine({"miners": [RANDOM]}, name="2", over=more))
    others = by_query(mine({"miners": [{**RANDOM, "seed": 1}]}, name="3"))

    again.pop("new")
    assert rows == again != others
    for row in rows.values():
        assert len(row.passage_ids) == 3
        assert not {*row.positive_ids} & {*row.passage_ids}
        assert row.miner == ["random"] * 3
        assert row.miner_score == [0.0] * 3


def test_random_draws_reach_every_passage_and_no_passage_twice(mine: Any, collection: Collection) -> None:
    queries = {f"q{number}": "cat" for number in range(300)}
    over = replace(collection, queries=queries, qrels={"train": {query_id: {"p0": 1} for query_id in queries}})

    rows = by_query(mine({"miners": [{**RANDOM, "quota": 2, "depth": 5}]}, over=over)).values()

    drawn = [passage_id for row in rows for passage_id in row.passage_ids]
    assert {*drawn} == {*collection.passages} - {"p0", "p3"}  # p3 has the text of p0
    assert all(50 <= drawn.count(passage_id) <= 150 for passage_id in ("p1", "p4", "p5", "p6", "p8"))
    assert all(len({*row.passage_ids}) == len(row.passage_ids) for row in rows)


def test_a_fallback_fills_queries_that_fall_short_and_is_counted(mine: Any) -> None:
    free = mine({"miners": [BM25]}, name="free")
    filled = mine({"miners": [BM25], "fallback": {**RANDOM, "quota": 9}}, name="filled")

    assert (free.counts["queries_empty"], free.counts["filled_by_fallback"]) == (1, 0)
    assert filled.counts["queries_short"] == filled.counts["shortfall"] == 0
    assert filled.counts["filled_by_fallback"] == free.counts["shortfall"] > 0
    for query_id, row in by_query(free).items():
        after = by_query(filled)[query_id]
        assert after.passage_ids[: len(row.passage_ids)] == row.passage_ids
        assert after.miner == [*row.miner, *["random"] * (3 - len(row.miner))]


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return ``run_file(lines)``: a miner over a file of ``query passage score`` lines, and a collection's files beside it."""
    folder = tmp_path / "collection"
    folder.mkdir()
    for name, ids in (("corpus", [*(f"p{number}" for number in range(9)), "p-left-out"]), ("queries", ["q0", "q-of-no-split"])):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"_id": "{each}", "text": "x"}}\n' for each in ids), "utf-8")

    def make(*lines: str) -> dict[str, Any]:
        path = tmp_path / "a.run"
        rows = [line.split() for line in lines]
        text = "".join(f"{query} Q0 {passage} 1 {score} tag\n" for query, passage, score in rows)
        path.write_text(text, encoding="utf-8")
        return {"kind": "run", "path": str(path), "quota": 2, "depth": 4}

    return make


def test_a_runs_lines_are_ranked_by_score_then_passage_id(mine: Any, run_file: Any) -> None:
    candidates = mine({"miners": [run_file("q1 p5 1.5", "q1 p2 3", "q0 p5 0.5", "q1 p0 3", "q1 p6 9")]})

    rows = by_query(candidates)
    assert rows["q1"] == CandidateRow("q1", ["p6"], ["p0", "p2"], ["run"] * 2, [3.0, 3.0], [2, 3])  # p6 is judged
    assert rows["q0"].passage_ids == ["p5"]
    assert rows["q2"].passage_ids == []
    assert candidates.artifact.manifest["miners"] == {"run": {"lines_outside": 0, "queries_without_lines": 2}}


def test_lines_of_what_the_recipe_leaves_out_are_counted(mine: Any, run_file: Any, tmp_path: Path, make_recipe: Any) -> None:
    miner = run_file("q0 p5 0.5", "q0 p-left-out 9", "q-of-no-split p1 3")

    candidates = mine({"miners": [miner]}, path=tmp_path / "collection")

    assert by_query(candidates)["q0"].passage_ids == ["p5"]
    assert candidates.artifact.manifest["miners"]["run"]["lines_outside"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 p99 1", r"a\.run:2: found doc_id 'p99', expected an _id of .*corpus\.jsonl; make the run over this collection"),
        ("q99 p1 1", r"a\.run:2: found query_id 'q99', expected an _id of .*queries\.jsonl; make the run over this collection"),
        ("q0 p1 high", r"a\.run:2: found score 'high'"),
    ],
)
def test_a_run_that_names_an_unknown_id_is_refused_with_file_and_line(
    mine: Any, run_file: Any, tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mine({"miners": [run_file("q0 p5 1", line)]}, path=tmp_path / "collection")

    assert not [*(tmp_path / "cache").glob("candidates/*")]


def test_rows_are_cut_into_shards(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(mine({"miners": [BM25]}, name="whole"))
    monkeypatch.setattr("sparsekd.mining.miners.ROWS_PER_SHARD", 3)

    candidates = mine({"miners": [BM25]}, name="cut")

    assert candidates.artifact.manifest["shards"] == {
        "candidates-00000-of-00002.arrow": 3,
        "candidates-00001-of-00002.arrow": 1,
    }
    assert list(candidates) == whole


def test_the_cap_keeps_highest_grades_then_smallest_hashes_and_the_rest_are_still_positives(
    make_recipe: Any, collection: Collection
) -> None:
    grades = {"p1": 1, "p2": 2, "p4": 1, "p5": 2, "p6": 1, "p8": 0}
    recipe = make_recipe({"miners": [BM25], "max_positives": 3})

    judged, counts = judged_queries(recipe, replace(collection, qrels={"train": {"q0": grades}}))

    def by_hash(ids: list[str]) -> list[str]:
        return sorted(ids, key=lambda passage_id: hashlib.sha256(passage_id.encode()).hexdigest())

    expected = by_hash(["p2", "p5"]) + by_hash(["p1", "p4", "p6"])
    assert judged[0].positive_ids == expected[:3]
    assert judged[0].judged_ids == expected
    assert counts["positives_over_cap"] == 2


def test_positives_over_the_cap_never_become_candidates(mine: Any) -> None:
    rows = by_query(mine({"miners": [{**BM25, "depth": 9, "quota": 9}], "max_positives": 1}))

    assert rows["q0"].positive_ids == ["p0"]
    assert "p1" not in rows["q0"].passage_ids


def test_a_collection_without_training_judgements_is_refused(mine: Any, collection: Collection) -> None:
    with pytest.raises(ValueError, match=r"path = 'somewhere': no training judgements; expected qrels/train.tsv"):
        mine({"miners": [BM25]}, over=replace(collection, qrels={"test": collection.qrels["train"]}))


def test_a_judgement_of_an_unknown_passage_is_refused_by_id(mine: Any, collection: Collection) -> None:
    with pytest.raises(ValueError, match="query 'q0': passage 'p99' is not in the collection"):
        mine({"miners": [BM25]}, over=replace(collection, qrels={"train": {"q0": {"p99": 1}}}))


def test_nothing_kept_is_refused_with_the_reasons_and_publishes_nothing(mine: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no candidate kept for any of 4 queries \(skipped_rank [1-9].*raise depth, lower skip"
    ):
        mine({"miners": [{**BM25, "skip": 9, "depth": 12}]})

    assert not [*(tmp_path / "cache").glob("candidates/*")]
