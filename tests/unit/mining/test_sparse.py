from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from sparsekd.mining.ranking import NONE
from sparsekd.mining.sparse import SparseIndex, sparse_pair_scores


def vectors(rows: int, seed: int, dims: int = 40) -> scipy.sparse.csr_matrix:
    random = np.random.default_rng(seed)
    dense = random.random((rows, dims)) * (random.random((rows, dims)) < 0.2)
    dense[rows // 2 : rows // 2 + 10] = dense[rows // 2]  # equal scores go by passage_id
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


@pytest.mark.parametrize("depth", [1, 5, 300])
def test_search_equals_brute_force_to_the_id(depth: int) -> None:
    queries, passages = vectors(20, 0), vectors(200, 1)
    passage_ids = [f"p{row}" for row in range(200)][::-1]

    positions_QK, scores_QK = SparseIndex(passages, passage_ids).search_positions(queries, depth)

    scores = queries.toarray().astype(np.float64) @ passages.toarray().astype(np.float64).T
    for row in range(20):
        hits = np.flatnonzero(scores[row] > 0)
        order = sorted(hits.tolist(), key=lambda position: (-scores[row, position].round(6), passage_ids[position]))[:depth]
        found = positions_QK[row] != NONE
        assert positions_QK[row][found].tolist() == order
        np.testing.assert_allclose(scores_QK[row][found], scores[row, order], rtol=1e-5)


def test_pair_scores_are_bit_equal_to_search_and_0_without_a_common_dim() -> None:
    queries, passages = vectors(5, 2), vectors(100, 3)
    positions_QK, scores_QK = SparseIndex(passages, [f"p{row}" for row in range(100)]).search_positions(queries, 100)

    for row in range(5):
        found = positions_QK[row] != NONE
        np.testing.assert_array_equal(sparse_pair_scores(queries[row], passages[positions_QK[row][found]]), scores_QK[row][found])
        missed = np.setdiff1d(np.arange(100), positions_QK[row])
        assert (sparse_pair_scores(queries[row], passages[missed]) == 0).all()


def test_a_query_does_not_change_what_another_finds() -> None:
    queries, index = vectors(30, 4), SparseIndex(vectors(80, 5), [f"p{row}" for row in range(80)])

    together, alone = index.search_positions(queries, 7), index.search_positions(queries[11:12], 7)

    np.testing.assert_array_equal(together[0][11], alone[0][0])
    np.testing.assert_array_equal(together[1][11], alone[1][0])
