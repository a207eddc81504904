"""A file of texts as a student's vectors: lines of JSON, or one CSR matrix. n texts, V dims.

Texts are read, encoded and, as lines, written block by block. A CSR matrix is one file, so its vectors are held until the last is
made: 8 bytes per active dim.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsekd.artifact import sha256_of_file
from sparsekd.collection import stream_passages, stream_queries
from sparsekd.engines.vectors import Vectors
from sparsekd.exchange.target import exported
from sparsekd.provenance import provenance
from sparsekd.retrieval.building import TEXTS
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
    fails. Raises ValueError for a line that is no such text, no text at all, and a target that exists.
    """
    stream = stream_queries if role == "query" else stream_passages
    total = sum(1 for _ in stream(path))  # reads it whole first: a line that is wrong is told before a model is loaded
    if not total:
        raise ValueError(f"{path}: holds no text; expected a JSON object a line")
    fields = {"stage": ENCODE_STAGE, "student": student.identity, "texts": sha256_of_file(path), "role": role, "form": form}
    extra: dict[str, Any] = {**provenance(())}
    with exported(target, fields=fields, extra=extra, overwrite=overwrite) as folder:
        ids: list[str] = []
        blocks = student.encode_blocks(_blocks(((each, text) for _, each, text in stream(path)), ids), role=role, total=total)
        num_active = (_write_matrix if form == "csr" else _write_lines)(student, blocks, ids, folder)
        (folder / IDS).write_text("".join(f"{each}\n" for each in ids), encoding="utf-8", newline="\n")
        extra["counts"] = {"texts": len(ids), "active_dims": num_active}
    return len(ids), num_active / len(ids)


def _blocks(texts: Iterator[tuple[str, str]], ids: list[str]) -> Iterator[list[str]]:
    """Yield TEXTS texts at a time, adding their ids to ``ids``."""
    while block := list(itertools.islice(texts, TEXTS)):
        ids += [text_id for text_id, _ in block]
        yield [text for _, text in block]


def _write_lines(student: StudentEncoder, blocks: Iterator[scipy.sparse.csr_matrix], ids: list[str], folder: Path) -> int:
    num_active, first = 0, 0
    with (folder / LINES).open("w", encoding="utf-8", newline="\n") as stream:
        for block in blocks:
            terms = student.terms
            for row in Vectors(ids[first : first + block.shape[0]], [block]).rows(block.shape[1]):
                weights = zip(row.dims.tolist(), row.weights.tolist(), strict=True)
                vector = {str(dim) if terms is None else terms[dim]: weight for dim, weight in weights}
                stream.write(json.dumps({"id": row.text_id, "vector": vector}, ensure_ascii=False) + "\n")
            num_active, first = num_active + block.nnz, first + block.shape[0]
    return num_active


def _write_matrix(student: StudentEncoder, blocks: Iterator[scipy.sparse.csr_matrix], ids: list[str], folder: Path) -> int:
    import scipy.sparse

    vectors = scipy.sparse.vstack(list(blocks), format="csr")
    scipy.sparse.save_npz(folder / MATRIX, vectors)
    (folder / VOCABULARY).write_text(json.dumps(student.terms, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    return int(vectors.nnz)
