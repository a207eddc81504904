"""Each fact of the score doctor by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sparsekd.labels.facts import agreement_facts, dropped_facts, margin_facts, quantiles, teacher_facts


def test_quantiles_are_linear_between_neighbours() -> None:
    assert quantiles(np.arange(101.0)) == pytest.approx({"p1": 1.0, "p10": 10.0, "p50": 50.0, "p90": 90.0, "p99": 99.0})
    assert quantiles(np.array([np.nan, 3.0])) == dict.fromkeys(("p1", "p10", "p50", "p90", "p99"), 3.0)
    assert quantiles(np.array([np.nan])) is None


def test_margins_are_positive_minus_negative_and_a_tie_is_not_below() -> None:
    facts = margin_facts(np.array([[8.0, 2.0, 5.0], [1.0, 9.0, -3.0], [4.0, 4.0, 4.0], [0.0, -1.0, 1.0]]))

    # 6 3 | −8 4 | 0 0 | 1 −1, in order −8 −1 0 0 1 3 4 6
    assert facts["margin_quantiles"]["p50"] == pytest.approx(0.5)
    assert facts["share_positive_below_best_negative"] == 0.5


def test_a_row_without_a_margin_is_in_no_share() -> None:
    facts = margin_facts(np.array([[np.nan, 2.0], [1.0, np.nan], [1.0, 3.0]]))

    assert facts["share_positive_below_best_negative"] == 1.0
    assert margin_facts(np.array([[np.nan, 2.0]])) == {"margin_quantiles": None, "share_positive_below_best_negative": None}


def test_range_and_saturation_are_of_distinct_pairs_and_rows_count_apart() -> None:
    scores_P = np.array([1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0, np.nan], dtype=np.float32)
    places_RN = np.array([[0, 1, 2], [4, 5, 6], [3, 1, 7]])  # pair 1 stands in two rows

    facts = teacher_facts(scores_P, scores_P[places_RN])

    assert (facts["pairs"], facts["unscored"]) == (7, 1)
    assert facts["range"] == pytest.approx({"min": 0.0, "mean": 5.5 / 7, "max": 1.0, "std": np.sqrt(5.25 / 7 - (5.5 / 7) ** 2)})
    assert facts["saturation"] == pytest.approx({"share_at_min": 1 / 7, "share_at_max": 5 / 7, "distinct_values": 3})
    assert facts["quantiles"]["p50"] == 1.0
    assert facts["constant_rows"] == 1
    assert facts["share_positive_below_best_negative"] == pytest.approx(1 / 3)


def test_a_teacher_of_one_score_is_all_extremes() -> None:
    facts = teacher_facts(np.zeros(4), np.zeros((2, 2)))

    assert facts["saturation"] == {"share_at_min": 1.0, "share_at_max": 1.0, "distinct_values": 1}
    assert (facts["constant_rows"], facts["range"]["std"]) == (2, 0.0)


def test_a_teacher_that_has_scored_nothing_has_no_other_fact() -> None:
    assert teacher_facts(np.full(4, np.nan), np.full((2, 2), np.nan)) == {"pairs": 0, "unscored": 4}


def test_agreement_is_per_query_over_its_own_passages() -> None:
    # three passages: τ 1/3; two: τ −1; two that one teacher ties: none; three: τ 1
    first = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 5.0, 5.0, 1.0, 2.0, 3.0])
    second = np.array([1.0, 3.0, 2.0, 2.0, 1.0, 1.0, 2.0, 4.0, 5.0, 6.0])

    facts = agreement_facts(first, second, [3, 2, 2, 3])

    assert (facts["queries"], facts["queries_undefined"]) == (3, 1)
    assert facts["kendall_tau"]["mean"] == pytest.approx(1 / 9)
    assert facts["kendall_tau"]["p50"] == pytest.approx(1 / 3)
    assert facts["kendall_tau"]["p90"] == pytest.approx(1 / 3 + 0.8 * 2 / 3)


def test_two_teachers_without_an_order_have_no_agreement() -> None:
    assert agreement_facts(np.zeros(2), np.zeros(2), [2]) == {"queries": 0, "queries_undefined": 1, "kendall_tau": None}


def test_what_was_dropped_is_a_share_of_what_there_was() -> None:
    counts = {
        "rows": 30,
        "rows_dropped": {"too_few_negatives": 10, "constant_scores": 0},
        "candidates_dropped_filter": 20,
        "mining": {"queries": 5, "proposed": 400, "kept": 80, "dropped_filter": 40, "dropped_over_quota": 280},
    }

    assert dropped_facts(counts) == {
        "mining": {"dropped_filter": {"count": 40, "share": 0.1}, "dropped_over_quota": {"count": 280, "share": 0.7}},
        "filter_by_teacher": {"count": 20, "share": 0.25},
        "rows": {"too_few_negatives": {"count": 10, "share": 0.25}, "constant_scores": {"count": 0, "share": 0.0}},
    }
    assert dropped_facts({})["filter_by_teacher"] == {"count": 0, "share": None}
