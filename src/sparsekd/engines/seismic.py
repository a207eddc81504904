"""Seismic (Bruch et al. 2024, arXiv 2404.18812): its index, built by pyseismic-lsr; it keeps weights in half precision.

Tokens are terms, as in sentence-transformers' search helper, and the index is built with the package's own defaults. Search is
approximate: how much is found is up to ``query_cut`` and ``heap_factor`` of each search.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsekd.engines.json_lines import json_line, named, write_lines, write_queries, write_terms
from sparsekd.engines.names import dim_names
from sparsekd.engines.quantisation import QuantisationLoss, as_float16
from sparsekd.engines.vectors import Row, Source

INDEX = "passages.index.seismic"
LARGE_VOCABULARY = 1 << 16
"""Dims that the plain index's 16-bit components can tell apart; more need SeismicIndexLV."""


def write_seismic(source: Source, folder: Path) -> QuantisationLoss:
    """Build ``passages.index.seismic``, its components the student's dims; write queries where there are any, and the dims' names.

    ``seismic.SeismicIndex.load`` opens it, ``SeismicIndexLV.load`` where there are more than 65,536 dims. Raises ValueError for a
    weight that half precision cannot hold, or a name longer than the package's strings.
    """
    import seismic

    width = re.fullmatch(r"U(\d+)", seismic.get_seismic_string())
    names = dim_names(source.terms, source.dimension, forbidden=r"[\x00]", max_length=int(width[1]) if width else None)
    loss = QuantisationLoss()
    # Its SeismicDataset copies everything again with each document (0.5.4); read from a file, passages cost the same each.
    lines = folder / "passages.jsonl"
    write_lines(lines, (_passage(row, names, loss) for row in source.passages.rows(source.dimension)))
    index_class = seismic.SeismicIndexLV if source.dimension > LARGE_VOCABULARY else seismic.SeismicIndex
    with _stdout_to_stderr():
        dims = {name: dim for dim, name in enumerate(names)}
        index = index_class.build(str(lines), input_token_to_id_map=dims, load_content=False)
        index.save(str(folder / INDEX.removesuffix(".index.seismic")))
    lines.unlink()
    if source.queries is not None:
        write_queries(folder / "queries.jsonl", source.queries.rows(source.dimension), names)
    write_terms(folder, names)
    return loss


def _passage(row: Row, names: Sequence[str], loss: QuantisationLoss) -> str:
    loss.add(row.weights, as_float16(row.weights))
    return json_line({"id": row.text_id, "content": "", "vector": named(row, names)})


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Let what the package prints while it builds go where progress goes: the last line of stdout is the folder made."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
