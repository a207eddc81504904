"""A student over a collection as what engines are given: its index, and queries encoded by it."""

from __future__ import annotations

from pathlib import Path

from sparsekd.collection import stream_queries
from sparsekd.engines.vectors import Source, Vectors
from sparsekd.recipe import Run
from sparsekd.retrieval import StudentIndex, find_or_build
from sparsekd.retrieval.encoder import StudentEncoder


class _Blocks:
    """An index's blocks, as often as they are asked for."""

    def __init__(self, index: StudentIndex) -> None:
        self._index = index

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (block for _, block in self._index.blocks())


def source_of(
    student: Path, collection: Path, indexes: Path, run: Run, *, queries: Path | None = None
) -> tuple[StudentIndex, Source]:
    """Return the student's index of the collection, made under ``indexes`` if it is not there, and what engines take of it.

    ``queries``, a queries.jsonl, is encoded whole. Raises what ``find_or_build`` raises, ValueError for a line that is no query.
    """
    texts = None if queries is None else {query_id: text for _, query_id, text in stream_queries(queries)}
    index = find_or_build(student, collection, indexes, run)
    asked = None
    if texts:
        asked = Vectors(list(texts), [StudentEncoder(student, run).encode(list(texts.values()), role="query")])
    return index, Source(Vectors(index.passage_ids, _Blocks(index)), index.num_dims, index.terms, asked)
