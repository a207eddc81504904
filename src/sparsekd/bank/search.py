"""Exact search for 128-bit keys in sorted arrays, whole blocks of questions at a time.

Keys are two uint64 words, sorted by first, then second word. The first word finds the place, both words decide: a hit is
never a hash of a hash. Costs about 0.1 µs a question while questions come in the order of the keys, ten times that
otherwise (cache misses), which is why callers sort their questions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsekd.bank.text_key import Words

Positions = npt.NDArray[np.int64]


def are_ascending(first: Words, second: Words) -> bool:
    """Say whether the keys (first, second) are sorted and distinct, as ``find_keys`` needs them."""
    before, after = first[:-1], first[1:]
    return bool(((before < after) | ((before == after) & (second[:-1] < second[1:]))).all())


def find_keys(first: Words, second: Words, asked_first: Words, asked_second: Words) -> Positions:
    """Return where each asked key stands in the sorted keys (first, second), -1 where it does not."""
    position = np.searchsorted(first, asked_first).astype(np.int64)
    stop = np.full(len(position), len(first), dtype=np.int64)
    return _match(first, second, position, stop, asked_first, asked_second)


def find_keys_within(
    first: Words, second: Words, start: Positions, stop: Positions, asked_first: Words, asked_second: Words
) -> Positions:
    """Return where each asked key stands inside its own sorted range [start, stop), -1 where it does not."""
    position = _first_at_least(first, start, stop, asked_first)
    return _match(first, second, position, stop, asked_first, asked_second)


def _first_at_least(values: Words, start: Positions, stop: Positions, asked: Words) -> Positions:
    """Bisect all ranges at once: the first position in [start, stop) whose value is >= asked, stop if there is none."""
    position, size = start.copy(), stop - start
    if not size.size or not len(values):
        return position
    while size.max() > 1:
        half = size >> 1
        # A range already down to 1 has half 0 and stays; its probe may be -1, which wraps and is multiplied away.
        position += half * (values.take(position + half - 1, mode="wrap") < asked)
        size -= half
    position += (size > 0) & (values.take(position, mode="wrap") < asked)
    return position


def _match(
    first: Words, second: Words, position: Positions, stop: Positions, asked_first: Words, asked_second: Words
) -> Positions:
    """Compare both words at ``position``; where only the first agrees, try the next entry (once in 2^64 for digests)."""
    if not len(first):
        return np.full(len(position), -1, dtype=np.int64)
    same = (position < stop) & (first.take(position, mode="clip") == asked_first)
    hit = same & (second.take(position, mode="clip") == asked_second)
    found = np.where(hit, position, -1)
    again = np.flatnonzero(same & ~hit)
    if again.size:
        found[again] = _match(first, second, position[again] + 1, stop[again], asked_first[again], asked_second[again])
    return found
