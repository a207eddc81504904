"""Exact search over sparse vectors: a product of scipy CSR matrices, query block by query block.

Every passage that shares an active dim with the query is scored, and only scores above 0 are found. A pair's score is summed in
the order of the query's dims, so it depends on that pair alone. Costs a few float32 per passage for each query of a block.
Q queries, P passages, V vocabulary, K search depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsekd.mining.ranking import Positions, Scores, best_first, empty_block, id_ranks

if TYPE_CHECKING:
    import scipy.sparse

_BLOCK_SCORES = 1 << 24  # scores of a block of queries over all passages: at most 8 bytes each, 134 MB


class SparseIndex:
    """Passage vectors, CSR float32 [P, V], ready to be searched; holds a transposed copy."""

    def __init__(self, passage_csr: scipy.sparse.csr_matrix, passage_ids: Sequence[str]) -> None:
        self._passages_VP = passage_csr.T.tocsr()  # once: a product with the transposed view would convert it for every block
        self._id_rank = id_ranks(passage_ids)

    def search_positions(self, query_csr: scipy.sparse.csr_matrix, depth: int) -> tuple[Positions, Scores]:
        """Return int32 [Q, K] positions (-1 filler) and float32 [Q, K] dot products, K = min(depth, P)."""
        num_passages = len(self._id_rank)
        positions_QK, scores_QK = empty_block(query_csr.shape[0], min(depth, num_passages))
        block = max(1, _BLOCK_SCORES // max(1, num_passages))
        for start in range(0, query_csr.shape[0], block):
            scores_QP = query_csr[start : start + block] @ self._passages_VP
            for row in range(scores_QP.shape[0]):
                part = slice(scores_QP.indptr[row], scores_QP.indptr[row + 1])
                hits, scores = scores_QP.indices[part], scores_QP.data[part]
                is_match = scores > 0
                best, best_scores = best_first(hits[is_match], scores[is_match], self._id_rank, depth)
                positions_QK[start + row, : len(best)], scores_QK[start + row, : len(best)] = best, best_scores
        return positions_QK, scores_QK


def sparse_pair_scores(query_csr: scipy.sparse.csr_matrix, passage_csr: scipy.sparse.csr_matrix) -> Scores:
    """Return float32 [n]: dot products of one query, CSR [1, V], with passages, CSR [n, V], bit-equal to the search's."""
    return np.asarray((query_csr @ passage_csr.T.tocsr()).toarray()[0], dtype=np.float32)
