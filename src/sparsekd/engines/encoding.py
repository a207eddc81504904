"""A file of texts as a student's vectors: lines of JSON, or one CSR matrix. n texts, V dims.

Texts are read, encoded and, as lines, written block by block. A CSR matrix is one file, so its vectors are held until the last is
made: 8 bytes per active dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsekd.artifact import sha256_of_file
from sparsekd.collection import stream_passages, stream_queries
from sparsekd.engines.json_lines import json_line, named, write_lines
from sparsekd.engines.names import dim_names
from sparsekd.engines.vectors import Vectors
from sparsekd.exchange.target import exported
from sparsekd.provenance import provenance
from sparsekd.retrieval.encoder import Role, StudentEncoder

if TYPE_CHECKING:
    import scipy.sparse

Form = Literal["jsonl", "csr"]

ENCODE_STAGE = "engines/encode v1"
IDS, LINES, MATRIX, VOCABULARY = "ids.txt", "vectors.jsonl", "vectors.npz", "vocabulary.json"


def encode_file(
    student: StudentEncoder, path: Path, target: Path, *, role: Role, form: Form, overwrite: bool = False
) -> tuple[int, float]:
    """Encode every text of a BEIR ``corpus.jsonl`` or ``queries.jsonl`` into ``target``, a new folder; return n and mean active
    dims.

    ``ids.txt`` has an id a line, in the order of the rows. ``jsonl``: ``vectors.jsonl``, ``{"id", "vector": {term: weight}}`` a
    line, dims by number where they are no terms. ``csr``: ``vectors.npz``, float32 [n, V], for ``scipy.sparse.load_npz``, and
    ``vocabulary.json``, the terms by dim or null. A text that comes again under its id is encoded once. Nothing is left if anything
    fails. Raises ValueError for a line that is no such text, a file without any, and a target that exists.
    """
    stream = stream_queries if role == "query" else stream_passages
    ids = [text_id for _, text_id, _ in stream(path)]  # the whole file: a line that is wrong is told before a model is loaded
    fields = {"stage": ENCODE_STAGE, "student": student.identity, "texts": sha256_of_file(path), "role": role, "form": form}
    extra: dict[str, Any] = {**provenance(())}
    with exported(target, fields=fields, extra=extra, overwrite=overwrite) as folder:
        blocks = student.encode_blocks((text for _, _, text in stream(path)), role=role, total=len(ids))
        num_active = (_write_matrix if form == "csr" else _write_lines)(student, blocks, ids, folder)
        write_lines(folder / IDS, ids)
        extra["counts"] = {"texts": len(ids), "active_dims": num_active}
    return len(ids), num_active / len(ids)


def _write_lines(student: StudentEncoder, blocks: Iterator[scipy.sparse.csr_matrix], ids: list[str], folder: Path) -> int:
    num_active = first = 0

    def lines() -> Iterator[str]:
        nonlocal num_active, first
        for block in blocks:
            names = dim_names(student.terms, block.shape[1])
            for row in Vectors(ids[first : first + block.shape[0]], [block]).rows(block.shape[1]):
                yield json_line({"id": row.text_id, "vector": named(row, names)})
            num_active, first = num_active + block.nnz, first + block.shape[0]

    write_lines(folder / LINES, lines())
    return num_active


def _write_matrix(student: StudentEncoder, blocks: Iterator[scipy.sparse.csr_matrix], ids: list[str], folder: Path) -> int:
    import scipy.sparse

    vectors = scipy.sparse.vstack(list(blocks), format="csr")
    scipy.sparse.save_npz(folder / MATRIX, vectors)
    write_lines(folder / VOCABULARY, [json_line(student.terms)])
    return int(vectors.nnz)
