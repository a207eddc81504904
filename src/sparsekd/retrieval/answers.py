"""What a query finds in a student's index, and why: the terms that a score is made of. Q queries, V dims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekd.collection import passage_at
from sparsekd.mining.ranking import NONE
from sparsekd.retrieval.building import CORPUS
from sparsekd.retrieval.index import StudentIndex

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True)
class Term:
    """A dim that query and passage share."""

    name: str
    """The term; the dim's number where dims are no terms."""
    query_weight: float
    passage_weight: float

    @property
    def product(self) -> float:
        """Its part of the score."""
        return self.query_weight * self.passage_weight


@dataclass(frozen=True)
class Answer:
    """A passage that was found or asked about; the score is the sum of its terms' products."""

    passage_id: str
    text: str
    score: float
    terms: tuple[Term, ...]
    """Largest product first, ties by name."""


def best_answers(index: StudentIndex, query_csr: scipy.sparse.csr_matrix, collection: Path, top: int) -> list[Answer]:
    """Return the best ``top`` passages for one query, CSR [1, V]; fewer where fewer share a dim with it."""
    positions, _ = index.search(query_csr, top)
    return [answer_of(index, query_csr, collection, position) for position in positions[0].tolist() if position != NONE]


def answer_of(index: StudentIndex, query_csr: scipy.sparse.csr_matrix, collection: Path, position: int) -> Answer:
    """Return what one passage's score is made of, whether it is among the best or not."""
    weights = index.weights(position, query_csr.indices)
    found = zip(query_csr.indices.tolist(), query_csr.data.tolist(), weights.tolist(), strict=True)
    terms = [Term(_name(index.terms, dim), query, passage) for dim, query, passage in found if query * passage]
    terms.sort(key=lambda term: (-term.product, term.name))
    score = float((query_csr.data * weights).sum())
    return Answer(index.passage_ids[position], passage_at(collection / CORPUS, int(index.offsets[position])), score, tuple(terms))


def position_of(index: StudentIndex, passage_id: str) -> int:
    """Return where a passage stands; ValueError if the index has no such id."""
    if passage_id not in index.position_by_id:
        raise ValueError(f"passage {passage_id!r}: not among the {len(index.passage_ids):,} passages of the index; check the id")
    return index.position_by_id[passage_id]


def _name(terms: Sequence[str] | None, dim: int) -> str:
    return str(dim) if terms is None else terms[dim]
