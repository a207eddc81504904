"""The two things a teacher can be: an Encoder of texts and a Scorer of pairs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Role = Literal["query", "passage"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]


class Encoder(Protocol):
    """Turns texts into vectors; its identity holds ``query_prompt`` and ``passage_prompt``."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that can change a vector, JSON-able; the key of the embedding bank."""

    @property
    def reference(self) -> str:
        """What people call the model; decides nothing."""

    @property
    def similarity(self) -> Similarity:
        """The model's own similarity of two vectors."""

    @property
    def dimension(self) -> int:
        """Width D of a vector; loads the model."""

    @property
    def num_truncated(self) -> int:
        """Texts cut to the length limit since the encoder was made."""

    def encode(self, texts: Sequence[str], *, role: Role) -> NDArray[np.float32]:
        """Return float32 [n, D] in input order, normalised only if the model itself does so; ValueError if not finite."""

    def score_vectors(self, query_vectors: NDArray[np.float32], passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 [n]: the similarity of row i with row i; distances negated."""


class Scorer(Protocol):
    """Turns (query, passage) pairs into gold_sim."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that can change a score, JSON-able; the key of the score bank."""

    @property
    def num_truncated(self) -> int:
        """Pairs cut to the length limit since the scorer was made."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n], raw, in input order; ValueError if not finite."""


@runtime_checkable
class BatchedScorer(Scorer, Protocol):
    """A Scorer in two steps, so that a shard's tokens are made beside the model's work on the one before, and batches are formed
    over a whole shard.
    """

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> Any:
        """Return what ``score_tokens`` takes; called by one thread at a time, which may be another than the one that scores."""

    def score_tokens(self, tokens: Any, done: Callable[[int], object]) -> NDArray[np.float32]:
        """Return float32 [n] as ``score`` does; ``done`` is told of pairs as they are scored."""
