from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.labels.negatives import stratified

SCORES = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30)


@given(SCORES, st.integers(0, 2**32 - 1), st.data())
def test_stratified_gives_as_many_as_asked_each_once(scores: list[float], seed: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(scores)))
    draws = np.random.default_rng(seed).random(len(scores))

    places = stratified(np.array(scores), draws, number)

    assert len(places) == len(set(places)) == number
    assert set(places) <= set(range(len(scores)))


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_each_band_that_has_members_gives_one(number: int) -> None:
    random = np.random.default_rng(number)
    scores = random.normal(size=200)
    high, width = scores.max(), (scores.max() - scores.min()) / number

    places = stratified(scores, random.random(200), number)

    for band in range(number):
        top, bottom = high - band * width, high - (band + 1) * width
        members = {place for place, score in enumerate(scores) if bottom - 1e-12 <= score <= top + 1e-12}
        assert places[band] in members or not members


def test_an_empty_band_takes_what_is_nearest_to_its_centre() -> None:
    scores = np.array([10.0, 9.0, 8.9, 0.0])  # bands 10 to 6.67, 6.67 to 3.33 (centre 5), 3.33 to 0

    assert stratified(scores, np.array([0.0, 0.1, 0.2, 0.3]), 3) == [0, 2, 3]


def test_without_a_range_the_draws_decide() -> None:
    assert stratified(np.full(4, 2.5), np.array([0.9, 0.1, 0.5, 0.3]), 2) == [1, 3]
