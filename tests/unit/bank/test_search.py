from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from sparsekd.bank.search import find_keys, find_keys_within

Words = npt.NDArray[np.uint64]


def crafted(seed: int, num_keys: int, num_values: int) -> tuple[Words, Words]:
    """Return distinct sorted keys whose first words repeat a lot, with the extremes of the range among them."""
    generator = np.random.default_rng(seed)
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    values = np.concatenate((generator.integers(0, 2**64 - 1, num_values, dtype=np.uint64), extremes))
    keys = np.unique(values[generator.integers(0, len(values), (num_keys, 2))], axis=0)
    return keys[:, 0].copy(), keys[:, 1].copy()


@pytest.mark.parametrize("seed", range(8))
def test_search_agrees_with_a_dictionary_when_first_words_collide(seed: int) -> None:
    first, second = crafted(seed, num_keys=200, num_values=12)
    place = {pair: position for position, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True))}
    asked_first, asked_second = np.random.default_rng(seed).choice(first, (2, 500))

    found = find_keys(first, second, asked_first, asked_second)

    expected = [place.get(pair, -1) for pair in zip(asked_first.tolist(), asked_second.tolist(), strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("seed", range(8))
def test_search_within_a_range_never_answers_from_a_neighbouring_range(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 40, 30)  # empty ranges too
    parts = [crafted(seed * 100 + number, num_keys=size, num_values=5) for number, size in enumerate(sizes)]
    stops = np.cumsum([len(part[0]) for part in parts])
    starts = np.concatenate(([0], stops[:-1]))
    first, second = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = generator.integers(0, len(first), 600)
    ranges = generator.integers(0, len(sizes), 600)

    found = find_keys_within(first, second, starts[ranges], stops[ranges], first[rows], second[rows])

    for number, row, position in zip(ranges, rows, found, strict=True):
        part = range(starts[number], stops[number])
        expected = [place for place in part if (first[place], second[place]) == (first[row], second[row])]
        assert position == (expected[0] if expected else -1)


def test_search_in_nothing_finds_nothing() -> None:
    empty, asked = np.empty(0, np.uint64), np.array([0, 2**64 - 1], np.uint64)

    assert find_keys(empty, empty, asked, asked).tolist() == [-1, -1]
    assert find_keys(asked, asked, empty, empty).tolist() == []
