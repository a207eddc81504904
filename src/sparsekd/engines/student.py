"""A student over a collection as what engines are given: its index, and queries encoded by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekd.collection import stream_queries
from sparsekd.engines.vectors import Source, Vectors
from sparsekd.retrieval import StudentEncoder, StudentIndex, find_or_build

if TYPE_CHECKING:
    import scipy.sparse


class _Blocks:
    """An index's blocks, as often as they are asked for."""

    def __init__(self, index: StudentIndex) -> None:
        self._index = index

    def __iter__(self) -> Iterator[scipy.sparse.csr_matrix]:
        return (block for _, block in self._index.blocks())


def source_of(
    student: StudentEncoder, collection: Path, indexes: Path, *, queries: Path | None = None
) -> tuple[StudentIndex, Source]:
    """Return the student's index of the collection, made under ``indexes`` if it is not there, and what engines take of it.

    ``queries``, a queries.jsonl, is encoded whole. Raises what ``find_or_build`` raises, ValueError for a line that is no query and
    for a file without any.
    """
    text_by_id = {} if queries is None else {query_id: text for _, query_id, text in stream_queries(queries)}
    index = find_or_build(student, collection, indexes)
    asked = Vectors(list(text_by_id), [student.encode(list(text_by_id.values()), role="query")]) if text_by_id else None
    return index, Source(Vectors(index.passage_ids, _Blocks(index)), index.num_dims, index.terms, asked)
