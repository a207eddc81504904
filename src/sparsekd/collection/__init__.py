"""Collections: passages, queries and qrels read from the formats people have. One reader per format; no torch, no pandas.

``beir`` holds the BEIR folder and what is kept of it; ``reading`` the lines, JSON objects and TSV rows beneath.
"""

from sparsekd.collection.beir import (
    SPLITS,
    Collection,
    collection_digest,
    passage_at,
    read_collection,
    read_texts,
    stream_passages,
    stream_queries,
)

__all__ = [
    "SPLITS",
    "Collection",
    "collection_digest",
    "passage_at",
    "read_collection",
    "read_texts",
    "stream_passages",
    "stream_queries",
]
