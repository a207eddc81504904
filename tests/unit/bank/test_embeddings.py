from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsekd.bank import EmbeddingBank, embeddings, text_keys

IDENTITY = {"kind": "dense", "role": "passage"}


def vectors_of(numbers: np.ndarray, dimension: int = 6) -> np.ndarray:
    """Return a vector per number, the same each time."""
    return (np.asarray(numbers)[:, None] * 10 + np.arange(dimension)).astype(np.float32)


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """Return a key per number."""
    return text_keys(f"text {number}" for number in numbers)


@pytest.mark.parametrize("block_bytes", [24, 1 << 26])
def test_vectors_come_back_in_the_order_asked(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_BYTES_PER_BLOCK", block_bytes)
    bank = EmbeddingBank(tmp_path).open(IDENTITY)
    for numbers in np.array_split(np.arange(100), 9):
        bank.append(keys_of(numbers), vectors_of(numbers))
    asked = np.random.default_rng(0).integers(-20, 120, 300)  # unknown ones and repeats

    found, vectors = EmbeddingBank(tmp_path).open(IDENTITY).lookup(keys_of(asked))

    np.testing.assert_array_equal(found, (asked >= 0) & (asked < 100))
    np.testing.assert_array_equal(vectors, vectors_of(asked[found]))
    np.testing.assert_array_equal(bank.known(keys_of(asked)), found)
    assert (bank.num_texts, bank.dimension) == (100, 6)
    assert len(list(bank.folder.glob("*.arrow"))) <= 4


def test_empty_bank_knows_nothing_and_creates_nothing(tmp_path: Path) -> None:
    bank = EmbeddingBank(tmp_path / "bank").open(IDENTITY)

    found, vectors = bank.lookup(keys_of(np.arange(3)))

    assert not found.any()
    assert vectors.shape == (0, 0)
    assert bank.dimension is None
    assert not (tmp_path / "bank").exists()


def test_first_vector_of_a_text_stays_through_merges(tmp_path: Path) -> None:
    bank, keys = EmbeddingBank(tmp_path).open(IDENTITY), keys_of(np.arange(8))
    for add in range(5):
        bank.append(keys, vectors_of(np.arange(8)) + np.float32(add))

    _, vectors = bank.lookup(keys)

    np.testing.assert_array_equal(vectors, vectors_of(np.arange(8)))


def test_two_encoders_never_share_a_vector(tmp_path: Path) -> None:
    keys = keys_of(np.arange(4))
    EmbeddingBank(tmp_path).open(IDENTITY).append(keys, vectors_of(np.arange(4)))

    found, _ = EmbeddingBank(tmp_path).open({**IDENTITY, "role": "query"}).lookup(keys)

    assert not found.any()


def test_vectors_that_are_not_finite_are_refused_with_count_and_rows(tmp_path: Path) -> None:
    vectors = vectors_of(np.arange(5))
    vectors[1, 2], vectors[4, 0] = np.nan, -np.inf

    with pytest.raises(ValueError, match=r"2 of 5 vectors are NaN or infinite; nothing was stored \(first rows: 1, 4\)"):
        EmbeddingBank(tmp_path).open(IDENTITY).append(keys_of(np.arange(5)), vectors)


def test_another_dimension_is_refused(tmp_path: Path) -> None:
    bank = EmbeddingBank(tmp_path).open(IDENTITY)
    bank.append(keys_of(np.arange(5)), vectors_of(np.arange(5)))

    with pytest.raises(ValueError, match="holds vectors of dimension 6, found 7"):
        bank.append(keys_of(np.arange(5)), vectors_of(np.arange(5), dimension=7))


def test_malformed_vectors_are_refused(tmp_path: Path) -> None:
    bank, keys = EmbeddingBank(tmp_path).open(IDENTITY), keys_of(np.arange(3))

    with pytest.raises(ValueError, match=r"vectors: expected float32 \[3, D\], found float64 \[3, 6\]"):
        bank.append(keys, vectors_of(np.arange(3)).astype(np.float64))
    with pytest.raises(ValueError, match=r"found float32 \[2, 6\]"):
        bank.append(keys, vectors_of(np.arange(2)))
    with pytest.raises(ValueError, match="1 of 4 vectors are of a text that occurs twice"):
        bank.append(keys[[0, 1, 2, 0]], vectors_of(np.arange(4)))
