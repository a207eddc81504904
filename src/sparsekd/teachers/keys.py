"""Unique 128-bit text keys, sorted, with the way back. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unique_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the sorted unique rows of [n, 2], the position of each one's first occurrence, and each input's unique row.

    >>> unique, first, inverse = unique_keys(np.array([[7, 1], [3, 9], [7, 1]], dtype=np.uint64))
    >>> unique.tolist(), first.tolist(), inverse.tolist()
    ([[3, 9], [7, 1]], [1, 0], [1, 0, 1])
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(keys), dtype=np.int64)
    inverse[order] = np.cumsum(is_new) - 1
    return ordered[is_new], order[is_new], inverse  # lexsort is stable, so the first of equal rows is the earliest
