from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsekd.mining.selection import (
    REASONS,
    Candidate,
    Proposal,
    ceiling_of,
    filter_fields,
    percentile_limit,
    select_candidates,
)
from sparsekd.recipe import NegativeFilter

TEXTS = {letter: f"text of {letter}" for letter in "abcdefghij"} | {"b2": "text of b", "c2": "text of c"}


def proposal(passage_ids: str | list[str], **changes: Any) -> Proposal:
    scores = [float(10 - number) for number in range(len(passage_ids))]
    settings: dict[str, Any] = {"miner": "bm25", "quota": 100, "skip": 0, "scores": scores, "ceiling": float("inf"), **changes}
    return Proposal(passage_ids=list(passage_ids), **settings)


def kept_ids(*proposals: Proposal, positives: str = "") -> list[str]:
    return [candidate.passage_id for candidate in select_candidates(proposals, positives, TEXTS)[0]]


def test_the_quota_is_filled_in_rank_order() -> None:
    kept, counts = select_candidates([proposal("dacb", quota=2)], [], TEXTS)

    assert kept == [Candidate("d", "bm25", 10.0, 1), Candidate("a", "bm25", 9.0, 2)]
    assert counts["dropped_over_quota"] == 2


def test_a_judged_positive_and_its_text_are_never_candidates() -> None:
    kept, counts = select_candidates([proposal(["b", "b2", "a"])], ["b"], TEXTS)

    assert [candidate.passage_id for candidate in kept] == ["a"]
    assert (counts["dropped_positive"], counts["dropped_positive_text"]) == (1, 1)


def test_skip_leaves_out_leading_ranks_positives_included() -> None:
    kept, counts = select_candidates([proposal("abcd", skip=2, quota=1)], ["a"], TEXTS)

    assert kept == [Candidate("c", "bm25", 8.0, 3)]
    assert (counts["dropped_skipped_rank"], counts["dropped_positive"]) == (2, 0)


def test_a_passage_proposed_twice_counts_for_the_first_miner_and_the_second_fills_its_quota_further_down() -> None:
    kept, counts = select_candidates([proposal("ab", quota=1), proposal("abc", miner="dense", quota=2)], [], TEXTS)

    assert [(candidate.passage_id, candidate.miner, candidate.rank) for candidate in kept] == [
        ("a", "bm25", 1),
        ("b", "dense", 2),
        ("c", "dense", 3),
    ]
    assert counts["dropped_duplicate_candidate"] == 1


def test_the_fallback_fills_what_the_quotas_ask_for_and_nobody_had() -> None:
    proposals = [proposal("ab", quota=3), proposal("bc", miner="dense", quota=2)]
    fallback = proposal("cdefgh", miner="random", quota=9, is_fallback=True)

    kept, counts = select_candidates([*proposals, fallback], [], TEXTS)

    assert [(candidate.passage_id, candidate.miner) for candidate in kept] == [
        ("a", "bm25"),
        ("b", "bm25"),
        ("c", "dense"),
        ("d", "random"),
        ("e", "random"),
    ]
    assert counts["filled_by_fallback"] == 2
    assert counts["proposed"] == counts["kept"] + sum(counts[reason] for reason in REASONS)


def test_the_fallback_gives_no_more_than_its_own_quota_and_nothing_where_nothing_is_missing() -> None:
    short = [proposal("a", quota=4), proposal("bcdef", quota=2, is_fallback=True)]
    full = [proposal("a", quota=1), proposal("bcdef", quota=2, is_fallback=True)]

    assert kept_ids(*short) == ["a", "b", "c"]
    assert kept_ids(*full) == ["a"]


def test_a_text_is_kept_once() -> None:
    assert kept_ids(proposal(["c", "c2", "a"])) == ["c", "a"]
    assert kept_ids(proposal(["c"]), proposal(["c2", "a"])) == ["c", "a"]


def test_a_candidate_above_the_ceiling_is_dropped_and_one_at_it_is_kept() -> None:
    kept, counts = select_candidates([proposal("abc", ceiling=9.0)], [], TEXTS)

    assert [candidate.passage_id for candidate in kept] == ["b", "c"]
    assert counts["dropped_filter"] == 1


