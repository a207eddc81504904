"""The bank of sparse vectors: for every (encoder identity, text) one sparse float32 vector, as the encoder gave it.

A segment is keys, indices and values sorted by key, memory-mapped, 8 bytes per active dim. The identity names the role too:
where queries and passages take different ways through a model, equal texts have different vectors. scipy is imported by what
returns or takes a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from sparsekd.bank.search import Positions, are_ascending, find_keys
from sparsekd.bank.segment import columns_of, to_arrow, to_numpy
from sparsekd.bank.store import Layout, SegmentStore
from sparsekd.bank.text_key import Words, check_keys

if TYPE_CHECKING:
    import scipy.sparse

KIND = "sparse"
MAX_SEGMENT_BYTES = 1 << 30  # 600,000 vectors of 200 active dims; offsets within a segment fit int32 eight times over
_DIMENSION = b"dimension"
_COLUMNS = {"k0": pa.uint64(), "k1": pa.uint64(), "indices": pa.list_(pa.int32()), "values": pa.list_(pa.float32())}


class SparseBank:
    """All sparse encoders' vectors under one folder."""

    def __init__(self, root: Path, *, max_segment_bytes: int = MAX_SEGMENT_BYTES) -> None:
        """Use ``root`` = ``<cache>/bank``; nothing is created before the first append."""
        self._root = root
        self._max_segment_bytes = max_segment_bytes

    def open(self, identity: Mapping[str, Any], *, reference: str = "") -> SparseVectors:
        """Return the vectors of the encoder with this identity; IntegrityError if its folder is damaged.

        ``reference``, how people call the model, is for ``sparsekd bank ls`` and decides nothing.
        """
        layout = Layout(KIND, self._max_segment_bytes, num_texts_of, merge_segments, find_fault)
        return SparseVectors(SegmentStore(self._root, layout, identity, reference))


class SparseVectors:
    """One encoder's sparse vectors, of one role."""

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
        """Width V of the stored vectors, None while there are none."""
        batches = self._store.batches()
        return _dimension(batches[0]) if batches else None

    def known(self, keys: Words) -> npt.NDArray[np.bool_]:
        """Return bool [n]: whether each text's vector is banked; reads no vector."""
        check_keys("keys", keys)
        return _locate(self._store.batches(), keys)[0] >= 0

    def lookup(self, keys: Words) -> tuple[npt.NDArray[np.bool_], scipy.sparse.csr_matrix]:
        """Return found bool [n] and float32 CSR [found.sum(), V], the vectors of the found texts in the order asked.

        V is 0 while the bank has no vector at all. IntegrityError if a segment is damaged.
        """
        import scipy.sparse

        check_keys("keys", keys)
        batches = self._store.batches()
        segment, position = _locate(batches, keys)
        found = segment >= 0
        segment, position = segment[found], position[found]
        parts = [scipy.sparse.csr_matrix((0, _dimension(batches[0]) if batches else 0), dtype=np.float32)]
        order = [np.empty(0, dtype=np.int64)]
        for number, batch in enumerate(batches):
            rows = np.flatnonzero(segment == number)
            order.append(rows)
            parts.append(_csr(batch)[position[rows]])
        place = np.argsort(np.concatenate(order))
        return found, scipy.sparse.vstack(parts, format="csr")[place]

    def append(self, keys: Words, vectors: scipy.sparse.csr_matrix) -> None:
        """Store CSR float32 [n, V] for good, all or none; on return they are on disk. Stored zeros and order are not kept.

        Raises ValueError with count and first rows if a vector has NaN or Inf or a text occurs twice, and if V is not the
        bank's. A text stored earlier keeps its first vector.
        """
        check_keys("keys", keys)
        if vectors.dtype != np.float32 or vectors.shape[0] != len(keys) or not vectors.shape[1]:
            raise ValueError(f"vectors: expected float32 [{len(keys)}, V], found {vectors.dtype} {list(vectors.shape)}")
        if (dimension := self.dimension) not in (None, vectors.shape[1]):
            raise ValueError(
                f"{self.folder}: holds vectors of dimension {dimension}, found {vectors.shape[1]}; another encoder?"
            )
        bad = np.flatnonzero(~np.isfinite(vectors.data))
        _refuse(np.unique(np.searchsorted(vectors.indptr, bad, side="right") - 1), len(keys), "NaN or infinite")
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys = keys[order]
        _refuse(order[1:][(keys[1:] == keys[:-1]).all(axis=1)], len(keys), "of a text that occurs twice in one append")
        if len(order):
            ordered = vectors[order]  # a copy
            ordered.eliminate_zeros()
            ordered.sort_indices()
            self._store.publish(_batch(keys, ordered))
            self._store.compact()


