"""Exact search over sparse vectors: the postings of a query's terms added up, passage by passage.

Every passage that shares an active dim with the query is scored, and only scores above 0 are found. A pair's score is summed in
float32 in the order of the query's dims, so it depends on that pair alone. Costs 4 bytes per passage of a block at a time, and time
by the postings of the query's terms.
Q queries, P passages, V vocabulary, K search depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.ranking import NONE, Positions, Scores, best_first, empty_block, id_ranks

if TYPE_CHECKING:
    import scipy.sparse

_GROUP = 32  # passages of which the largest score alone bounds the K-th best: 65,536 passages still have 2,048 groups


class SparseIndex:
    """Passage vectors, CSR float32 [P, V], ready to be searched; holds a transposed copy."""

    def __init__(self, passage_csr: scipy.sparse.csr_matrix, passage_ids: Sequence[str]) -> None:
        self._passages_VP = passage_csr.T.tocsr()
        self._id_rank = id_ranks(passage_ids)

    def search_positions(self, query_csr: scipy.sparse.csr_matrix, depth: int) -> tuple[Positions, Scores]:
        """Return int32 [Q, K] positions (-1 filler) and float32 [Q, K] dot products, K = min(depth, P)."""
        best = empty_block(query_csr.shape[0], min(depth, len(self._id_rank)))
        search_postings(self._passages_VP, 0, query_csr, self._id_rank, best)
        return best


def search_postings(
    passages_VP: scipy.sparse.csr_matrix,
    first: int,
    query_csr: scipy.sparse.csr_matrix,
    id_rank: Positions,
    best: tuple[Positions, Scores],
) -> None:
    """Merge what queries, CSR float32 [Q, V], find in a block of passages into ``best``, [Q, K] of each, in place.

    ``passages_VP`` are the block's postings, float32 CSR [V, passages of the block], whose first passage has position ``first`` in
    ``id_rank``, int32 [P]. After the last block ``best`` is what one search over all passages gives, however they were divided.
    """
    positions_QK, scores_QK = best
    depth = positions_QK.shape[1]
    for row in range(query_csr.shape[0] if depth else 0):
        part = slice(query_csr.indptr[row], query_csr.indptr[row + 1])
        # The postings of the query's terms alone, copied: half the time of a sparse product, which looks at each twice.
        scores_P = passages_VP[query_csr.indices[part]].T @ query_csr.data[part]
        hits = _contenders(scores_P, depth, scores_QK[row, -1])
        if not hits.size:
            continue
        kept = positions_QK[row] != NONE
        positions = np.concatenate((positions_QK[row, kept], hits + first))
        scores = np.concatenate((scores_QK[row, kept], scores_P[hits]))
        found, found_scores = best_first(positions, scores, id_rank, depth)
        positions_QK[row, : len(found)], scores_QK[row, : len(found)] = found, found_scores


def sparse_pair_scores(query_csr: scipy.sparse.csr_matrix, passage_csr: scipy.sparse.csr_matrix) -> Scores:
    """Return float32 [n]: dot products of one query, CSR [1, V], with passages, CSR [n, V], bit-equal to the search's."""
    return np.asarray((query_csr @ passage_csr.T.tocsr()).toarray()[0], dtype=np.float32)


def _contenders(scores_P: Scores, depth: int, weakest: np.float32) -> NDArray[Any]:
    """Return positions of scores above 0 that can be among the ``depth`` best, these all, ties with the last included.

    ``weakest`` is the depth-th best score known, 0 if there are fewer. Of groups of passages, the depth-th largest maximum is no
    larger than the depth-th best score, and takes no sorting of all scores to know.
    """
    num_groups = len(scores_P) // _GROUP
    floor = weakest
    if num_groups > depth:
        maxima = scores_P[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
        floor = max(floor, np.partition(maxima, num_groups - depth)[num_groups - depth])
    return np.flatnonzero(scores_P >= floor if floor > 0 else scores_P > 0)
