"""The teacher gate by hand and against ir-measures: what it measures, whom it stops, what it says."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd import gate
from sparsekd.collection.beir import Collection
from sparsekd.evaluation.measures import measure
from sparsekd.evaluation.runs import Ranking
from sparsekd.gate import check_teacher, expected_ndcg, judged_slice, measure_gate, ndcg

NUM = 12
PASSAGES = {f"{letter}{number}": "text" for number in range(NUM) for letter in "abc"}
JUDGED = {f"q{number}": {f"a{number}": 1} for number in range(NUM)}


def collection_of(qrels: dict[str, dict[str, dict[str, int]]]) -> Collection:
    query_ids = sorted({query_id for judged in qrels.values() for query_id in judged})
    return Collection(PASSAGES, {query_id: query_id for query_id in query_ids}, qrels, {})


def first_stage(queries: Sequence[str], depth: int) -> list[list[str]]:
    """For qN: bN first, then aN, its positive, then cN."""
    assert depth == gate.DEPTH
    return [[f"{letter}{query[1:]}" for letter in "bac"] for query in queries]


def teacher_of(places: str, spoilt: int = 0) -> gate.Score:
    """Rank passages by the place of their letter in ``places``, those of the first ``spoilt`` queries the other way round."""

    def score(query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        signs = [-1 if int(query_id[1:]) >= spoilt else 1 for query_id in query_ids]
        ranks = [places.index(passage_id[0]) for passage_id in passage_ids]
        return np.array([sign * rank for sign, rank in zip(signs, ranks, strict=True)], dtype=np.float32)

    return score


SECOND, THIRD = 1 / math.log2(3), 1 / math.log2(4)


# Measures


def test_ndcg_equals_ir_measures() -> None:
    generator = np.random.default_rng(0)
    passage_ids = [f"p{number}" for number in range(15)]
    for _ in range(20):
        grades = {passage_id: int(grade) for passage_id, grade in zip(passage_ids, generator.integers(-1, 4, 15), strict=True)}
        grades["p99"] = 2  # judged, not retrieved
        ranking = Ranking(generator.permutation(passage_ids).tolist(), np.zeros(15, dtype=np.float32))

        assert ndcg(ranking.passage_ids, grades) == pytest.approx(measure({"q": ranking}, {"q": grades})["nDCG@10"])


def test_the_expected_ndcg_is_the_mean_over_all_orders() -> None:
    grades = {"a": 2, "b": 1, "elsewhere": 3}

    orders = [ndcg(order, grades) for order in itertools.permutations("abcde")]

    assert expected_ndcg("abcde", grades) == pytest.approx(sum(orders) / len(orders))
    assert expected_ndcg([], grades) == ndcg([], grades) == 0.0


def test_the_three_orders_by_hand() -> None:
    figures = measure_gate("dev", JUDGED, collection_of({"dev": JUDGED}), first_stage, teacher_of("abc"))

    assert (figures.split, figures.queries) == ("dev", NUM)
    assert (figures.teacher, figures.bm25) == (1.0, pytest.approx(SECOND))
    assert figures.random == pytest.approx((1 + SECOND + THIRD) / 3)
    assert figures.noise == pytest.approx(0.0)


def test_noise_is_two_standard_errors_of_the_paired_differences() -> None:
    figures = measure_gate("dev", JUDGED, collection_of({"dev": JUDGED}), first_stage, teacher_of("abc", spoilt=6))

    differences = [1 - SECOND] * 6 + [THIRD - SECOND] * 6
    assert figures.noise == pytest.approx(2 * np.std(differences, ddof=1) / math.sqrt(NUM))


# The slice


def test_the_slice_is_of_dev_where_it_is_judged_and_of_train_else_and_never_of_test() -> None:
    few = dict(list(JUDGED.items())[: gate.LEAST_QUERIES - 1])

    assert judged_slice(collection_of({"train": JUDGED, "dev": JUDGED, "test": JUDGED}))[0] == "dev"
    assert judged_slice(collection_of({"train": JUDGED, "dev": few, "test": JUDGED}))[0] == "train"
    assert judged_slice(collection_of({"test": JUDGED})) == ("train", {})


def test_the_slice_is_the_same_whatever_the_order_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "NUM_QUERIES", 4)

    slices = [judged_slice(collection_of({"train": dict(items)}))[1] for items in (JUDGED.items(), reversed(JUDGED.items()))]

    assert len(slices[0]) == 4
    assert slices[0] == slices[1]


# The decision


def test_a_teacher_above_bm25_passes_and_its_figures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sparsekd")

    figures = check_teacher("judge", collection_of({"train": JUDGED}), first_stage, teacher_of("abc"))

    assert figures is not None
    assert (figures["teacher"], figures["queries"]) == (1.0, NUM)
    assert (
        "teacher gate judge: nDCG@10 1.000 reranking BM25's best 50 passages of 12 train queries; BM25 0.631, a random order 0.710"
        in caplog.text
    )


def test_a_teacher_below_bm25_is_stopped_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="ranks worse than BM25") as caught:
        check_teacher("judge", collection_of({"train": JUDGED}), first_stage, teacher_of("bca"))

    assert str(caught.value) == (
        "[[teachers]] 'judge' ranks worse than BM25: nDCG@10 0.500 reranking BM25's best 50 passages of 12 train queries; "
        "BM25 0.631, a random order 0.710; expected at least BM25's less 0.000, two standard errors; check its model, prompts and "
        "max_length, or set gate = false to be taught by it all the same"
    )


def test_a_teacher_that_is_below_bm25_by_noise_passes() -> None:
    teacher = teacher_of("abc", spoilt=9)  # three queries .369 better, nine .131 worse

    figures = measure_gate("train", JUDGED, collection_of({"train": JUDGED}), first_stage, teacher)

    assert figures.teacher == pytest.approx((3 + 9 * THIRD) / NUM)
    assert figures.bm25 - figures.noise < figures.teacher < figures.bm25
    assert figures.is_passed


def test_equal_scores_are_ordered_by_passage_id() -> None:
    def equal(query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        return np.zeros(len(passage_ids), dtype=np.float32)

    figures = measure_gate("train", JUDGED, collection_of({"train": JUDGED}), first_stage, equal)

    assert figures.teacher == 1.0  # a before b and c, not BM25's order


def test_too_few_judged_queries_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sparsekd")
    few = dict(list(JUDGED.items())[:3])

    assert check_teacher("judge", collection_of({"train": few}), first_stage, teacher_of("bca")) is None
    assert "teacher gate judge: 3 judged queries, fewer than 10: not measured" in caplog.text
