"""Elasticsearch and OpenSearch: bodies for their bulk API, and the mapping of the index that takes them.

Fields are those of sentence-transformers' search helpers: ``id``, a keyword, and ``tokens``. Either engine keeps weights as Lucene
feature values of 9 significant bits. No server of theirs is part of the tests: files are held to the documented schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekd.collection.reading import shown
from sparsekd.engines.json_lines import json_line, named, write_json, write_numbered, write_queries, write_terms
from sparsekd.engines.names import dim_names
from sparsekd.engines.quantisation import QuantisationLoss, as_feature_values
from sparsekd.engines.vectors import Row, Source

_MAX_BODY_BYTES = 10_000_000  # Elasticsearch's guide to bulk requests: a few megabytes each; both refuse more than 100 MB
_MAX_ID_BYTES = 512  # of _id, in both
_MAX_TERM_BYTES = 32_766  # Lucene's IndexWriter.MAX_TERM_LENGTH; at most 3 bytes a UTF-16 unit

_RANK_FEATURES = {"type": "rank_features"}
# New indices prune query tokens unless told not to, since 8.19 and 9.1.
_SPARSE_VECTOR = {"type": "sparse_vector", "index_options": {"prune": False}}


def write_elasticsearch(source: Source, folder: Path) -> QuantisationLoss:
    """Write ``bulk-*.ndjson``, a mapping for either field type, queries and the dims' names, dots in them percent-encoded.

    Elasticsearch refuses dots in feature names. sentence-transformers writes ``_`` instead, another term of most vocabularies.
    """
    write_json(folder / "mapping-sparse_vector.json", _mapping(_SPARSE_VECTOR))
    write_json(folder / "mapping-rank_features.json", _mapping(_RANK_FEATURES))
    return _write(source, folder, forbidden=r"[.\x00-\x1f]")


def write_opensearch(source: Source, folder: Path) -> QuantisationLoss:
    """Write ``bulk-*.ndjson``, the mapping, queries and the dims' names: what a ``neural_sparse`` query with tokens searches."""
    write_json(folder / "mapping.json", _mapping(_RANK_FEATURES))
    return _write(source, folder, forbidden=r"[\x00-\x1f]")


def _mapping(tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {"mappings": {"properties": {"id": {"type": "keyword"}, "tokens": tokens}}}


def _write(source: Source, folder: Path, *, forbidden: str) -> QuantisationLoss:
    names = dim_names(source.terms, source.dimension, forbidden=forbidden, max_length=_MAX_TERM_BYTES // 3)
    loss = QuantisationLoss()
    write_numbered(folder, "bulk", ".ndjson", _actions(source, names, loss), _MAX_BODY_BYTES)
    if source.queries is not None:
        write_queries(folder / "queries.jsonl", source.queries.rows(source.dimension), names)
    write_terms(folder, names)
    return loss


def _actions(source: Source, names: Sequence[str], loss: QuantisationLoss) -> Iterator[str]:
    """Yield the two lines of a passage, action and document; a weight that the engine would refuse is left out and counted."""
    for row in source.passages.rows(source.dimension):
        if len(row.text_id.encode("utf-8")) > _MAX_ID_BYTES:
            raise ValueError(f"passage {shown(row.text_id)}: an _id has at most {_MAX_ID_BYTES} bytes; rename it in the collection")
        stored = as_feature_values(row.weights)
        loss.add(row.weights, stored)
        kept = Row(row.text_id, row.dims[stored > 0], row.weights[stored > 0])
        document = {"id": row.text_id, "tokens": named(kept, names)}
        yield f"{json_line({'index': {'_id': row.text_id}})}\n{json_line(document)}"
