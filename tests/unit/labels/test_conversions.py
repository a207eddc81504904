from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.labels.conversions import class_triplets, margins, triplet_ids, triplet_scores

SCORES = np.array([[8.0, 2.0, 5.0], [1.0, 9.0, -3.0]], dtype=np.float32)


def test_margins_are_signed_positive_minus_negative() -> None:
    converted = margins(SCORES)

    assert converted.tolist() == [[6.0, 3.0], [-8.0, 4.0]]
    assert converted.dtype == np.float32


def test_triplets_keep_the_order_of_rows_and_negatives_in_ids_and_scores_alike() -> None:
    query_ids, passage_ids = triplet_ids(["q0", "q1"], [["x", "a", "b"], ["y", "c", "d"]])

    assert query_ids == ["q0", "q0", "q1", "q1"]
    assert passage_ids == [["x", "a"], ["x", "b"], ["y", "c"], ["y", "d"]]
    assert triplet_scores(SCORES).tolist() == [[8.0, 2.0], [8.0, 5.0], [1.0, 9.0], [1.0, -3.0]]


def test_margins_of_triplets_are_the_margins_of_the_rows() -> None:
    np.testing.assert_array_equal(margins(triplet_scores(SCORES)).reshape(2, 2), margins(SCORES))


def test_rows_without_a_negative_are_refused() -> None:
    for convert in (margins, triplet_scores):
        with pytest.raises(ValueError, match=r"at least one negative per row, found 1 passages; raise \[labels\] num_negatives"):
            convert(SCORES[:, :1])
    with pytest.raises(ValueError, match="triplets need a positive and at least one negative per row"):
        triplet_ids(["q0"], [["x"]])


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=30), st.integers(0, 3))
def test_a_positive_shares_the_anchors_class_and_a_negative_does_not(classes: list[str], seed: int) -> None:
    can_anchor = [place for place, name in enumerate(classes) if classes.count(name) > 1]
    if len(set(classes)) < 2 or not can_anchor:
        with pytest.raises(ValueError, match="expected two classes or more, one of them with two texts or more"):
            class_triplets(classes, seed)
        return

    triplets = class_triplets(classes, seed)

    assert triplets[:, 0].tolist() == can_anchor
    for anchor, positive, negative in triplets.tolist():
        assert positive != anchor
        assert classes[positive] == classes[anchor] != classes[negative]


def test_draws_are_seeded_and_reach_every_choice_equally() -> None:
    classes = ["a", "a", "a", "b", "b"] * 400

    triplets = class_triplets(classes, seed=1)

    assert triplets.tolist() == class_triplets(classes, seed=1).tolist()
    assert triplets.tolist() != class_triplets(classes, seed=2).tolist()
    drawn = np.bincount(triplets[:, 2] % 5, minlength=5)
    assert np.abs(drawn[:3] - 800 / 3).max() < 70  # the 800 of b, over the three places of a
    assert np.abs(drawn[3:] - 1200 / 2).max() < 100  # the 1200 of a, over the two places of b


def test_no_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 texts in 0 classes"):
        class_triplets([], seed=0)
