"""A small collection, a recipe for it, and teachers that count words and remember what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection
from sparsekd.recipe import Recipe

PASSAGES = {
    "p0": "the cat and the dog",
    "p1": "a cat",
    "p2": "a cat",  # the text of p1
    "p3": "river and mountain",
    "p4": "a dog on a bridge",
    "p5": "snow on the mountain",
}
QUERIES = {"q0": "cat and dog", "q1": "mountain snow", "q2": "xylem", "t0": "bridge"}
QRELS = {"train": {"t0": {"p4": 1}}, "test": {"q0": {"p0": 2}, "q1": {"p5": 1}, "q2": {"p3": 1}}, "dev": {}}


class WordCounter:
    """An Encoder and a Scorer: vectors count six words, a pair's score is the number of words of one in the other."""

    WORDS = ("cat", "dog", "mountain", "snow", "bridge", "river")
    similarity: Any = "dot"
    dimension = len(WORDS)
    num_truncated = 0
    reference = "a fake"

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"kind": "words", "query_prompt": "", "passage_prompt": ""}
        self.asked: list[Any] = []

    def encode(self, texts: Sequence[str], *, role: str) -> NDArray[np.float32]:
        self.asked += texts
        return np.array([[text.split().count(word) for word in self.WORDS] for text in texts], dtype=np.float32)

    def score_vectors(self, query_vectors: NDArray[np.float32], passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.vecdot(query_vectors, passage_vectors)

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        self.asked += pairs
        return np.array([len({*query.split()} & {*passage.split()}) for query, passage in pairs], dtype=np.float32)


@pytest.fixture
def word_counter() -> WordCounter:
    return WordCounter()


@pytest.fixture(scope="session")
def collection() -> Collection:
    return Collection(PASSAGES, QUERIES, QRELS, {})


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """Return ``make(**evaluation)``: a recipe with that [evaluation] section."""

    def make(**evaluation: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "collection": {"path": "data/animals"},
                "mining": {"miners": [{"kind": "bm25", "quota": 4}]},
                "teachers": [{"name": "c", "kind": "cross-encoder", "model": "somewhere"}],
                "student": {"model": "somewhere"},
                "evaluation": evaluation,
            }
        )

    return make