def num_texts_of(batch: pa.RecordBatch) -> int:
    """Return the number of vectors in a segment."""
    return int(batch.num_rows)


def find_fault(batch: pa.RecordBatch) -> str | None:
    """Say what is wrong with a segment that some other program wrote; None for one of ours."""
    if columns_of(batch) != _COLUMNS:
        return f"columns {columns_of(batch)}"
    dimension = (batch.schema.field("indices").metadata or {}).get(_DIMENSION, b"")
    indices, values = batch.column("indices"), batch.column("values")
    if not dimension.isdigit() or indices.offsets != values.offsets:
        return "vectors without a dimension, or of another number of values than indices"
    if not are_ascending(*_keys(batch).T):
        return "texts out of order"
    flat = to_numpy(indices.values) if len(indices.values) else np.empty(0, np.int32)
    if ((flat < 0) | (flat >= int(dimension))).any():
        return "an index beyond the dimension"
    return None if not len(flat) or np.isfinite(to_numpy(values.values)).all() else "a value that is not finite"


def merge_segments(batches: Sequence[pa.RecordBatch], _: Path) -> pa.RecordBatch:
    """Join segments into one; of a text in several, the first one's vector stays."""
    import scipy.sparse

    keys = np.concatenate([_keys(batch) for batch in batches])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    order = order[is_first]
    return _batch(keys[order], scipy.sparse.vstack([_csr(batch) for batch in batches], format="csr")[order])


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


def _batch(keys: Words, vectors: scipy.sparse.csr_matrix) -> pa.RecordBatch:
    """Return sorted keys and their vectors as a record batch; the dimension rides on a field, where the store compares it."""
    offsets = to_arrow(vectors.indptr.astype(np.int32))
    indices = pa.ListArray.from_arrays(offsets, to_arrow(vectors.indices.astype(np.int32)))
    values = pa.ListArray.from_arrays(offsets, to_arrow(vectors.data))
    schema = pa.schema(
        [
            pa.field("k0", pa.uint64()),
            pa.field("k1", pa.uint64()),
            pa.field("indices", indices.type, metadata={_DIMENSION: str(vectors.shape[1])}),
            pa.field("values", values.type),
        ]
    )
    return pa.RecordBatch.from_arrays([to_arrow(keys[:, 0]), to_arrow(keys[:, 1]), indices, values], schema=schema)


def _keys(batch: pa.RecordBatch) -> Words:
    return np.stack([to_numpy(batch.column("k0")), to_numpy(batch.column("k1"))], axis=1)


def _csr(batch: pa.RecordBatch) -> scipy.sparse.csr_matrix:
    """Return a segment's vectors as a matrix over the mapped file."""
    import scipy.sparse

    indices, values = batch.column("indices"), batch.column("values")
    arrays = [to_numpy(part) if len(part) else np.empty(0, dtype) for part, dtype in
              ((values.values, np.float32), (indices.values, np.int32), (indices.offsets, np.int32))]  # fmt: skip
    return scipy.sparse.csr_matrix(tuple(arrays), shape=(batch.num_rows, _dimension(batch)))


def _dimension(batch: pa.RecordBatch) -> int:
    return int(batch.schema.field("indices").metadata[_DIMENSION])


def _refuse(rows: Positions, total: int, why: str) -> None:
    """Raise ValueError with count and first five rows if there are any."""
    if rows.size:
        first = ", ".join(str(row) for row in np.sort(rows)[:5])
        raise ValueError(f"{rows.size} of {total} vectors are {why}; nothing was stored (first rows: {first})")
