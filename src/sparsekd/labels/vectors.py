"""Embedding tables: one text per row, labelled with the sparse teacher's vector of it, kept sparse.

The texts are the queries of the rows, then their passages, each once. Memory: 8 bytes per active dim of every text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from sparsekd.labels.contract import Contract, Role, table_schema
from sparsekd.labels.rows import Rows
from sparsekd.mining.shards import ROWS_PER_SHARD
from sparsekd.recipe import Recipe

if TYPE_CHECKING:
    import scipy.sparse


class VectorSource(Protocol):
    """Where the teacher's vectors come from."""

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """Position of each term among the dims, None where dims are no terms."""

    def vectors(self, role: Role, text_ids: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in the order of ``text_ids``."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their vectors, CSR float32 [n, V] of ascending indices, and what was left out."""

    roles: list[Role]
    text_ids: list[str]
    vectors: scipy.sparse.csr_matrix
    num_empty: int
    """Texts without an active dim: a target of nothing teaches collapse."""


def vector_teacher(recipe: Recipe) -> str:
    """Return the name of the teacher whose vectors label: the one of kind sparse, which the recipe's own checks have seen to."""
    return next(teacher.name for teacher in recipe.teachers if teacher.kind == "sparse")


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """Return the sha256 of the terms in the order of their positions: equal where every dim means the same term.

    >>> vocabulary_digest({"a": 0, "b": 1}) == vocabulary_digest({"b": 1, "a": 0}) != vocabulary_digest({"a": 1, "b": 0})
    True
    """
    terms = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(terms, ensure_ascii=True).encode("ascii")).hexdigest()


def label_texts(rows: Rows, source: VectorSource) -> LabelledTexts:
    """Return every distinct query and passage of ``rows`` with its vector; texts without an active dim are left out, counted.

    Raises ValueError if a weight is not finite, naming the text, or if no text is left.
    """
    import scipy.sparse

    ids: dict[Role, list[str]] = {
        "query": list(dict.fromkeys(rows.query_ids)),
        "passage": list(dict.fromkeys(passage_id for passages in rows.passage_ids for passage_id in passages)),
    }
    roles: list[Role] = [role for role, found in ids.items() for _ in found]
    text_ids = [text_id for found in ids.values() for text_id in found]
    vectors = scipy.sparse.vstack([source.vectors(role, found) for role, found in ids.items()], format="csr", dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors.data))
    if bad.size:
        row = int(np.searchsorted(vectors.indptr, bad[0], side="right") - 1)
        raise ValueError(f"[labels] the teacher's vector of {roles[row]} {text_ids[row]!r} is not finite; check the teacher")
    vectors.eliminate_zeros()
    vectors.sort_indices()
    kept = np.flatnonzero(np.diff(vectors.indptr))
    if not kept.size:
        raise ValueError(f"[labels] the teacher's vectors of all {len(text_ids)} texts are empty; check the teacher")
    return LabelledTexts(
        [roles[row] for row in kept], [text_ids[row] for row in kept], vectors[kept], len(text_ids) - int(kept.size)
    )


def vector_summary(texts: LabelledTexts) -> dict[str, Any]:
    """Return texts, mean active dims and range of weights by role: a query side as dense as the passages' shows here."""
    active = np.diff(texts.vectors.indptr)
    is_query = np.array([role == "query" for role in texts.roles])
    sides = {"query": active[is_query], "passage": active[~is_query]}
    return {
        "dimension": int(texts.vectors.shape[1]),
        "texts": {role: len(counts) for role, counts in sides.items()},
        "active_dims": {role: float(counts.mean()) if len(counts) else 0.0 for role, counts in sides.items()},
        "weights": {"min": float(texts.vectors.data.min()), "max": float(texts.vectors.data.max())},
    }


def vector_tables(texts: LabelledTexts, contract: Contract) -> Iterator[Any]:
    """Yield one Arrow table per shard."""
    schema, vectors = table_schema("embedding", contract), texts.vectors
    for start in range(0, len(texts.text_ids), ROWS_PER_SHARD):
        part = slice(start, min(start + ROWS_PER_SHARD, len(texts.text_ids)))
        first, last = int(vectors.indptr[part.start]), int(vectors.indptr[part.stop])
        offsets = pa.array(vectors.indptr[part.start : part.stop + 1] - first, pa.int32())
        columns = [
            pa.array(texts.roles[part], pa.string()),
            pa.array(texts.text_ids[part], pa.string()),
            pa.ListArray.from_arrays(offsets, pa.array(vectors.indices[first:last], pa.int32())),
            pa.ListArray.from_arrays(offsets, pa.array(vectors.data[first:last], pa.float32())),
        ]
        yield pa.Table.from_arrays(columns, schema=schema)
