"""Finds a student's index over a collection by its key, or builds it once: texts in, blocks of postings out, published whole.

Holds the passages' ids, one block of texts and one block of vectors, whatever the number of passages. A build that ends early
publishes nothing, and what it left is removed by the next build of the same index.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.artifact import find, key_of, publish, write_json_atomically
from sparsekd.collection import collection_digest, stream_passages
from sparsekd.mining.ranking import id_ranks
from sparsekd.provenance import provenance
from sparsekd.retrieval.encoder import StudentEncoder
from sparsekd.retrieval.index import ID_RANK, IDS, KIND, OFFSETS, VOCABULARY, StudentIndex, block_file

if TYPE_CHECKING:
    import scipy.sparse

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Raised when the same student and passages would give other bytes."""
CORPUS = "corpus.jsonl"
BLOCK_POSTINGS = 1 << 23
"""A block ends with the texts that reach it: 67 MB, 65,000 passages of 128 active dims, whose scores stay in a core's cache."""
BLOCK_PASSAGES = 1 << 16
"""Or at so many passages, however sparse."""


def index_fields(student: StudentEncoder, collection_folder: Path) -> dict[str, Any]:
    """Return what decides an index's bytes: the student's folder, the corpus file, and this code."""
    return {
        "version": f"index v{INDEX_VERSION}",
        "student": student.identity,
        "collection": collection_digest(collection_folder, [CORPUS]),
    }


def find_or_build(student: StudentEncoder, collection_folder: Path, root: Path) -> StudentIndex:
    """Return the index of a student over all passages of a BEIR folder's corpus.jsonl, made under ``root`` if it is not there.

    Raises FileNotFoundError or ValueError for bad input before any text is encoded, IntegrityError if a published index is damaged.
    """
    fields = index_fields(student, collection_folder)
    folder = root / key_of(fields)
    if find(folder, fields) is None:
        _build(student, collection_folder / CORPUS, folder, fields)
    else:
        logger.info("index %s: hit", folder.name)
    return StudentIndex.open(folder)


class IndexWriter:
    """Fills an unpublished index, block by block."""

    def __init__(self, folder: Path, extra: dict[str, Any]) -> None:
        self.block_passages: list[int] = []
        self._folder, self._extra = folder, extra
        self._num_dims = self._num_postings = 0
        (folder / "blocks").mkdir()

    def add(self, passage_csr: scipy.sparse.csr_matrix) -> None:
        """Write the postings of the next block of vectors, CSR float32 [passages, V], without stored zeros."""
        passages_VP = passage_csr.T.tocsr()
        passages_VP.sort_indices()
        for part, array, dtype in (
            ("starts", passages_VP.indptr, np.int32),
            ("passages", passages_VP.indices, np.int32),
            ("weights", passages_VP.data, np.float32),
        ):
            np.save(self._folder / block_file(len(self.block_passages), part), array.astype(dtype, copy=False))
        self.block_passages.append(passage_csr.shape[0])
        self._num_dims, self._num_postings = passage_csr.shape[1], self._num_postings + passage_csr.nnz

    def finish(
        self, passage_ids: Sequence[str], offsets: NDArray[np.int64], terms: Sequence[str] | None, *, has_unit_length: bool
    ) -> None:
        """Write what belongs to the index as a whole, and its counts into the manifest."""
        ids = "".join(f"{passage_id}\n" for passage_id in passage_ids)
        (self._folder / IDS).write_text(ids, encoding="utf-8", newline="\n")
        np.save(self._folder / ID_RANK, id_ranks(passage_ids))
        np.save(self._folder / OFFSETS, offsets)
        write_json_atomically(self._folder / VOCABULARY, terms)
        self._extra |= {
            "num_dims": self._num_dims,
            "num_passages": len(passage_ids),
            "num_postings": self._num_postings,
            "block_passages": self.block_passages,
            "has_unit_length": has_unit_length,
        }


@contextlib.contextmanager
def published(folder: Path, fields: Mapping[str, Any], extra: dict[str, Any]) -> Iterator[IndexWriter]:
    """Yield what writes an index; on a clean exit, after its ``finish``, the index is published as ``folder``."""
    with publish(folder, kind=KIND, fields=fields, extra=extra) as temporary:
        yield IndexWriter(temporary, extra)


def _build(student: StudentEncoder, corpus: Path, folder: Path, fields: Mapping[str, Any]) -> None:
    passage_ids, lines = _read_ids(corpus)
    started, extra = time.monotonic(), provenance(())
    with published(folder, fields, extra) as writer:
        texts = (text for _, _, text in stream_passages(corpus))
        for vectors in joined_blocks(student.encode_blocks(texts, role="passage", total=len(passage_ids))):
            writer.add(vectors)
        writer.finish(passage_ids, _line_offsets(corpus)[lines - 1], student.terms, has_unit_length=student.has_unit_length)
        extra["wall_seconds"] = time.monotonic() - started
    logger.info("index %s: %d passages in %d blocks", folder.name, len(passage_ids), len(writer.block_passages))


def joined_blocks(encoded: Iterable[scipy.sparse.csr_matrix]) -> Iterator[scipy.sparse.csr_matrix]:
    """Yield rows in their order in blocks of BLOCK_PASSAGES or fewer, a block with BLOCK_POSTINGS ending there."""
    import scipy.sparse

    parts: list[scipy.sparse.csr_matrix] = []
    num_passages = num_postings = 0
    for part in encoded:
        if num_passages + part.shape[0] > BLOCK_PASSAGES and parts:
            yield scipy.sparse.vstack(parts, format="csr")
            parts, num_passages, num_postings = [], 0, 0
        parts.append(part)
        num_passages, num_postings = num_passages + part.shape[0], num_postings + part.nnz
        if num_postings >= BLOCK_POSTINGS:
            yield scipy.sparse.vstack(parts, format="csr")
            parts, num_passages, num_postings = [], 0, 0
    if parts:
        yield scipy.sparse.vstack(parts, format="csr")


def _read_ids(corpus: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Return passage_ids in order and the line of each, int64, from 1; the whole file is checked before a text is encoded."""
    passage_ids, lines = [], []
    for line, passage_id, _ in stream_passages(corpus):
        passage_ids.append(passage_id)
        lines.append(line)
    return passage_ids, np.array(lines, dtype=np.int64)


def _line_offsets(path: Path) -> NDArray[np.int64]:
    """Return the byte at which each line begins."""
    with path.open("rb") as stream:
        lengths = np.fromiter((len(line) for line in stream), dtype=np.int64)
    return np.cumsum(lengths) - lengths
