from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.collection.beir import Collection
from sparsekd.mining.candidates import CandidateRow, Candidates, candidates_folder
from sparsekd.mining.miners import judged_queries, mine_candidates
from sparsekd.mining.selection import REASONS

BM25 = {"kind": "bm25", "quota": 3, "depth": 5}
DENSE = {"kind": "dense", "quota": 2, "depth": 6, "model": "some/encoder"}
FIELDS = {"made": "for a test"}


@pytest.fixture
def mine(tmp_path: Path, collection: Collection, make_recipe: Any, word_vectors: Any) -> Callable[..., Candidates]:
    def run(
        mining: dict[str, Any], *, over: Collection = collection, similarity: str = "dot", name: str = "cache"
    ) -> Candidates:
        source = word_vectors(similarity)
        return mine_candidates(make_recipe(mining), over, cache=tmp_path / name, fields=FIELDS, source=source)

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

    assert first.artifact.manifest == second.artifact.manifest


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

    assert not candidates_folder(tmp_path / "cache", FIELDS).exists()
