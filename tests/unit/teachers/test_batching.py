"""Token-budget batches."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from sparsekd.teachers.batching import TokenBudget, forward_batches, length_batches, made_ahead
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


def word_counts(lengths: np.ndarray) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
    """A forward whose score of a text is its length."""
    return lambda batch: lambda: lengths[batch].astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_forward_batches_gives_scores_in_input_order_and_tells_of_each(tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 128, size=300)
    told: list[int] = []

    scores = forward_batches(word_counts(lengths), lengths, TokenBudget(tokens), told.append)

    assert scores.tolist() == lengths.tolist()
    assert sum(told) == 300


def test_forward_batches_are_length_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 128, size=100)
    batches: list[list[int]] = []

    def forward(batch: np.ndarray) -> Callable[[], np.ndarray]:
        batches.append(batch.tolist())
        return word_counts(lengths)(batch)

    forward_batches(forward, lengths, TokenBudget(500), lambda _: None)

    assert batches == [batch.tolist() for batch in length_batches(lengths, 500)]


def test_the_next_batch_is_queued_before_scores_are_waited_for() -> None:
    events: list[str] = []

    def forward(batch: np.ndarray) -> Callable[[], np.ndarray]:
        events.append(f"queue {batch[0]}")
        return lambda: (events.append(f"wait {batch[0]}"), np.zeros(1, dtype=np.float32))[1]

    forward_batches(forward, np.array([1, 1, 1]), TokenBudget(1), lambda _: None)

    assert events == ["queue 0", "queue 1", "wait 0", "queue 2", "wait 1", "wait 2"]


def test_the_next_item_is_made_while_the_last_is_in_use() -> None:
    made = [threading.Event() for _ in range(3)]
    threads: list[str] = []

    def make(number: int) -> int:
        threads.append(threading.current_thread().name)
        made[number].set()
        return number

    used = []
    for number in made_ahead(make, range(3)):
        assert number == 2 or made[number + 1].wait(timeout=30)
        used.append(number)

    assert used == [0, 1, 2]
    assert threads[0] == threading.current_thread().name
    assert threading.current_thread().name not in threads[1:]


def test_what_goes_wrong_while_making_ahead_is_raised_after_what_was_made() -> None:
    made = made_ahead(lambda number: 1 // (1 - number), [0, 1, 0])

    assert next(made) == 1
    with pytest.raises(ZeroDivisionError):
        next(made)
