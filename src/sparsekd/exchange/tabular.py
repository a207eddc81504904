"""Rows as dictionaries from Arrow, Parquet and JSON Lines files, and Arrow streams written batch by batch.

Written files load with ``datasets.Dataset.from_file`` and ``datasets.load_dataset``. Reading holds one batch in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsekd.collection.reading import json_objects, shown
from sparsekd.exchange.rows import refused

_ROWS_PER_BATCH = 1024
_MAGIC_OF_FILE = b"ARROW1"


def find_files(path: Path, stem: str, endings: Sequence[str]) -> list[Path]:
    """Return ``path`` itself, or of a folder the files ``STEM.arrow``, ``STEM-*.arrow`` and ``STEM/*.arrow``, in order of name.

    Any of ``endings`` will do for ``.arrow``. Raises FileNotFoundError if there is none, ValueError if two endings are there and
    nothing says which is meant.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a file of scores, or a folder with {stem}{endings[0]}")
    patterns = (stem, f"{stem}-*", f"{stem}/*")  # as datasets name shards and configurations
    found = {ending: sorted(file for pattern in patterns for file in path.glob(pattern + ending)) for ending in endings}
    present = [ending for ending in endings if found[ending]]
    if not present:
        raise FileNotFoundError(f"{path}: holds no {stem}{' or '.join(endings)}; give the file, or the folder that holds it")
    if len(present) > 1:
        raise ValueError(f"{path}: holds {stem} as {' and as '.join(present)}; give the file that is meant")
    return found[present[0]]


def tabular_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, {column: value}) of every row, columns in file order; the ending says how the file is read.

    A place is ``file:line``, or ``file: row N`` from 1. Raises ValueError for a file that is cut, broken or empty.
    """
    if path.suffix in (".jsonl", ".json"):
        for line, record in json_objects(path):
            yield f"{path}:{line}", record
        return
    number = 0
    for names, columns in _columns(path):
        for values in zip(*columns, strict=True):
            number += 1
            yield f"{path}: row {number}", dict(zip(names, values, strict=True))
    if number == 0:
        raise ValueError(f"{path}: 0 rows, expected at least one; write the file again")


def write_stream(path: Path, schema: Any, rows: Iterable[Sequence[Any]]) -> int:
    """Write rows, tuples in the order of ``schema``, as one Arrow stream; return how many."""
    count, rows = 0, iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while block := list(islice(rows, _ROWS_PER_BATCH)):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*block, strict=True), schema, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            count += len(block)
    return count


def _columns(path: Path) -> Iterator[tuple[list[str], list[list[Any]]]]:
    """Yield names and values of record batches whose bytes are what they claim, strings valid UTF-8."""
    try:
        for batch in _batches(path):
            batch.validate(full=True)
            names = list(batch.schema.names)
            _refuse_twice(path, names)
            yield names, [column.to_pylist() for column in batch.columns]
    # Overflow: a date beyond Python's. Unicode: a column's name.
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason if reason.isprintable() else shown(reason)
        raise ValueError(
            f"{path}: not a whole {path.suffix.removeprefix('.')} file ({reason}); copy or write it again"
        ) from error


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refused(str(path), f"column {shown(twice)} twice", "each column once", "rename one")


def _batches(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_BATCH)
        return
    if path.suffix != ".arrow":
        raise ValueError(f"{path}: ending {path.suffix!r} is not known; expected .arrow, .parquet or .jsonl; rename the file")
    with pa.memory_map(str(path)) as source:
        is_file_format = source.read(len(_MAGIC_OF_FILE)) == _MAGIC_OF_FILE
        source.seek(0)
        if is_file_format:
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        yield from pa.ipc.open_stream(source)
