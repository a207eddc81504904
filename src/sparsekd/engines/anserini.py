"""Lucene through Anserini: a JsonVectorCollection of integer impacts, and queries as its TsvString topics.

Anserini repeats a term as often as its impact says and splits at whitespace (``-impact -pretokenized``), so a posting's term
frequency is the impact. Weights times 100, rounded, as SPLADE's own export has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsekd.engines.json_lines import json_line, write_lines, write_numbered, write_terms
from sparsekd.engines.names import dim_names
from sparsekd.engines.quantisation import IMPACT_SCALE, QuantisationLoss, as_impacts
from sparsekd.engines.vectors import Row, Source

# Lucene's WhitespaceTokenizer cuts a longer token in two.
_MAX_TOKEN = 255
_MAX_FILE_BYTES = 256_000_000  # Anserini gives each of its threads a file


def write_anserini(source: Source, folder: Path) -> QuantisationLoss:
    """Write ``passages/part-*.jsonl``, ``queries.tsv`` where there are queries, and the dims' names."""
    names = dim_names(source.terms, source.dimension, forbidden=r"[\s\x00-\x1f]", max_length=_MAX_TOKEN)
    loss = QuantisationLoss()
    (folder / "passages").mkdir()
    lines = (_passage(row, names, loss) for row in source.passages.rows(source.dimension))
    write_numbered(folder / "passages", "part", ".jsonl", lines, _MAX_FILE_BYTES)
    if source.queries is not None:
        write_lines(folder / "queries.tsv", _topics(source.queries.rows(source.dimension), names))
    write_terms(folder, names)
    return loss


def _passage(row: Row, names: Sequence[str], loss: QuantisationLoss) -> str:
    impacts = as_impacts(row.weights)
    loss.add(row.weights, impacts / IMPACT_SCALE)
    vector = {names[dim]: impact for dim, impact in zip(row.dims.tolist(), impacts.tolist(), strict=True) if impact}
    return json_line({"id": row.text_id, "contents": "", "vector": vector})


def _topics(rows: Iterator[Row], names: Sequence[str]) -> Iterator[str]:
    for row in rows:
        impacts = as_impacts(row.weights).tolist()
        tokens = (name for dim, impact in zip(row.dims.tolist(), impacts, strict=True) for name in [names[dim]] * impact)
        yield f"{row.text_id}\t{' '.join(tokens)}"
