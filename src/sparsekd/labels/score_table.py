"""The score table: the contract between the stages. Ids and labels only, in Arrow IPC stream shards.

Columns: query_id; passage_ids, N of them, positive first; ``gold_sim`` float32 [N], or for margins ``margin`` float32 [N−1],
signed gold_sim(positive) − gold_sim(negative). The schema's metadata say which, so that a trainer need not guess from
widths (the library's MarginMSE does, and reads a list of the wrong width as the other kind without a word);
``datasets`` drops them on loading, so ask ``ScoreTable`` first. R rows, N passages, W labels. Opening reads every byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sparsekd.artifact import Artifact, IntegrityError
from sparsekd.mining.shards import open_shards, read_shard

TABLE_VERSION = 1
"""Raised when the same fields would give other rows or labels."""
KIND = "score-table"
ORDER = "positive first"
LABEL_COLUMNS = {"score_list": "gold_sim", "margin": "margin"}

Kind = Literal["score_list", "margin"]


def table_schema(
    kind: Kind, num_passages: int, *, teachers: Sequence[Mapping[str, Any]], calibration: Mapping[str, Any]
) -> pa.Schema:
    """Return the Arrow schema; ``teachers`` are {"identity": key, "weight": share}, without names, which change no label."""
    return pa.schema(
        [
            pa.field("query_id", pa.string(), nullable=False),
            pa.field("passage_ids", pa.list_(pa.string(), num_passages), nullable=False),
            pa.field(LABEL_COLUMNS[kind], pa.list_(pa.float32(), label_width(kind, num_passages)), nullable=False),
        ],
        metadata={
            "sparsekd.kind": kind,
            "sparsekd.order": ORDER,
            "sparsekd.num_passages": str(num_passages),
            "sparsekd.teachers": json.dumps(list(teachers), sort_keys=True),
            "sparsekd.calibration": json.dumps(dict(calibration), sort_keys=True),
            "sparsekd.version": str(TABLE_VERSION),
        },
    )


def label_width(kind: Kind, num_passages: int) -> int:
    """Return W: N scores, or N − 1 margins."""
    return num_passages if kind == "score_list" else num_passages - 1


@dataclass(frozen=True)
class ScoreTable:
    """A verified table."""

    artifact: Artifact
    shard_paths: list[Path]
    """In order; each loads with ``datasets.Dataset.from_file``."""
    kind: Kind
    num_passages: int
    teachers: list[dict[str, Any]]
    calibration: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> ScoreTable:
        """Verify and open a published table.

        Raises IntegrityError, naming the shard, if bytes, rows, metadata, columns or widths are not what was published, an id
        is empty, a row holds a passage twice, or a label is not finite.
        """
        artifact, shards = open_shards(folder, KIND)
        if not shards:
            raise IntegrityError(f"{folder}: its manifest lists no shard; remove the folder and rerun")
        first = read_shard(shards[0], artifact).schema
        kind, num_passages, teachers, calibration = _read_metadata(shards[0], first)
        expected = table_schema(kind, num_passages, teachers=teachers, calibration=calibration)
        for path in shards:
            table = read_shard(path, artifact)
            if not table.schema.equals(expected, check_metadata=True):
                raise IntegrityError(f"{path}: columns or metadata are not those of a {kind} table of {num_passages} passages")
            _check_rows(path, table, LABEL_COLUMNS[kind], num_passages)
        return cls(artifact, shards, kind, num_passages, teachers, calibration)

    @property
    def key(self) -> str:
        """The key the table was made under."""
        return self.artifact.key

    @property
    def label_column(self) -> str:
        """Name of the label column: gold_sim or margin."""
        return LABEL_COLUMNS[self.kind]

    @property
    def counts(self) -> dict[str, Any]:
        """Pairs, rows, rows dropped by reason, and the mining counts."""
        return dict(self.artifact.manifest["counts"])

    @property
    def summary(self) -> dict[str, Any]:
        """Range of the labels, margin quantiles, and the share of rows whose positive is below a negative."""
        return dict(self.artifact.manifest["summary"])

    def __len__(self) -> int:
        return sum(self.artifact.manifest["shards"].values())

    def labels(self) -> NDArray[np.float32]:
        """Return float32 [R, W]: all labels."""
        return np.concatenate([_matrix(read_shard(path, self.artifact), self.label_column) for path in self.shard_paths])

    def rows(self) -> Iterator[tuple[str, list[str], list[float]]]:
        """Yield (query_id, passage_ids, labels), in order."""
        for path in self.shard_paths:
            for batch in read_shard(path, self.artifact).to_batches(max_chunksize=1024):
                yield from zip(*(batch.column(column).to_pylist() for column in range(3)), strict=True)


def check_for_loss(table: ScoreTable, loss_name: str) -> None:
    """Raise ValueError unless a loss can learn from the table's kind.

    KL needs whole score lists: a softmax over margins leaves the positive out. MarginMSE takes both kinds; it knows scores from
    margins only by width, which ``ScoreTable.open`` has verified, so the trainer must pass exactly ``num_passages`` texts.
    """
    needs = {"SparseDistillKLDivLoss": ("score_list",), "SparseMarginMSELoss": ("score_list", "margin")}
    if loss_name not in needs:
        raise ValueError(f"[training] loss = {loss_name!r} is not a loss over score tables; expected one of {sorted(needs)}")
    if table.kind not in needs[loss_name]:
        raise ValueError(
            f'[training] loss = "{loss_name}" needs score lists of {table.num_passages} gold_sim, but {table.artifact.folder} '
            f'holds {table.num_passages - 1} margins per row; set [labels] kind = "score_list" (no teacher call) or choose '
            'loss = "SparseMarginMSELoss"'
        )


def _read_metadata(path: Path, schema: Any) -> tuple[Kind, int, list[dict[str, Any]], dict[str, Any]]:
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    kind = metadata.get("sparsekd.kind")
    wanted = {"sparsekd.order": ORDER, "sparsekd.version": str(TABLE_VERSION)}
    for name, value in wanted.items():
        if metadata.get(name) != value:
            raise IntegrityError(f"{path}: metadata {name} is {metadata.get(name)!r}, expected {value!r}; rebuild the table")
    if kind != "score_list" and kind != "margin":
        expected = "expected 'score_list' or 'margin'"
        raise IntegrityError(f"{path}: metadata sparsekd.kind is {kind!r}, {expected}; rebuild the table")
    try:
        num_passages = int(metadata["sparsekd.num_passages"])
        teachers, calibration = json.loads(metadata["sparsekd.teachers"]), json.loads(metadata["sparsekd.calibration"])
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"{path}: metadata is incomplete ({error!r}); rebuild the table") from error
    if num_passages < 2:
        raise IntegrityError(f"{path}: {num_passages} passages per row, expected a positive and at least one negative")
    return kind, num_passages, teachers, calibration


def _check_rows(path: Path, table: Any, label_column: str, num_passages: int) -> None:
    for column in table.columns:
        values = column.combine_chunks().flatten() if pa.types.is_fixed_size_list(column.type) else column
        if column.null_count or values.null_count:
            raise IntegrityError(f"{path}: holds nulls; rebuild the table")
        if pa.types.is_string(values.type) and pc.any(pc.equal(values, "")).as_py():
            raise IntegrityError(f"{path}: holds an empty id; rebuild the table")
    not_finite = int((~np.isfinite(_matrix(table, label_column))).sum())
    if not_finite:
        raise IntegrityError(f"{path}: {not_finite} labels of {label_column} are not finite; rebuild the table")
    codes = table["passage_ids"].combine_chunks().flatten().dictionary_encode().indices.to_numpy()
    ordered_RN = np.sort(codes.reshape(-1, num_passages), axis=1)
    repeated = np.flatnonzero((ordered_RN[:, 1:] == ordered_RN[:, :-1]).any(axis=1))
    if repeated.size:
        first = f"query {table['query_id'][int(repeated[0])].as_py()!r}"
        raise IntegrityError(f"{path}: {repeated.size} rows hold a passage twice (first: {first}); rebuild the table")


def _matrix(table: Any, column: str) -> NDArray[np.float32]:
    """float32 [rows, width] of a fixed-size list column."""
    values = table[column].combine_chunks()
    matrix: NDArray[np.float32] = values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return matrix
