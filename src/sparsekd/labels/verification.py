"""What the rows of a score table's shard must be, whatever its checksum says: checked once on opening, a pass over the columns.

Raises IntegrityError naming the shard, how many rows are wrong and the first of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sparsekd.artifact import IntegrityError


def check_rows(path: Path, table: Any, *, label_column: str | None, dimension: int | None) -> None:
    """Refuse nulls, empty ids, a passage twice in a row, labels that are not finite, similarities outside of 0..1.

    ``dimension`` is the width of an embedding table's vectors, None for other kinds.
    """
    for column in table.columns:
        _refuse_nulls_and_empty_ids(path, column.combine_chunks())
    if label_column is not None:
        _check_labels(path, table, label_column)
    if dimension is not None:
        _check_vectors(path, table, dimension)
    else:
        _refuse_repeated_passages(path, table)


def matrix_of(table: Any, column: str) -> NDArray[np.float32]:
    """Return float32 [rows, width] of a column of numbers or of fixed-size lists of numbers."""
    values = table[column].combine_chunks()
    flat = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
    matrix: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return matrix


def _refuse_nulls_and_empty_ids(path: Path, column: Any) -> None:
    is_list = pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)
    values = column.flatten() if is_list else column
    if column.null_count or values.null_count:
        raise IntegrityError(f"{path}: holds nulls; rebuild the table")
    if pa.types.is_string(values.type) and pc.any(pc.equal(values, "")).as_py():
        raise IntegrityError(f"{path}: holds an empty id; rebuild the table")


def _check_labels(path: Path, table: Any, label_column: str) -> None:
    values = table[label_column].combine_chunks()
    flat = values if pa.types.is_floating(values.type) else values.flatten()
    labels: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False)
    not_finite = int((~np.isfinite(labels)).sum())
    if not_finite:
        raise IntegrityError(f"{path}: {not_finite} labels of {label_column} are not finite; rebuild the table")
    outside = int(((labels < 0) | (labels > 1)).sum()) if label_column == "similarity" else 0
    if outside:
        raise IntegrityError(f"{path}: {outside} labels of similarity are outside of 0..1; rebuild the table")


def _refuse_repeated_passages(path: Path, table: Any) -> None:
    codes = table["passage_ids"].combine_chunks().flatten().dictionary_encode().indices.to_numpy()
    ordered_RN = np.sort(codes.reshape(len(table), -1), axis=1)
    repeated = np.flatnonzero((ordered_RN[:, 1:] == ordered_RN[:, :-1]).any(axis=1))
    if repeated.size:
        first = f"query {table['query_id'][int(repeated[0])].as_py()!r}"
        raise IntegrityError(f"{path}: {repeated.size} rows hold a passage twice (first: {first}); rebuild the table")


def _check_vectors(path: Path, table: Any, dimension: int) -> None:
    roles = set(pc.unique(table["role"]).to_pylist())
    if not roles <= {"query", "passage"}:
        raise IntegrityError(f"{path}: roles are {sorted(roles)}, expected query and passage; rebuild the table")
    lists = {name: table[name].combine_chunks() for name in ("indices", "values")}
    lengths = {name: np.diff(column.offsets.to_numpy()) for name, column in lists.items()}
    uneven = np.flatnonzero(lengths["indices"] != lengths["values"])
    _refuse_rows(path, table, uneven, "have another number of values than of indices")
    _refuse_rows(path, table, np.flatnonzero(lengths["indices"] == 0), "have no active dim")
    indices = lists["indices"].flatten().to_numpy()
    row_of_entry = np.repeat(np.arange(len(table)), lengths["indices"])
    outside = (indices < 0) | (indices >= dimension)
    _refuse_rows(path, table, np.unique(row_of_entry[outside]), f"have indices outside of 0..{dimension - 1}")
    descends = (np.diff(indices) <= 0) & (row_of_entry[1:] == row_of_entry[:-1])
    _refuse_rows(path, table, np.unique(row_of_entry[1:][descends]), "have indices that do not ascend")


def _refuse_rows(path: Path, table: Any, rows: NDArray[Any], why: str) -> None:
    if rows.size:
        first = int(rows[0])
        text = f"{table['role'][first].as_py()} {table['text_id'][first].as_py()!r}"
        raise IntegrityError(f"{path}: {rows.size} rows {why} (first: {text}); rebuild the table")
