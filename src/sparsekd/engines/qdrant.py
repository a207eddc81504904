"""Qdrant: a shard built by the engine itself (qdrant-edge-py), or bodies of upserts for a server.

The vector's name, ``text``, is that of sentence-transformers' search helper. A point's id is the passage's row; its passage_id
stands in the payload. Weights stay float32 and search over sparse vectors is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sparsekd.engines.json_lines import json_line, write_json, write_lines
from sparsekd.engines.quantisation import QuantisationLoss
from sparsekd.engines.vectors import Row, Source

VECTOR = "text"
"""Name of the sparse vector."""
PASSAGE_ID = "passage_id"
"""Key of the payload."""
SHARD = "shard"
_BATCH = 1000  # points per upsert: some 3 MB of JSON, of a server's limit of 32 MB


def write_qdrant(source: Source, folder: Path) -> QuantisationLoss:
    """Build ``shard/``, its sparse index included; ``qdrant_edge.EdgeShard.load`` opens it."""
    import qdrant_edge as edge

    loss = QuantisationLoss()
    config = edge.EdgeConfig(sparse_vectors={VECTOR: edge.EdgeSparseVectorParams()})
    (folder / SHARD).mkdir()
    shard = edge.EdgeShard.create(str(folder / SHARD), config)
    try:
        for points in _batches(source.passages.rows(source.dimension)):
            shard.update(edge.UpdateOperation.upsert_points([_point(edge, number, row, loss) for number, row in points]))
        shard.optimize()
        shard.flush()
    finally:
        shard.close()
    _write_queries(source, folder)
    return loss


def write_qdrant_upserts(source: Source, folder: Path) -> QuantisationLoss:
    """Write ``collection.json`` and ``upserts.jsonl``: bodies of PUT /collections/NAME and of PUT /collections/NAME/points."""
    loss = QuantisationLoss()
    write_json(folder / "collection.json", {"vectors": {}, "sparse_vectors": {VECTOR: {}}})
    write_lines(folder / "upserts.jsonl", _upserts(source, loss))
    _write_queries(source, folder)
    return loss


def _point(edge: Any, number: int, row: Row, loss: QuantisationLoss) -> Any:
    loss.add(row.weights, row.weights)
    vector = edge.SparseVector(row.dims.tolist(), row.weights.tolist())
    return edge.Point(number, {VECTOR: vector}, {PASSAGE_ID: row.text_id})


def _upserts(source: Source, loss: QuantisationLoss) -> Iterator[str]:
    for rows in _batches(source.passages.rows(source.dimension)):
        points = []
        for number, row in rows:
            loss.add(row.weights, row.weights)
            points.append({"id": number, "vector": {VECTOR: _sparse(row)}, "payload": {PASSAGE_ID: row.text_id}})
        yield json_line({"points": points})


def _batches(rows: Iterable[Row]) -> Iterator[list[tuple[int, Row]]]:
    """Yield rows with their numbers, some at a time; ``itertools.batched`` came with Python 3.12."""
    numbered = enumerate(rows)
    while batch := list(islice(numbered, _BATCH)):
        yield batch


def _sparse(row: Row) -> dict[str, list[Any]]:
    return {"indices": row.dims.tolist(), "values": row.weights.tolist()}


def _write_queries(source: Source, folder: Path) -> None:
    if source.queries is not None:
        rows = source.queries.rows(source.dimension)
        write_lines(folder / "queries.jsonl", (json_line({"id": row.text_id, "vector": _sparse(row)}) for row in rows))
