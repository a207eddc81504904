"""Pairwise similarity of float32 rows, as sentence-transformers defines it, in numpy: scoring banked vectors needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsekd.teachers.protocols import Similarity

Vectors = NDArray[np.float32]


def pairwise_similarity(similarity: Similarity, left_ND: Vectors, right_ND: Vectors) -> Vectors:
    """Return float32 [N]: similarity of row i of both sides; euclidean and manhattan are negated distances.

    A row's result does not depend on the rows around it. A zero vector has cosine 0 with everything.

    >>> rows = np.array([[3.0, 4.0]], dtype=np.float32)
    >>> [pairwise_similarity(kind, rows, 2 * rows).item() for kind in ("dot", "euclidean", "manhattan")]
    [50.0, -5.0, -7.0]
    """
    if left_ND.shape != right_ND.shape:
        raise ValueError(f"pairwise similarity needs equal shapes; found {left_ND.shape} and {right_ND.shape}")
    if similarity == "euclidean":
        return np.asarray(-np.sqrt(np.square(left_ND - right_ND).sum(axis=1)), dtype=np.float32)
    if similarity == "manhattan":
        return np.asarray(-np.abs(left_ND - right_ND).sum(axis=1), dtype=np.float32)
    dot_N = np.vecdot(left_ND, right_ND)
    if similarity == "cosine":
        # 1e-12: the floor of torch.nn.functional.normalize, so both agree on zero vectors.
        dot_N = dot_N / (_norm(left_ND) * _norm(right_ND))
    return np.asarray(dot_N, dtype=np.float32)


def _norm(rows_ND: Vectors) -> Vectors:
    return np.asarray(np.maximum(np.sqrt(np.vecdot(rows_ND, rows_ND)), np.float32(1e-12)), dtype=np.float32)
