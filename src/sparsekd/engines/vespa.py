"""Vespa: document puts with a mapped tensor, and the schema that ranks by its dot product with the query's.

Weights are float32 there as here: nothing is quantised. No Vespa is part of the tests: files are held to its documented
JSON format.
"""

from __future__ import annotations

from pathlib import Path

from sparsekd.engines.json_lines import json_line, named, write_lines, write_queries, write_terms
from sparsekd.engines.names import dim_names
from sparsekd.engines.quantisation import QuantisationLoss
from sparsekd.engines.vectors import Row, Source

# Vespa refuses control characters in strings.
_FORBIDDEN = r"[\x00-\x1f\x7f]"
_SCHEMA = """schema passage {
    document passage {
        field id type string {
            indexing: attribute | summary
        }
        field tokens type tensor<float>(token{}) {
            indexing: attribute
            attribute: fast-rank
        }
    }
    rank-profile sparse {
        inputs {
            query(tokens) tensor<float>(token{})
        }
        first-phase {
            expression: sum(query(tokens) * attribute(tokens))
        }
    }
}
"""


def write_vespa(source: Source, folder: Path) -> QuantisationLoss:
    """Write ``feed.jsonl``, ``passage.sd``, queries where there are any, and the dims' names."""
    names = dim_names(source.terms, source.dimension, forbidden=_FORBIDDEN)
    loss = QuantisationLoss()

    def put(row: Row) -> str:
        loss.add(row.weights, row.weights)
        fields = {"id": row.text_id, "tokens": {"cells": named(row, names)}}
        return json_line({"put": f"id:sparsekd:passage::{row.text_id}", "fields": fields})

    write_lines(folder / "feed.jsonl", map(put, source.passages.rows(source.dimension)))
    (folder / "passage.sd").write_text(_SCHEMA, encoding="utf-8")
    if source.queries is not None:
        write_queries(folder / "queries.jsonl", source.queries.rows(source.dimension), names)
    write_terms(folder, names)
    return loss
