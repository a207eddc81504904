"""The embedding bank: for every (encoder identity, text) one float32 vector, as the encoder gave it.

A segment is keys and vectors sorted by key, memory-mapped; a lookup reads the asked vectors only. Two texts' vectors never
mix and two encoders never meet: the identity (weights, prompt, length, dtype, role) is the folder's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from sparsekd.bank.search import Positions, are_ascending, find_keys
from sparsekd.bank.segment import columns_of, to_arrow, to_numpy
from sparsekd.bank.sparse import SparseBank
from sparsekd.bank.store import Layout, SegmentStore
from sparsekd.bank.text_key import Words, check_keys

Vectors = npt.NDArray[np.float32]

KIND = "embeddings"
MAX_SEGMENT_BYTES = 1 << 30  # 700,000 vectors of 384; bounds what a merge rewrites
_BYTES_PER_BLOCK = 1 << 26


class EmbeddingBank:
    """All encoders' vectors under one folder."""

    def __init__(self, root: Path, *, max_segment_bytes: int = MAX_SEGMENT_BYTES) -> None:
        """Use ``root`` = ``<cache>/bank``; nothing is created before the first append."""
        self._root = root
        self._max_segment_bytes = max_segment_bytes

    @property
    def sparse(self) -> SparseBank:
        """The bank of sparse vectors beside this one."""
        return SparseBank(self._root, max_segment_bytes=self._max_segment_bytes)

    def open(self, identity: Mapping[str, Any], *, reference: str = "") -> Embeddings:
        """Return the vectors of the encoder with this identity; IntegrityError if its folder is damaged.

        ``reference``, how people call the model, is for ``sparsekd bank ls`` and decides nothing.
        """
        layout = Layout(KIND, self._max_segment_bytes, num_texts_of, merge_segments, find_fault)
        return Embeddings(SegmentStore(self._root, layout, identity, reference))


class Embeddings:
    """One encoder's vectors."""

    def __init__(self, store: SegmentStore) -> None:
        self._store = store

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        return self._store.folder

    @property
    def num_texts(self) -> int:
        """Stored vectors now; texts that racing writers stored twice count twice until compaction."""
        return self._store.manifest().num_rows

    @property
    def dimension(self) -> int | None:
        """Width of the stored vectors, None while there are none."""
        batches = self._store.batches()
        return _dimension(batches[0]) if batches else None

    def known(self, keys: Words) -> npt.NDArray[np.bool_]:
        """Return bool [n]: whether each text's vector is banked; reads no vector."""
        check_keys("keys", keys)
        return _locate(self._store.batches(), keys)[0] >= 0

    def lookup(self, keys: Words) -> tuple[npt.NDArray[np.bool_], Vectors]:
        """Return found bool [n] and float32 [found.sum(), D], the vectors of the found texts in the order asked.

        D is 0 while the bank has no vector at all. Memory: the answer and 64 MB. IntegrityError if a segment is damaged.
        """
        check_keys("keys", keys)
        batches = self._store.batches()
        segment, position = _locate(batches, keys)
        found = segment >= 0
        segment, position = segment[found], position[found]
        vectors = np.empty((len(segment), _dimension(batches[0]) if batches else 0), dtype=np.float32)
        for number, batch in enumerate(batches):
            stored = _vectors(batch)
            for rows in _blocks(np.flatnonzero(segment == number), vectors.shape[1]):
                vectors[rows] = stored[position[rows]]
        return found, vectors

    def append(self, keys: Words, vectors: Vectors) -> None:
        """Store vectors float32 [n, D] for good, all or none; on return they are on disk.

        Raises ValueError with count and first rows if a vector has NaN or Inf or a text occurs twice, and if D is not the
        bank's. A text stored earlier keeps its first vector.
        """
        check_keys("keys", keys)
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(keys) or not vectors.shape[1]:
            raise ValueError(f"vectors: expected float32 [{len(keys)}, D], found {vectors.dtype} {list(vectors.shape)}")
        if (dimension := self.dimension) not in (None, vectors.shape[1]):
            raise ValueError(
                f"{self.folder}: holds vectors of dimension {dimension}, found {vectors.shape[1]}; another encoder?"
            )
        _refuse(np.flatnonzero(~np.isfinite(vectors).all(axis=1)), len(keys), "NaN or infinite")
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys = keys[order]
        _refuse(order[1:][(keys[1:] == keys[:-1]).all(axis=1)], len(keys), "of a text that occurs twice in one append")
        if len(order):
            self._store.publish(_batch(keys[:, 0], keys[:, 1], vectors[order]))
            self._store.compact()


