"""Ranked lists as arrays: the one order every miner uses, score descending, then passage_id ascending.

Positions index the passages in collection order. A block of ranked lists is int32 [Q, K] positions, -1 where a query has
fewer than K, and float32 [Q, K] scores; ``to_ids`` is the border where -1 disappears.
Q queries, P passages, K search depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int32]
Scores = NDArray[np.float32]

NONE = -1


def id_ranks(passage_ids: Sequence[str]) -> Positions:
    """Return int32 [P]: where each passage_id stands in ascending order, so that ties cost an integer comparison."""
    order = sorted(range(len(passage_ids)), key=passage_ids.__getitem__)
    ranks = np.empty(len(passage_ids), dtype=np.int32)
    ranks[order] = np.arange(len(passage_ids), dtype=np.int32)
    return ranks


def best_first(positions: NDArray[Any], scores: Scores, id_rank: Positions, depth: int) -> tuple[Positions, Scores]:
    """Return the ``depth`` best of one query's hits, score descending, ties by passage_id, the tie at the cut included."""
    if len(scores) > depth:
        weakest = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        kept = np.flatnonzero(scores >= weakest)
        positions, scores = positions[kept], scores[kept]
    order = np.lexsort((id_rank[positions], -scores))[:depth]
    return positions[order].astype(np.int32), scores[order]


def empty_block(num_queries: int, depth: int) -> tuple[Positions, Scores]:
    """Return a block in which no query has found anything yet."""
    return np.full((num_queries, depth), NONE, dtype=np.int32), np.zeros((num_queries, depth), dtype=np.float32)


def merged(
    left: tuple[Positions, Scores], right: tuple[Positions, Scores], id_rank: Positions, depth: int
) -> tuple[Positions, Scores]:
    """Return the ``depth`` best of two blocks over different passages of one collection, in the one order; fillers go last.

    What one search over all of the passages would give, if each block holds the best ``depth`` of its own.
    """
    positions_QK = np.concatenate((left[0], right[0]), axis=1)
    scores_QK = np.concatenate((left[1], right[1]), axis=1)
    is_filler = positions_QK == NONE
    rank_QK = np.where(is_filler, np.iinfo(np.int32).max, id_rank[positions_QK])
    order = np.lexsort((rank_QK, np.where(is_filler, np.inf, -scores_QK)), axis=-1)[:, :depth]
    return np.take_along_axis(positions_QK, order, axis=1), np.take_along_axis(scores_QK, order, axis=1)


def to_ids(positions_QK: Positions, scores_QK: Scores, passage_ids: Sequence[str]) -> tuple[list[list[str]], list[Scores]]:
    """Return each query's passage_ids and float32 scores, without the filler."""
    ids, scores = [], []
    for row, row_scores in zip(positions_QK, scores_QK, strict=True):
        found = row != NONE
        ids.append([passage_ids[position] for position in row[found].tolist()])
        scores.append(row_scores[found])
    return ids, scores
