"""A small collection with everything policy must see: duplicates, several positives, a query no miner can answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection
from sparsekd.mining.candidates import COLLECTION_FILES, candidates_fields, has_identity
from sparsekd.recipe import Recipe, RunMiner

PASSAGES = {
    "p0": "the cat sat on the mat",
    "p1": "a cat and a dog",
    "p2": "dogs chase cats in the garden",
    "p3": "the cat sat on the mat",  # the text of p0
    "p4": "stock markets fell on monday",
    "p5": "markets and gardens of the city",
    "p6": "a dog and a garden",
    "p7": "dogs chase cats in the garden",  # the text of p2
    "p8": "monday is a day of the week",
}
QUERIES = {"q0": "cat on a mat", "q1": "dog in the garden", "q2": "markets on monday", "q3": "zzz"}
TRAIN = {"q0": {"p0": 2, "p1": 1}, "q1": {"p6": 1, "p4": 0}, "q2": {"p4": 1}, "q3": {"p8": 1}}


class WordVectors:
    """A VectorSource: counts of ten words, so that vectors follow from texts alone."""

    WORDS = ("cat", "cats", "dog", "dogs", "garden", "gardens", "mat", "markets", "monday", "the")

    def __init__(self, similarity: str = "dot") -> None:
        self.asked: list[tuple[str, int]] = []
        self._similarity: Any = similarity

    def similarity(self, spec: Any) -> Any:
        return self._similarity

    def vectors(self, spec: Any, texts: Sequence[str], role: Any) -> NDArray[np.float32]:
        self.asked.append((role, len(texts)))
        counts = [[text.split().count(word) + 0.1 for word in self.WORDS] for text in texts]
        return np.array(counts, dtype=np.float32)

    def sparse_vectors(self, spec: Any, texts: Sequence[str], role: Any) -> Any:
        import scipy.sparse

        self.asked.append((role, len(texts)))
        counts = [[text.split().count(word) for word in self.WORDS] for text in texts]
        return scipy.sparse.csr_matrix(np.array(counts, dtype=np.float32))


@pytest.fixture
def collection() -> Collection:
    return Collection(dict(PASSAGES), dict(QUERIES), {"train": {query: dict(rows) for query, rows in TRAIN.items()}}, {})


@pytest.fixture
def word_vectors() -> type[WordVectors]:
    return WordVectors


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Return ``make(mining, **sections)``: a valid recipe around a mining section."""

    def make(mining: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        document: dict[str, Any] = {
            "collection": {"path": "somewhere"},
            "mining": mining or {"miners": [{"kind": "bm25", "quota": 3, "depth": 5}]},
            "teachers": [{"name": "judge", "kind": "cross-encoder", "model": "some/model"}],
            "labels": {"num_negatives": 1},
            "student": {"model": "some/student"},
        }
        return Recipe.model_validate({**document, **sections})

    return make


@pytest.fixture
def fields_of() -> Callable[..., dict[str, Any]]:
    """Return ``fields(recipe, collection, encoder)``: what keys candidates over a collection that no file holds."""

    def fields(recipe: Recipe, collection: Collection, encoder: str = "") -> dict[str, Any]:
        content = hashlib.sha256(repr(collection).encode()).hexdigest()
        identities = [
            {"is": Path(miner.path).read_text(encoding="utf-8") if isinstance(miner, RunMiner) else encoder}
            for miner in recipe.mining.asked
            if has_identity(miner)
        ]
        return candidates_fields(recipe, dict.fromkeys(COLLECTION_FILES, content), identities)

    return fields
