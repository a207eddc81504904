"""The measures against numbers worked by hand, a second formula in numpy, and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsekd.evaluation.measures import MEASURES, measure, measure_queries
from sparsekd.evaluation.runs import Ranking, ranked

Qrels = dict[str, dict[str, int]]


def in_order(passage_ids: list[str]) -> Ranking:
    return ranked(passage_ids, -np.arange(len(passage_ids), dtype=np.float32))


def second_formula(rankings: dict[str, Ranking], qrels: Qrels) -> dict[str, float]:
    values = []
    for query_id, grades in qrels.items():
        ids = rankings[query_id].passage_ids if query_id in rankings else []
        gains = np.array([max(0, grades.get(passage_id, 0)) for passage_id in ids], dtype=np.float64)
        ideal = np.sort(np.maximum(0, list(grades.values())))[::-1][:10]
        discount = 1 / np.log2(np.arange(2, 12))
        hits = np.flatnonzero(gains[:10] >= 1)
        values.append(
            (
                (gains[:10] @ discount[: len(gains[:10])]) / (ideal @ discount[: len(ideal)]),
                1 / (hits[0] + 1) if hits.size else 0.0,
                (gains[:100] >= 1).sum() / (np.array(list(grades.values())) >= 1).sum(),
            )
        )
    return dict(zip(MEASURES, np.mean(values, axis=0).tolist(), strict=True))


def test_one_query_with_grades_by_hand() -> None:
    qrels = {"q": {"a": 3, "b": 1, "c": 2, "d": 0}}

    figures = measure({"q": in_order(["d", "b", "x", "a"])}, qrels)

    dcg = 0 + 1 / math.log2(3) + 0 + 3 / math.log2(5)  # linear gains at ranks 2 and 4
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert figures == pytest.approx({"nDCG@10": dcg / ideal, "RR@10": 1 / 2, "R@100": 2 / 3}, abs=1e-12)
    assert figures["nDCG@10"] == pytest.approx(0.4038253, abs=1e-7)
    assert list(figures) == ["nDCG@10", "RR@10", "R@100"]


def test_a_judged_query_without_results_counts_zero() -> None:
    qrels = {"found": {"a": 1}, "empty": {"a": 1}, "absent": {"a": 2}}

    figures = measure({"found": in_order(["a"]), "empty": in_order([]), "unjudged": in_order(["a"])}, qrels)

    assert figures == pytest.approx(dict.fromkeys(MEASURES, 1 / 3))


def test_no_results_at_all_are_zero() -> None:
    assert measure({}, {"q": {"a": 1}}) == dict.fromkeys(MEASURES, 0.0)


def test_cutoffs_are_ten_and_a_hundred() -> None:
    unjudged = [f"x{number:03}" for number in range(100)]
    qrels = {"q": {"a": 1}}

    at_10 = measure({"q": in_order([*unjudged[:9], "a"])}, qrels)
    at_11 = measure({"q": in_order([*unjudged[:10], "a"])}, qrels)
    at_100 = measure({"q": in_order([*unjudged[:99], "a"])}, qrels)
    at_101 = measure({"q": in_order([*unjudged, "a"])}, qrels)

    assert at_10 == pytest.approx({"nDCG@10": 1 / math.log2(11), "RR@10": 0.1, "R@100": 1.0})
    assert at_11 == {"nDCG@10": 0.0, "RR@10": 0.0, "R@100": 1.0}
    assert (at_100["R@100"], at_101["R@100"]) == (1.0, 0.0)


@pytest.mark.parametrize("relevant", ["a", "b", "c"])
def test_our_order_of_ties_is_what_every_measure_sees(relevant: str) -> None:
    # trec_eval alone would rank equal scores c, b, a
    figures = measure({"q": ranked(["c", "a", "b"], [1.0, 1.0, 1.0])}, {"q": {relevant: 1}})

    rank = "abc".index(relevant) + 1
    assert figures == pytest.approx({"nDCG@10": 1 / math.log2(rank + 1), "RR@10": 1 / rank, "R@100": 1.0})


def test_scores_that_differ_in_the_last_bit_are_not_ties() -> None:
    close = np.nextafter(np.float32(1), np.float32(2))

    figures = measure({"q": ranked(["z", "a"], np.array([close, 1], dtype=np.float32))}, {"q": {"a": 1}})

    assert figures["RR@10"] == 0.5


def test_grades_below_zero_gain_nothing() -> None:
    qrels = {"q": {"spam": -2, "a": 1}}

    assert measure({"q": in_order(["spam", "a"])}, qrels) == pytest.approx(
        {"nDCG@10": 1 / math.log2(3), "RR@10": 0.5, "R@100": 1.0}
    )


def test_random_rankings_agree_with_the_second_formula() -> None:
    generator = np.random.default_rng(0)
    passage_ids = [f"p{number}" for number in range(300)]
    qrels = {
        f"q{number}": {"p0": 1, **{str(p): int(generator.integers(-1, 4)) for p in generator.choice(passage_ids, 25)}}
        for number in range(40)
    }
    rankings = {
        query_id: ranked(generator.choice(passage_ids, size, replace=False).tolist(), generator.integers(0, 9, size))
        for query_id, size in zip(list(qrels)[:-2], generator.integers(0, 150, 38), strict=True)
    }

    assert measure(rankings, qrels) == pytest.approx(second_formula(rankings, qrels), abs=1e-12)


def test_measuring_without_judgements_is_refused() -> None:
    with pytest.raises(ValueError, match="no judged query"):
        measure({"q": in_order(["a"])}, {})


def test_values_of_queries_have_the_measures_as_their_means() -> None:
    rng = np.random.default_rng(5)
    passages = [f"p{number}" for number in range(150)]
    judged = [rng.choice(passages, 9).tolist() for _ in range(7)]
    qrels = {f"q{row}": {p: int(rng.integers(0, 3)) for p in chosen} | {"p0": 1} for row, chosen in enumerate(judged)}
    rankings = {query_id: in_order(rng.permutation(passages)[:100].tolist()) for query_id in list(qrels)[:-1]}

    values = measure_queries(rankings, qrels)

    assert {name: list(by_query) for name, by_query in values.items()} == {name: list(qrels) for name in MEASURES}
    assert all(by_query["q6"] == 0 for by_query in values.values())
    means = {name: float(np.mean(list(by_query.values()))) for name, by_query in values.items()}
    assert means == pytest.approx(measure(rankings, qrels), abs=1e-12)
    for query_id, grades in qrels.items():
        alone = second_formula(rankings, {query_id: grades})
        assert {name: values[name][query_id] for name in MEASURES} == pytest.approx(alone, abs=1e-12)