def test_a_later_miner_cannot_bring_back_what_an_earlier_one_filtered() -> None:
    assert kept_ids(proposal("ab", ceiling=9.0), proposal("a", miner="dense")) == ["b"]


def test_a_skipped_rank_of_one_miner_may_be_another_miners_candidate() -> None:
    assert kept_ids(proposal("ab", skip=1), proposal("a", miner="dense")) == ["b", "a"]


def test_every_proposal_is_kept_or_dropped_for_one_reason() -> None:
    proposals = [
        proposal(["a", "b", "b2", "c", "c2", "d"], skip=1, quota=2, ceiling=8.5),
        proposal(["d", "c", "c2", "e", "f", "g"], miner="dense", quota=2, ceiling=6.5),
    ]

    kept, counts = select_candidates(proposals, ["b"], TEXTS)

    assert counts["proposed"] == 12
    assert counts["proposed"] == counts["kept"] + sum(counts[reason] for reason in REASONS)
    assert counts["kept"] == len(kept)
    assert set(counts) <= {"proposed", "kept", *REASONS}


@pytest.mark.parametrize(
    ("positive", "settings", "ceiling"),
    [
        (5.0, {"absolute_margin": 3.0}, 2.0),
        (-5.0, {"absolute_margin": 3.0}, -8.0),
        (8.0, {"relative_margin": 0.25}, 6.0),
        (-8.0, {"relative_margin": 0.25}, -10.0),  # a factor of .75 would give −6: above the positive
        (0.0, {"relative_margin": 0.25}, 0.0),
        (8.0, {"absolute_margin": 1.0, "relative_margin": 0.25}, 6.0),
        (8.0, {"absolute_margin": 0.0}, 8.0),
        (8.0, {}, float("inf")),
    ],
)
def test_the_ceiling_lies_below_the_positive_whatever_its_sign(
    positive: float, settings: dict[str, float], ceiling: float
) -> None:
    negative_filter = NegativeFilter(**settings)  # type: ignore[arg-type]

    assert ceiling_of(positive, negative_filter) == ceiling
    assert negative_filter.reads_scores is bool(settings)


def test_the_percentiles_score_is_a_ceiling_beside_the_margins() -> None:
    negative_filter = NegativeFilter(percentile=50.0, absolute_margin=1.0)
    limit = percentile_limit(np.array([1.0, 2.0, 4.0, 9.0], dtype=np.float32), negative_filter)

    assert limit == 3.0
    assert ceiling_of(9.0, negative_filter, limit) == 3.0
    assert ceiling_of(2.0, negative_filter, limit) == 1.0


@pytest.mark.parametrize("percentile", [0.0, 12.5, 95.0, 100.0])
def test_that_share_of_the_positives_lies_at_or_below_the_limit(percentile: float) -> None:
    scores = np.random.default_rng(3).normal(size=801).astype(np.float32)

    limit = percentile_limit(scores, NegativeFilter(percentile=percentile))

    assert (scores <= limit).mean() == pytest.approx(percentile / 100, abs=2 / 801)


def test_without_a_percentile_there_is_no_limit() -> None:
    assert percentile_limit(np.ones(3, dtype=np.float32), NegativeFilter()) == float("inf")


def test_settings_that_are_not_set_stay_out_of_keys() -> None:
    assert filter_fields(NegativeFilter(absolute_margin=1.0)) == {"absolute_margin": 1.0, "relative_margin": None}
    assert filter_fields(NegativeFilter(by="t", min_positive=-1.0, near_duplicate=0.9)) == {
        "absolute_margin": None,
        "relative_margin": None,
        "min_positive": -1.0,
    }


def test_a_near_duplicate_of_any_positive_is_dropped_and_counted() -> None:
    texts = {
        "x": "The cat sat on the mat.",
        "y": "stock markets fell on monday morning in warsaw after the news",
        "a": "the  CAT sat on the mat",
        "b": "stock markets fell on monday morning in warsaw after news",
        "c": "the mat",
    }

    kept, counts = select_candidates([proposal("abc")], ["x", "y"], texts, near_duplicate=0.9)
    free, _ = select_candidates([proposal("abc")], ["x", "y"], texts)

    assert [candidate.passage_id for candidate in kept] == ["c"]
    assert counts["dropped_near_duplicate"] == 2
    assert [candidate.passage_id for candidate in free] == ["a", "b", "c"]
