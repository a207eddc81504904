"""Token-budget batches."""

from __future__ import annotations

import numpy as np
import pytest

from sparsekd.teachers.batching import length_batches
from sparsekd.teachers.keys import unique_keys


@pytest.mark.parametrize("batch_tokens", [1, 16, 100, 4096])
def test_batches_cover_every_text_once_within_the_budget(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 128, size=300)

    batches = list(length_batches(lengths, batch_tokens))

    assert sorted(np.concatenate(batches)) == list(range(300))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= batch_tokens for batch in batches)


def test_batches_are_longest_first_with_ties_in_input_order() -> None:
    assert [batch.tolist() for batch in length_batches(np.array([5, 7, 5, 7, 1]), 10)] == [[1], [3], [0, 2], [4]]


def test_no_texts_give_no_batches() -> None:
    assert list(length_batches(np.empty(0, dtype=np.int64), 10)) == []


def test_unique_keys_are_sorted_and_lead_back() -> None:
    keys = np.random.default_rng(0).integers(0, 3, size=(100, 2)).astype(np.uint64)

    unique, first, inverse = unique_keys(keys)

    rows = [tuple(row) for row in keys.tolist()]
    assert [tuple(row) for row in unique.tolist()] == sorted(set(rows))
    assert first.tolist() == [rows.index(tuple(row)) for row in unique.tolist()]
    assert (unique[inverse] == keys).all()