def num_texts_of(batch: pa.RecordBatch) -> int:
    """Return the number of vectors in a segment."""
    return int(batch.num_rows)


def find_fault(batch: pa.RecordBatch) -> str | None:
    """Say what is wrong with a segment that some other program wrote; None for one of ours."""
    types = list(columns_of(batch).items())
    if types[:2] != [("k0", pa.uint64()), ("k1", pa.uint64())] or [name for name, _ in types[2:]] != ["vector"]:
        return f"columns {dict(types)}"
    vector = types[2][1]
    if not pa.types.is_fixed_size_list(vector) or vector.value_type != pa.float32() or not vector.list_size:
        return f"vectors of {vector}"
    if not are_ascending(to_numpy(batch.column("k0")), to_numpy(batch.column("k1"))):
        return "texts out of order"
    vectors = _vectors(batch)
    blocks = _blocks(np.arange(len(vectors)), vectors.shape[1])
    return None if all(np.isfinite(vectors[rows[0] : rows[-1] + 1]).all() for rows in blocks) else "a vector that is not finite"


def merge_segments(batches: Sequence[pa.RecordBatch], _: Path) -> pa.RecordBatch:
    """Join segments into one; of a text in several, the first one's vector stays."""
    k0 = np.concatenate([to_numpy(batch.column("k0")) for batch in batches])
    k1 = np.concatenate([to_numpy(batch.column("k1")) for batch in batches])
    order = np.lexsort((k1, k0))  # stable
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (k0[order[1:]] != k0[order[:-1]]) | (k1[order[1:]] != k1[order[:-1]])
    order = order[is_first]
    place = np.full(len(k0), -1, dtype=np.int64)
    place[order] = np.arange(len(order))
    vectors = np.empty((len(order), _dimension(batches[0])), dtype=np.float32)
    start = 0
    for batch in batches:
        target = place[start : start + batch.num_rows]
        for rows in _blocks(np.flatnonzero(target >= 0), vectors.shape[1]):
            vectors[target[rows]] = _vectors(batch)[rows]
        start += batch.num_rows
    return _batch(k0[order], k1[order], vectors)


def _locate(batches: Sequence[pa.RecordBatch], keys: Words) -> tuple[Positions, Positions]:
    """Return for each key the number of the first segment that has it (-1 for none) and the row in it."""
    segment, position = np.full(len(keys), -1, dtype=np.int64), np.full(len(keys), -1, dtype=np.int64)
    pending = np.argsort(keys[:, 0])  # in the order of the segments' keys: far fewer cache misses
    for number, batch in enumerate(batches):
        asked = keys[pending]
        found = find_keys(to_numpy(batch.column("k0")), to_numpy(batch.column("k1")), asked[:, 0], asked[:, 1])
        segment[pending[found >= 0]] = number
        position[pending[found >= 0]] = found[found >= 0]
        pending = pending[found < 0]
    return segment, position


def _batch(k0: Words, k1: Words, vectors: Vectors) -> pa.RecordBatch:
    """Return sorted keys and their vectors as a record batch."""
    flat = to_arrow(vectors.reshape(-1))
    columns = [to_arrow(k0), to_arrow(k1), pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])]
    return pa.RecordBatch.from_arrays(columns, names=["k0", "k1", "vector"])


def _vectors(batch: pa.RecordBatch) -> Vectors:
    """Return a segment's vectors as an array [rows, D] over the mapped file."""
    values: Vectors = to_numpy(batch.column("vector").values)
    return values.reshape(batch.num_rows, -1)


def _dimension(batch: pa.RecordBatch) -> int:
    return int(batch.schema.field("vector").type.list_size)


def _blocks(rows: Positions, dimension: int) -> Iterator[Positions]:
    """Cut rows into blocks whose vectors fill about 64 MB."""
    step = max(1, _BYTES_PER_BLOCK // (4 * max(dimension, 1)))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _refuse(rows: Positions, total: int, why: str) -> None:
    """Raise ValueError with count and first five rows if there are any."""
    if rows.size:
        first = ", ".join(str(row) for row in np.sort(rows)[:5])
        raise ValueError(f"{rows.size} of {total} vectors are {why}; nothing was stored (first rows: {first})")
