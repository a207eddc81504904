"""One segment: an immutable Arrow IPC file of one record batch, named by the xxh3_128 of its bytes.

Its schema metadata says whose it is (kind, key, identity), so a segment alone proves what it holds: a cut, flipped, renamed
or foreign one is refused by name. Reading maps the file into memory after one pass over its checksum (about 10 GB/s).
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import xxhash

from sparsekd.artifact import IntegrityError, checksum_of_file, naming, temporary_name

SUFFIX = ".arrow"
_OWNER = b"sparsekd"


@dataclass(frozen=True)
class Owner:
    """Whose segments they are."""

    kind: str
    """``scores``, ``embeddings`` or ``sparse``."""
    key: str
    """``key_of(identity)``."""
    identity: Mapping[str, Any]
    """Everything that can change the numbers, in full."""


@dataclass(frozen=True)
class SegmentEntry:
    """What a manifest says of a segment."""

    name: str
    """``<xxh3_128 of the file>.arrow``."""
    rows: int
    """Pairs or texts."""
    bytes: int
    """Size of the file."""


def write_segment(folder: Path, batch: pa.RecordBatch, rows: int, owner: Owner) -> tuple[Path, SegmentEntry]:
    """Write ``batch`` under a temporary name in ``folder``, flush it to disk, read it back; return path and entry.

    The caller renames it to ``entry.name`` or removes it. Equal content gives equal bytes and so an equal name.
    """
    temporary = folder / temporary_name("segment")
    header = json.dumps({"kind": owner.kind, "key": owner.key, "identity": owner.identity}, sort_keys=True)
    schema = batch.schema.with_metadata({_OWNER: header.encode("utf-8")})
    try:
        with naming(folder), temporary.open("wb") as stream:
            sink = _HashingSink(stream)
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            stream.flush()
            os.fsync(stream.fileno())
        checksum = sink.digest.hexdigest()
        if checksum_of_file(temporary) != checksum:
            raise OSError(f"{temporary}: reads back differently from what was written; check the disk")
        return temporary, SegmentEntry(checksum + SUFFIX, rows, temporary.stat().st_size)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_segment(path: Path, kind: str, key: str, entry: SegmentEntry | None = None) -> pa.RecordBatch:
    """Map a segment whose every byte is checked, zero copies; IntegrityError says what is wrong with it.

    Raises FileNotFoundError if it is gone, which the store tells apart from a compaction that replaced it.
    """
    if not stat.S_ISREG(path.lstat().st_mode):  # a link leads out of the bank, a pipe would be waited for
        raise IntegrityError(f"{path}: no regular file, expected a segment")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        if entry is not None and size != entry.bytes:
            raise IntegrityError(f"{path}: {size} bytes, its manifest says {entry.bytes}")
        _check_name(path, descriptor)
        if not size:
            raise IntegrityError(f"{path}: empty, expected an Arrow file")
        content = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    try:
        with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content))) as reader:
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)  # offsets inside their buffers: what follows reads them as arrays
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{path}: not an Arrow file ({error})") from error
    owner = owner_of(batches[0]) if len(batches) == 1 else None
    if owner is None or (owner.kind, owner.key) != (kind, key):
        found = f"{owner.kind} of {owner.key}" if owner else "no segment of a bank"
        raise IntegrityError(f"{path}: holds {found}, expected {kind} of {key}")
    return batches[0]


def to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Return a one-dimensional array as an Arrow array, zero copies; ``pa.array`` would import pandas, 0.4 s and 40 MB."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def to_numpy(column: pa.Array) -> npt.NDArray[Any]:
    """Return an Arrow array of plain numbers as a read-only array over the same memory, for the same reason."""
    dtype = column.type.to_pandas_dtype()
    return np.frombuffer(column.buffers()[1], dtype=dtype, count=column.offset + len(column))[column.offset :]


def columns_of(batch: pa.RecordBatch) -> dict[str, pa.DataType]:
    """Return the type of each column, by name, in order."""
    return {field.name: field.type for field in batch.schema}


def fault_of(batch: pa.RecordBatch, find_fault: Callable[[pa.RecordBatch], str | None]) -> str | None:
    """Say what in a batch no append would have written, None if nothing; nulls are for every kind, arrays do not show them."""
    return "a null" if any(_num_nulls(column) for column in batch.columns) else find_fault(batch)


def _num_nulls(column: pa.Array) -> int:
    inner = column.flatten() if pa.types.is_struct(column.type) else [column.values] if hasattr(column, "values") else []
    return int(column.null_count) + sum(_num_nulls(part) for part in inner)


def owner_of(batch: pa.RecordBatch) -> Owner | None:
    """Return whose segment this is, None if it does not say."""
    try:
        header = json.loads((batch.schema.metadata or {})[_OWNER])
        return Owner(header["kind"], header["key"], header["identity"])
    except (KeyError, ValueError, TypeError):
        return None


def _check_name(path: Path, descriptor: int) -> None:
    """Raise IntegrityError unless the open file's checksum is the name it bears."""
    digest = xxhash.xxh3_128()
    while block := os.read(descriptor, 1 << 20):
        digest.update(block)
    if digest.hexdigest() + SUFFIX != path.name:
        raise IntegrityError(f"{path}: checksum {digest.hexdigest()}, expected the one it is named by")


class _HashingSink:
    """A file object for Arrow that checksums what passes through."""

    def __init__(self, stream: Any) -> None:
        self.digest = xxhash.xxh3_128()
        self.closed = False
        self._stream = stream
        self._written = 0

    def write(self, block: Any) -> int:
        self.digest.update(block)
        self._stream.write(block)
        self._written += len(block)
        return len(block)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True
