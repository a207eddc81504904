"""The bank of sparse vectors: what is found, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from sparsekd.bank import EmbeddingBank, text_keys
from sparsekd.bank.sparse import SparseBank
from sparsekd.bank.upkeep import bank_folders, find_damage, repair

IDENTITY = {"kind": "sparse", "role": "passage"}
WIDTH = 40


def vectors_of(numbers: np.ndarray, width: int = WIDTH) -> scipy.sparse.csr_matrix:
    """Return a vector per number, the same each time: every seventh is empty."""
    dense = np.zeros((len(numbers), width), dtype=np.float32)
    for row, number in enumerate(np.asarray(numbers)):
        if number % 7:
            dense[row, [number % width, (3 * number + 1) % width]] = number + 0.5
    return scipy.sparse.csr_matrix(dense)


def keys_of(numbers: np.ndarray) -> np.ndarray:
    return text_keys(f"text {number}" for number in numbers)


def test_vectors_come_back_in_the_order_asked(tmp_path: Path) -> None:
    bank = SparseBank(tmp_path).open(IDENTITY)
    for numbers in np.array_split(np.arange(100), 9):
        bank.append(keys_of(numbers), vectors_of(numbers))
    asked = np.random.default_rng(0).integers(-20, 120, 300)  # unknown ones and repeats

    found, vectors = SparseBank(tmp_path).open(IDENTITY).lookup(keys_of(asked))

    np.testing.assert_array_equal(found, (asked >= 0) & (asked < 100))
    np.testing.assert_array_equal(vectors.toarray(), vectors_of(asked[found]).toarray())
    np.testing.assert_array_equal(bank.known(keys_of(asked)), found)
    assert (bank.num_texts, bank.dimension, vectors.dtype) == (100, WIDTH, np.float32)
    assert len(list(bank.folder.glob("*.arrow"))) <= 4


def test_empty_bank_knows_nothing_and_creates_nothing(tmp_path: Path) -> None:
    bank = SparseBank(tmp_path / "bank").open(IDENTITY)

    found, vectors = bank.lookup(keys_of(np.arange(3)))

    assert not found.any()
    assert vectors.shape == (0, 0)
    assert bank.dimension is None
    assert not (tmp_path / "bank").exists()


def test_vectors_without_an_active_dim_are_kept(tmp_path: Path) -> None:
    bank, numbers = SparseBank(tmp_path).open(IDENTITY), np.array([0, 7, 14])
    bank.append(keys_of(numbers), vectors_of(numbers))

    found, vectors = SparseBank(tmp_path).open(IDENTITY).lookup(keys_of(numbers))

    assert found.all()
    assert (vectors.shape, vectors.nnz) == ((3, WIDTH), 0)


def test_first_vector_of_a_text_stays_through_merges(tmp_path: Path) -> None:
    bank, numbers = SparseBank(tmp_path).open(IDENTITY), np.arange(8)
    for add in range(5):
        bank.append(keys_of(numbers), vectors_of(numbers) * np.float32(1 + add))

    _, vectors = bank.lookup(keys_of(numbers))

    np.testing.assert_array_equal(vectors.toarray(), vectors_of(numbers).toarray())


def test_stored_zeros_and_the_order_of_indices_are_not_kept(tmp_path: Path) -> None:
    bank, keys = SparseBank(tmp_path).open(IDENTITY), keys_of(np.arange(1))
    given = scipy.sparse.csr_matrix((np.array([5, 0, 2], np.float32), np.array([9, 4, 1]), np.array([0, 3])), shape=(1, WIDTH))

    bank.append(keys, given)

    _, vectors = bank.lookup(keys)
    assert (vectors.indices.tolist(), vectors.data.tolist()) == ([1, 9], [2.0, 5.0])
    assert given.nnz == 3  # the caller's is left alone


def test_two_roles_never_share_a_vector(tmp_path: Path) -> None:
    keys = keys_of(np.arange(4))
    SparseBank(tmp_path).open(IDENTITY).append(keys, vectors_of(np.arange(4)))

    found, _ = SparseBank(tmp_path).open({**IDENTITY, "role": "query"}).lookup(keys)

    assert not found.any()


def test_it_lies_beside_the_bank_of_dense_vectors(tmp_path: Path) -> None:
    bank = EmbeddingBank(tmp_path).sparse.open(IDENTITY)
    bank.append(keys_of(np.arange(4)), vectors_of(np.arange(4)))

    assert bank.folder.parent == tmp_path / "sparse"
    assert bank_folders(tmp_path) == [bank.folder]


def test_a_damaged_segment_is_named_and_taken_out(tmp_path: Path) -> None:
    bank = SparseBank(tmp_path, max_segment_bytes=1).open(IDENTITY)
    for numbers in np.array_split(np.arange(1, 11), 2):
        bank.append(keys_of(numbers), vectors_of(numbers))
    segment = sorted(bank.folder.glob("*.arrow"))[0]
    segment.write_bytes(segment.read_bytes()[:-1])

    assert segment.name in find_damage(bank.folder)[0]
    assert repair(bank.folder).num_rows == 5
    assert SparseBank(tmp_path).open(IDENTITY).known(keys_of(np.arange(1, 11))).sum() == 5


def test_vectors_that_are_not_finite_are_refused_with_count_and_rows(tmp_path: Path) -> None:
    vectors = vectors_of(np.arange(1, 6)).tolil()
    vectors[1, 2], vectors[4, 0] = np.nan, -np.inf

    with pytest.raises(ValueError, match=r"2 of 5 vectors are NaN or infinite; nothing was stored \(first rows: 1, 4\)"):
        SparseBank(tmp_path).open(IDENTITY).append(keys_of(np.arange(5)), vectors.tocsr())


def test_another_dimension_is_refused(tmp_path: Path) -> None:
    bank = SparseBank(tmp_path).open(IDENTITY)
    bank.append(keys_of(np.arange(5)), vectors_of(np.arange(5)))

    with pytest.raises(ValueError, match="holds vectors of dimension 40, found 41"):
        bank.append(keys_of(np.arange(5)), vectors_of(np.arange(5), width=41))


def test_malformed_vectors_are_refused(tmp_path: Path) -> None:
    bank, keys = SparseBank(tmp_path).open(IDENTITY), keys_of(np.arange(3))

    with pytest.raises(ValueError, match=r"vectors: expected float32 \[3, V\], found float64 \[3, 40\]"):
        bank.append(keys, vectors_of(np.arange(3)).astype(np.float64))
    with pytest.raises(ValueError, match=r"found float32 \[2, 40\]"):
        bank.append(keys, vectors_of(np.arange(2)))
    with pytest.raises(ValueError, match="1 of 4 vectors are of a text that occurs twice"):
        bank.append(keys[[0, 1, 2, 0]], vectors_of(np.arange(4)))
