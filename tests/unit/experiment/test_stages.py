"""Stage 1 of each kind of label, with real tiny teachers: who is asked, what is kept, and what is refused before anyone is paid."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import Stemmer

from sparsekd.bank.sharing import CLAIMS
from sparsekd.experiment import Experiment, candidates, score_table, student
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.rows import filter_pairs
from sparsekd.labels.score_table import ScoreTable

Make = Callable[..., Experiment]


def files(experiment: Experiment) -> set[str]:
    """What the bank holds, by kind."""
    return {path.name for path in (experiment.plan.cache / "bank").glob("*")} - {CLAIMS}


def test_rows_without_labels_ask_no_teacher_at_all(make_experiment: Make) -> None:
    experiment = make_experiment(
        {"kind": "none", "num_negatives": 0}, "SparseMultipleNegativesRankingLoss", run=run_of(make_experiment, "cuda:99")
    )

    table = score_table(experiment)

    assert (table.kind, table.num_passages) == ("none", 1)
    assert [table.counts[name] for name in ("pairs", "pairs_scored", "pairs_reused")] == [0, 0, 0]
    assert files(experiment) == set()


def run_of(make_experiment: Make, device: str) -> dict[str, Any]:
    """The run section on a device that may not exist: then any encoding is refused."""
    cache = make_experiment({}).recipe.run.cache
    return {"cache": cache, "threads": 1, "device": device}


def test_a_teacher_that_filters_rows_without_labels_is_the_only_one_asked(make_experiment: Make) -> None:
    mining = {"miners": [{"kind": "bm25", "quota": 3}], "filter": {"by": "dense", "absolute_margin": 0.0}}
    experiment = make_experiment({"kind": "none", "num_negatives": 1}, "SparseMultipleNegativesRankingLoss", mining=mining)

    table = score_table(experiment)

    assert table.counts["pairs"] == table.counts["pairs_scored"] > 0
    assert table.counts["candidates_dropped_filter"] > 0
    assert files(experiment) == {"scores", "embeddings"}


def test_a_teacher_whose_range_is_covered_is_the_only_one_asked_for_rows_without_labels(make_experiment: Make) -> None:
    labels = {"kind": "none", "num_negatives": 2, "selection": "stratified", "selection_teacher": "dense"}
    experiment = make_experiment(labels, "SparseMultipleNegativesRankingLoss")

    table = score_table(experiment)

    assert table.counts["pairs"] == table.counts["pairs_scored"] > 0
    assert files(experiment) == {"scores", "embeddings"}
    assert len(table) == len(score_table(make_experiment({**labels, "selection": "top"}, "SparseMultipleNegativesRankingLoss")))


def test_promoted_positives_are_rows_of_their_own_counted_and_listed(make_experiment: Make) -> None:
    before = score_table(make_experiment({"selection_teacher": "dense"}))
    experiment = make_experiment({"num_negatives": 1})
    dense = {"dense": experiment.scores_of(experiment.teacher("dense"))}
    pairs = [(row.query_id, passage_id) for row in candidates(experiment) for passage_id in row.passage_ids]
    scores = BankedScores(experiment.collection, dense)("dense", [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    threshold = float(np.sort(scores)[-3])

    table = score_table(make_experiment({"num_negatives": 1, "selection_teacher": "dense", "promote_above": threshold}))

    best = {pair: score for pair, score in zip(pairs, scores.tolist(), strict=True) if score >= threshold}
    lines = (table.artifact.folder / "promoted.tsv").read_text("utf-8").splitlines()
    assert lines[0] == "query_id\tpassage_id\tgold_sim"
    listed = {(query_id, passage_id): float(score) for query_id, passage_id, score in (line.split("\t") for line in lines[1:])}
    assert listed == pytest.approx(best)
    assert table.counts["positives_promoted"] == len(best) == len(lines) - 1
    rows = [(query_id, passage_ids[0]) for query_id, passage_ids, _ in table.rows()]
    assert {*best} <= {*rows}
    assert not {*best} & {(query_id, other) for query_id, passage_ids, _ in table.rows() for other in passage_ids[1:]}
    assert table.counts["pairs_scored"] == 0 < before.counts["pairs_scored"]


def test_another_selection_of_negatives_scores_no_pair(make_experiment: Make) -> None:
    score_table(make_experiment({}))

    table = score_table(make_experiment({"selection": "stratified", "selection_teacher": "dense"}))

    assert table.counts["pairs_scored"] == 0


def test_a_sparse_miner_proposes_by_the_vectors_that_its_model_gives_and_banks_them(
    make_experiment: Make, tiny_splade_folder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SparseEncoder

    student_folder = shutil.copytree(tiny_splade_folder, tmp_path / "student of an earlier round")
    mining = {"miners": [{"kind": "sparse", "model": str(student_folder), "quota": 4, "depth": 9}]}
    experiment = make_experiment({"kind": "none"}, "SparseMultipleNegativesRankingLoss", mining=mining)

    mined = candidates(experiment)

    collection, model = experiment.collection, SparseEncoder(str(student_folder), device="cpu")
    passages = model.encode_document(list(collection.passages.values()), prompt="", convert_to_sparse_tensor=False).numpy()
    for row in mined:
        query = model.encode_query(collection.queries[row.query_id], prompt="", convert_to_sparse_tensor=False).numpy()
        score = dict(zip(collection.passages, (passages.astype(np.float64) @ query).tolist(), strict=True))
        assert row.miner == ["sparse"] * 4
        np.testing.assert_allclose(row.miner_score, [score[passage_id] for passage_id in row.passage_ids], rtol=1e-4)
        others = {*collection.passages} - {*row.passage_ids, *row.positive_ids}
        assert min(row.miner_score) >= max(score[passage_id] for passage_id in others) - 1e-3
    assert files(experiment) == {"sparse"}


def test_a_miner_over_a_student_of_an_earlier_round_scores_new_pairs_only(
    make_experiment: Make, tiny_splade_folder: Path
) -> None:
    first = score_table(make_experiment({}))
    miners = [{"kind": "bm25", "quota": 3}, {"kind": "sparse", "model": str(tiny_splade_folder), "quota": 3}]
    experiment = make_experiment({}, mining={"miners": miners})

    second = score_table(experiment)

    assert second.counts["pairs_reused"] == first.counts["pairs"]
    new = [row for row in candidates(experiment) for miner in row.miner if miner == "sparse"]
    assert second.counts["pairs_scored"] == 2 * len(new) > 0  # two teachers


def test_similarities_and_scores_share_the_bank(make_experiment: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sparsekd")
    scores = score_table(make_experiment({}))

    table = score_table(make_experiment({"kind": "similarity"}, "SparseCoSENTLoss"))

    assert (table.counts["pairs_scored"], table.counts["pairs_reused"]) == (0, scores.counts["pairs"])
    low, high = table.contract.label_range or (0.0, 0.0)
    by_pair = {
        (query_id, passage_id): score
        for query_id, passage_ids, row in scores.rows()
        for passage_id, score in zip(passage_ids, row, strict=True)
    }
    assert {(query_id, passage_id) for query_id, [passage_id], _ in table.rows()} == set(by_pair)
    for query_id, [passage_id], [similarity] in table.rows():
        assert low + similarity * (high - low) == pytest.approx(by_pair[query_id, passage_id], rel=1e-4, abs=1e-4)
    assert f"similarity: gold_sim {low:.4f} at 0, {high:.4f} at 1" in caplog.text


def test_vectors_of_the_sparse_teacher_label_the_texts_of_the_rows(make_experiment: Make, tiny_splade_folder: Path) -> None:
    from sentence_transformers import SparseEncoder

    experiment = make_experiment({"kind": "embedding"}, "SparseMSELoss")

    table = score_table(experiment)

    model, texts = SparseEncoder(str(tiny_splade_folder), device="cpu"), table.texts()
    queries = [experiment.collection.queries[query_id] for query_id in texts["query"]]
    passages = [experiment.collection.passages[passage_id] for passage_id in texts["passage"]]
    expected = np.concatenate(
        [
            model.encode_query(queries, prompt="", convert_to_sparse_tensor=False).numpy(),
            model.encode_document(passages, prompt="", convert_to_sparse_tensor=False).numpy(),
        ]
    )
    np.testing.assert_allclose(table.vectors().toarray(), expected, atol=1e-5)
    assert files(experiment) == {"sparse"}  # no pair was scored
    rows = score_table(make_experiment({"kind": "none"}, "SparseMultipleNegativesRankingLoss"))
    assert texts == rows.texts()


LEXICAL = {"name": "lexical", "kind": "bm25", "k1": 1.2, "b": 0.75}


def with_bm25(make_experiment: Make, tiny_encoder_folder: Path, labels: dict[str, Any], **sections: Any) -> Experiment:
    """An experiment taught by a dense teacher and BM25."""
    teachers = [{"name": "dense", "kind": "dense", "model": str(tiny_encoder_folder)}, LEXICAL]
    return make_experiment(labels, teachers=teachers, **sections)


def lucene_bm25(passages: dict[str, str], query: str, passage_id: str, k1: float, b: float) -> float:
    """BM25 of one pair by its formula, in Python floats."""
    stem = Stemmer.Stemmer("porter").stemWord
    bags = {key: Counter(stem(word) for word in re.findall(r"\b\w\w+\b", text.lower())) for key, text in passages.items()}
    bag, mean_length = bags[passage_id], sum(each.total() for each in bags.values()) / len(bags)
    score = 0.0
    for term in (stem(word) for word in re.findall(r"\b\w\w+\b", query.lower())):
        df = sum(term in each for each in bags.values())
        if bag[term]:
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            score += idf * bag[term] / (bag[term] + k1 * (1 - b + b * bag.total() / mean_length))
    return score


def zscores(scores_RN: np.ndarray) -> np.ndarray:
    return (scores_RN - scores_RN.mean()) / scores_RN.std()


def test_bm25_and_a_dense_teacher_label_together(make_experiment: Make, tiny_encoder_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    weights = {"dense": 1.0, "lexical": 3.0}
    experiment = with_bm25(make_experiment, tiny_encoder_folder, {"calibration": {"kind": "zscore"}, "weights": weights})

    table = score_table(experiment)

    passages, queries = experiment.collection.passages, experiment.collection.queries
    rows = list(table.rows())
    lexical_RN = np.array([[lucene_bm25(passages, queries[q], p, 1.2, 0.75) for p in row_ids] for q, row_ids, _ in rows])
    model = SentenceTransformer(str(tiny_encoder_folder), device="cpu")
    vectors = [model.encode([queries[q], *(passages[p] for p in row_ids)], show_progress_bar=False) for q, row_ids, _ in rows]
    dense_RN = np.array([vectors_N[1:] @ vectors_N[0] for vectors_N in vectors], dtype=np.float64)
    expected_RN = 0.25 * zscores(dense_RN) + 0.75 * zscores(lexical_RN)
    np.testing.assert_allclose(np.array([gold_sim for _, _, gold_sim in rows]), expected_RN, rtol=1e-4, atol=1e-4)


def test_bm25s_raw_scores_are_banked_exactly_0_where_no_term_is_shared(
    make_experiment: Make, tiny_encoder_folder: Path
) -> None:
    miners = [{"kind": "bm25", "quota": 2}, {"kind": "dense", "model": str(tiny_encoder_folder), "quota": 3}]
    experiment = with_bm25(make_experiment, tiny_encoder_folder, {}, mining={"miners": miners})

    score_table(experiment)

    query_ids, passage_ids = filter_pairs(candidates(experiment))
    scores = {"lexical": experiment.scores_of(experiment.teacher("lexical"))}
    gold_sim = BankedScores(experiment.collection, scores)("lexical", query_ids, passage_ids)
    passages, queries = experiment.collection.passages, experiment.collection.queries
    pairs = zip(query_ids, passage_ids, strict=True)
    expected = np.array([lucene_bm25(passages, queries[q], p, 1.2, 0.75) for q, p in pairs])
    assert (expected == 0).any()
    assert ((gold_sim == 0) == (expected == 0)).all()
    np.testing.assert_allclose(gold_sim, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [
        {"calibration": {"kind": "minmax", "scale": 30.0}},
        {"weights": {"dense": 1.0, "lexical": 0.5}},
        {"calibration": {"kind": "affine", "mean": 2.0}, "weights": {"dense": 0.0, "lexical": 1.0}},
    ],
)
def test_another_view_of_bm25_and_a_dense_teacher_asks_neither(
    make_experiment: Make, tiny_encoder_folder: Path, labels: dict[str, Any]
) -> None:
    first = score_table(with_bm25(make_experiment, tiny_encoder_folder, {}))

    again = score_table(with_bm25(make_experiment, tiny_encoder_folder, labels, run=run_of(make_experiment, "cuda:99")))

    assert again.key != first.key
    assert (again.counts["pairs_scored"], again.counts["pairs_reused"]) == (0, first.counts["pairs"])


# A dense, a sparse and a lexical teacher: published ensembles, then what else a view can be
VIEWS: dict[str, dict[str, Any]] = {
    "splade-v3": {"calibration": {"kind": "minmax"}},
    "splade-v3 rescored": {"calibration": {"kind": "minmax"}, "rescale": {"kind": "affine", "reference": "dense"}},
    "opensearch": {"calibration": {"kind": "minmax", "scale": 30.0}},
    "weighted sum": {"combine": "sum", "weights": {"splade": 2.0, "dense": 0.5, "lexical": 1.0}},
    "to a teacher's scale": {"calibration": {"kind": "affine", "reference": "splade"}},
    "to an ignored teacher's scale": {
        "calibration": {"kind": "affine", "reference": "lexical"},
        "weights": {"splade": 1.0, "dense": 1.0, "lexical": 0.0},
    },
    "one each": {
        "calibration": {"kind": "rank"},
        "calibrations": {"dense": {"kind": "percentile"}, "lexical": {"kind": "zscore", "scale": 0.2}},
    },
    "renormalize": {"missing": "renormalize", "calibration": {"kind": "zscore"}},
}


def test_no_calibration_and_no_ensemble_scores_a_pair_again(
    make_experiment: Make, tiny_splade_folder: Path, tiny_encoder_folder: Path
) -> None:
    teachers = [
        {"name": "splade", "kind": "sparse", "model": str(tiny_splade_folder)},
        {"name": "dense", "kind": "dense", "model": str(tiny_encoder_folder)},
        LEXICAL,
    ]
    unable = run_of(make_experiment, "cuda:99")
    first = score_table(make_experiment({}, teachers=teachers))  # Hofstätter's mean of raw scores
    assert first.counts["pairs_scored"] == first.counts["pairs"] > 0

    tables = {view: score_table(make_experiment(labels, teachers=teachers, run=unable)) for view, labels in VIEWS.items()}

    assert {view: table.counts["pairs_scored"] for view, table in tables.items()} == dict.fromkeys(VIEWS, 0)
    assert {table.counts["pairs_reused"] for table in tables.values()} == {first.counts["pairs"]}
    assert len({first.key, *(table.key for table in tables.values())}) == len(VIEWS) + 1


def test_a_bm25_teacher_filters_candidates(make_experiment: Make) -> None:
    mining = {"miners": [{"kind": "bm25", "quota": 3}], "filter": {"by": "lexical", "absolute_margin": 0.0}}
    kinds = {"kind": "none", "num_negatives": 1}
    experiment = make_experiment(kinds, "SparseMultipleNegativesRankingLoss", mining=mining, teachers=[LEXICAL])

    table = score_table(experiment)

    assert table.counts["candidates_dropped_filter"] > 0
    assert files(experiment) == {"scores"}


def collection_of_cats(folder: Path) -> Path:
    """A BEIR folder of 12 queries, each with one passage that BM25 finds first and three that share a word with it."""
    words = "cat dog bird fish river bridge tower king queen school war snow".split()
    passages = [{"_id": f"p{n}", "text": f"{word} {word} {word}"} for n, word in enumerate(words)]
    passages += [{"_id": f"o{n}-{m}", "text": f"{word} {'heat flow air'.split()[m]} the wing of it"} for n, word in enumerate(words)
                 for m in range(3)]  # fmt: skip
    queries = [{"_id": f"q{n}", "text": word} for n, word in enumerate(words)]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", passages), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged = "".join(f"q{n}\tp{n}\t1\n" for n in range(len(words)))
    (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    return folder


def test_a_teacher_that_ranks_worse_than_bm25_is_stopped_before_a_long_run(
    make_experiment: Make, tiny_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.gate.LONG_RUN_PAIRS", 48)  # 12 positives and 36 candidates: just long
    teacher = {"name": "blind", "kind": "dense", "model": str(tiny_encoder_folder), "max_length": 2}  # sees special tokens only
    sections: dict[str, Any] = {"collection": {"path": str(collection_of_cats(tmp_path / "cats"))}}

    message = r"\[\[teachers\]\] 'blind' ranks worse than BM25: nDCG@10 0\.431 reranking .* 12 train queries; BM25 1\.000, "
    stopped = make_experiment({}, teachers=[teacher], **sections)
    with pytest.raises(ValueError, match=message):
        score_table(stopped)

    assert stopped.scores_of(stopped.teacher("blind")).num_pairs >= 48  # what the gate has scored stays in the bank
    # Without the gate it is seen afterwards that one score for all teaches nothing.
    with pytest.raises(ValueError, match=r"\[\[teachers\]\] 'blind': all 48 pairs have the score"):
        score_table(make_experiment({}, teachers=[{**teacher, "gate": False}], **sections))


def test_a_teacher_passes_the_gate_once_and_its_figures_stay_with_the_table(
    make_experiment: Make, tiny_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.gate.LONG_RUN_PAIRS", 48)
    monkeypatch.setattr("sparsekd.gate.GateFigures.is_passed", True)
    teachers = [{"name": "dense", "kind": "dense", "model": str(tiny_encoder_folder)}, LEXICAL]
    sections: dict[str, Any] = {"collection": {"path": str(collection_of_cats(tmp_path / "cats"))}}

    first = score_table(make_experiment({}, teachers=teachers, **sections))
    again = score_table(make_experiment({"weights": {"dense": 1.0, "lexical": 2.0}}, teachers=teachers, **sections))

    assert list(first.artifact.manifest["gate"]) == ["dense"]
    assert first.artifact.manifest["gate"]["dense"]["bm25"] == pytest.approx(1.0)
    assert "gate" not in again.artifact.manifest  # nothing left to score


def test_a_change_of_rows_encodes_only_new_texts(make_experiment: Make) -> None:
    table = score_table(make_experiment({"kind": "embedding", "num_negatives": 3}, "SparseMSELoss"))
    unable = run_of(make_experiment, "cuda:99")

    drawn = {"kind": "embedding", "num_negatives": 3, "selection": "random"}  # the same passages in another order
    again = score_table(make_experiment(drawn, "SparseMSELoss", run=unable))

    assert again.key != table.key


def test_a_second_run_of_each_kind_is_a_hit(make_experiment: Make) -> None:
    kinds = [("embedding", "SparseMSELoss"), ("none", "SparseMultipleNegativesRankingLoss"), ("similarity", "SparseCoSENTLoss")]
    for kind, loss in kinds:
        first = score_table(make_experiment({"kind": kind}, loss))

        again = score_table(make_experiment({"kind": kind}, loss, run=run_of(make_experiment, "cuda:99")))

        assert isinstance(again, ScoreTable)
        assert again.artifact.folder == first.artifact.folder


def test_a_student_of_another_vocabulary_is_refused_before_the_teacher_encodes_a_text(
    make_experiment: Make, tiny_masked_lm_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_masked_lm_folder, tmp_path / "other"))
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    swapped = tokenizer.replace('"cat":', '"@":').replace('"dog":', '"cat":').replace('"@":', '"dog":')
    assert swapped != tokenizer
    (folder / "tokenizer.json").write_text(swapped, encoding="utf-8")
    experiment = make_experiment({"kind": "embedding"}, "SparseMSELoss", student={"model": str(folder), "max_length": 32})

    with pytest.raises(ValueError, match=r"the vocabulary of teacher 'splade' \(\w{12}\) is not the student's"):
        student(experiment)

    assert files(experiment) == set()
