"""Order and batches of texts: longest first, a token budget per batch, halved where memory runs out. Imports no torch."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

BLOCK = 1024
"""Texts or pairs handed to a model at once: small enough for a progress line every half minute on two cores (40 pairs/s), large
enough that sorting by token length inside a block leaves about 1% padding."""


# SPLADE encoding of 128 passages of 92 tokens, MiniLM, one core of an EPYC with 1 MiB of L2, median CPU seconds of 4: 256 tokens
# 11.4, 512 10.5, 1024 10.3, 2048 10.1, 8192 11.5.
_CPU_TOKENS = 1024


def forward_tokens(batch_tokens: int, device_type: str) -> int:
    """Return the tokens of one forward pass on this kind of device, at most ``batch_tokens``.

    A CPU takes few, whose hidden states stay in its cache.

    >>> forward_tokens(8192, "cuda"), forward_tokens(8192, "cpu"), forward_tokens(64, "cpu")
    (8192, 1024, 64)
    """
    return min(batch_tokens, _CPU_TOKENS) if device_type == "cpu" else batch_tokens


def length_batches(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yield positions in batches whose padded size, count x longest, is at most ``batch_tokens``; a longer text goes alone.

    Longest first, so that a batch too large for the device shows at once; ties in input order, so batches are reproducible.

    >>> [batch.tolist() for batch in length_batches(np.array([2, 9, 3, 3]), 9)]
    [[1], [2, 3, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


class TokenBudget:
    """Tokens per forward pass; what did not fit once is not tried again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self, num_texts: int, longest: int, error: BaseException) -> None:
        """Halve after ``num_texts`` of up to ``longest`` tokens ran out of memory; MemoryError if it was one alone."""
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if num_texts == 1:
            raise MemoryError(
                f"out of memory on one text of {longest} tokens alone ({said}); lower max_length, or use a device with more memory"
            ) from error
        before, self.tokens = self.tokens, max(longest, num_texts * longest // 2)
        _log.warning("out of memory at %d tokens per forward pass; going on with %d (%s)", before, self.tokens, said)


def forward_batches(
    forward: Callable[[NDArray[np.int64]], Callable[[], NDArray[np.float32]]],
    lengths: NDArray[np.int64],
    budget: TokenBudget,
    done: Callable[[int], object],
) -> NDArray[np.float32]:
    """Return float32 [n]: the scores of texts of these lengths, batch by batch as ``length_batches``, in input order.

    ``forward`` takes positions, queues their work and returns what waits for their scores, so that a device is never waited for
    before it has the next batch. A batch that runs out of memory is made again under half the budget. ``done`` is told how many.
    """
    scores = np.empty(len(lengths), dtype=np.float32)
    order = np.argsort(-lengths, kind="stable")
    queued: deque[tuple[NDArray[np.int64], Callable[[], NDArray[np.float32]]]] = deque()
    start = 0
    while start < len(order) or queued:
        if start < len(order):
            longest = int(lengths[order[start]])
            batch = order[start : start + max(1, budget.tokens // max(1, longest))]
            try:
                queued.append((batch, forward(batch)))
                start += len(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                budget.halve(len(batch), longest, error)
        if len(queued) > 1 or (queued and start == len(order)):
            batch, scores_of_batch = queued.popleft()
            scores[batch] = scores_of_batch()
            done(len(batch))
    return scores


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether this is how Python, torch (host or CUDA) or OpenVINO says that memory ran out.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")), is_out_of_memory(RuntimeError("shapes"))
    (True, False)
    """
    marks = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in marks)


def made_ahead(make: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """Yield ``make`` of each item in order, the next one made by a background thread while the last is in use.

    The first is made by the caller's thread, which has nothing else to do yet; two are alive at a time.
    """
    remaining = iter(items)
    made = [make(item) for item in itertools.islice(remaining, 1)]
    with ThreadPoolExecutor(max_workers=1) as thread:
        while made:
            coming = [thread.submit(make, item) for item in itertools.islice(remaining, 1)]
            yield made.pop()
            made = [future.result() for future in coming]
