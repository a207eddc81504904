"""Pairwise similarity against sentence-transformers' own."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from sparsekd.teachers.protocols import Similarity
from sparsekd.teachers.similarity import pairwise_similarity


@pytest.mark.parametrize("similarity", get_args(Similarity))
def test_pairwise_similarity_equals_sentence_transformers(similarity: Similarity) -> None:
    from sentence_transformers import SimilarityFunction

    generator = np.random.default_rng(0)
    left, right = (generator.normal(size=(50, 384)).astype(np.float32) for _ in range(2))
    left[3] = 0

    found = pairwise_similarity(similarity, left, right)

    expected = SimilarityFunction.to_similarity_pairwise_fn(similarity)(left, right).numpy()
    # Manhattan sums 384 absolute differences to about 430: 1e-6 relative.
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("similarity", get_args(Similarity))
def test_a_row_does_not_depend_on_the_rows_around_it(similarity: Similarity) -> None:
    generator = np.random.default_rng(0)
    left, right = (generator.normal(size=(50, 33)).astype(np.float32) for _ in range(2))

    whole = pairwise_similarity(similarity, left, right)

    parts = [pairwise_similarity(similarity, left[i : i + 7], right[i : i + 7]) for i in range(0, 50, 7)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal shapes; found \(1, 2\) and \(2, 2\)"):
        pairwise_similarity("dot", np.zeros((1, 2), np.float32), np.zeros((2, 2), np.float32))
