"""Rows of vectors, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from sparsekd.engines.vectors import Vectors


def csr(rows: list[list[float]]) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix(np.array(rows, dtype=np.float32))


def test_rows_come_with_their_ids_across_blocks() -> None:
    vectors = Vectors(["a", "b", "c"], [csr([[0, 2, 0], [0, 0, 0]]), csr([[3, 0, 1]])])

    found = [(row.text_id, row.dims.tolist(), row.weights.tolist()) for row in vectors.rows(3)]

    assert found == [("a", [1], [2]), ("b", [], []), ("c", [0, 2], [3, 1])]


def test_stored_zeros_are_no_active_dims() -> None:
    block = scipy.sparse.csr_matrix((np.array([0, 1], np.float32), np.array([2, 0], np.int32), np.array([0, 2])), shape=(1, 3))

    (row,) = Vectors(["a"], [block]).rows(3)

    assert (row.dims.tolist(), row.weights.tolist()) == ([0], [1])
    assert block.nnz == 2  # the caller's block is left alone


@pytest.mark.parametrize(("weight", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-0.5, "-0.5")])
def test_a_weight_that_no_inverted_index_holds_is_refused(weight: float, shown: str) -> None:
    vectors = Vectors(["a", "b", "c"], [csr([[1, 0]]), csr([[0, 1], [0, weight]])])

    with pytest.raises(ValueError, match=rf"text 'c': 1 weights of its block are not finite or below 0 \(first: {shown}\)"):
        list(vectors.rows(2))


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vectors of 2 dims for an index of 3: they are another student's"):
        list(Vectors(["a"], [csr([[1, 0]])]).rows(3))


@pytest.mark.parametrize(("ids", "message"), [(["a"], "more rows than the 1 ids"), (["a", "b", "c"], "2 rows for 3 ids")])
def test_another_number_of_rows_than_ids_is_refused(ids: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Vectors(ids, [csr([[1, 0], [0, 1]])]).rows(2))
