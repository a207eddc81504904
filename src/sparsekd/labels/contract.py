"""What a score table is, by kind: its columns, and the metadata in every shard's schema that say so.

Six columns are possible: query_id, passage_ids (positive first), and the label's, or for embeddings role, text_id, indices,
values. The metadata say which kind it is, so that a trainer need not guess from widths (the library's MarginMSE does, and reads
a list of the wrong width as the other kind without a word); ``datasets`` drops them on loading, so ask ``ScoreTable`` first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pyarrow as pa

from sparsekd.artifact import IntegrityError

TABLE_VERSION = 1
"""Raised when the same fields would give other rows or labels."""
KIND = "score-table"

Kind = Literal["score_list", "margin", "none", "similarity", "embedding"]
Role = Literal["query", "passage"]

LABEL_COLUMNS: dict[Kind, str | None] = {
    "score_list": "gold_sim",
    "margin": "margin",
    "none": None,
    "similarity": "similarity",
    "embedding": "values",
}
ORDERS: dict[Kind, str] = {
    "score_list": "positive first",
    "margin": "positive first",
    "none": "positive first",
    "similarity": "query, passage",
    "embedding": "one text",
}
_LEAST_PASSAGES: dict[Kind, int] = {"score_list": 2, "margin": 2, "none": 1, "similarity": 1, "embedding": 0}


@dataclass(frozen=True)
class Contract:
    """What the metadata of every shard say, besides kind, order and version."""

    num_passages: int
    """Per row; 1 for similarity, 0 for embedding."""
    teachers: tuple[Mapping[str, Any], ...] = ()
    """{"identity": key, "weight": factor}, and "calibration" where teachers' differ; without names, which change no label. Empty
    where no teacher labels."""
    calibration: Mapping[str, Any] | None = None
    """Settings that acted on every teacher; None where no score was calibrated, or each teacher has its own."""
    rescale: Mapping[str, Any] | None = None
    """Settings that acted on the combined scores; None where none did."""
    label_range: tuple[float, float] | None = None
    """similarity: combined gold_sim at 0 and at 1."""
    dimension: int | None = None
    """embedding: width V of the vectors."""
    vocabulary: str | None = None
    """embedding: ``vocabulary_digest`` of the teacher, None where its dims are no terms."""


def table_schema(kind: Kind, contract: Contract) -> pa.Schema:
    """Return the Arrow schema of a kind, its metadata included."""
    num_passages = contract.num_passages
    ids = [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_ids", pa.list_(pa.string(), num_passages), nullable=False),
    ]
    fields: dict[Kind, list[Any]] = {
        "score_list": [*ids, pa.field("gold_sim", pa.list_(pa.float32(), num_passages), nullable=False)],
        "margin": [*ids, pa.field("margin", pa.list_(pa.float32(), max(0, num_passages - 1)), nullable=False)],
        "none": ids,
        "similarity": [*ids, pa.field("similarity", pa.float32(), nullable=False)],
        "embedding": [
            pa.field("role", pa.string(), nullable=False),
            pa.field("text_id", pa.string(), nullable=False),
            pa.field("indices", pa.list_(pa.int32()), nullable=False),
            pa.field("values", pa.list_(pa.float32()), nullable=False),
        ],
    }
    said: dict[str, Any] = {
        "rescale": contract.rescale and dict(contract.rescale),
        "range": contract.label_range,
        "dimension": contract.dimension,
        "vocabulary": contract.vocabulary,
    }
    metadata = {
        "sparsekd.kind": kind,
        "sparsekd.order": ORDERS[kind],
        "sparsekd.num_passages": str(num_passages),
        "sparsekd.teachers": json.dumps([dict(teacher) for teacher in contract.teachers], sort_keys=True),
        "sparsekd.calibration": json.dumps(contract.calibration and dict(contract.calibration), sort_keys=True),
        "sparsekd.version": str(TABLE_VERSION),
        **{f"sparsekd.{name}": json.dumps(value) for name, value in said.items() if value is not None},
    }
    return pa.schema(fields[kind], metadata=metadata)


def read_metadata(path: Path, schema: Any) -> tuple[Kind, Contract]:
    """Return kind and contract of a shard's schema; IntegrityError, naming the shard and the entry, where they are not ours."""
    metadata = _decoded(schema)
    found = metadata.get("sparsekd.kind")
    if found not in get_args(Kind):
        expected = ", ".join(repr(name) for name in get_args(Kind))
        raise IntegrityError(f"{path}: metadata sparsekd.kind is {found!r}, expected one of {expected}; rebuild the table")
    kind = cast(Kind, found)
    wanted = {"sparsekd.order": ORDERS[kind], "sparsekd.version": str(TABLE_VERSION)}
    for name, value in wanted.items():
        if metadata.get(name) != value:
            raise IntegrityError(f"{path}: metadata {name} is {metadata.get(name)!r}, expected {value!r}; rebuild the table")
    try:
        optional = ("rescale", "range", "dimension", "vocabulary")
        said = {name: json.loads(metadata.get(f"sparsekd.{name}", "null")) for name in optional}
        contract = Contract(
            num_passages=int(metadata["sparsekd.num_passages"]),
            teachers=tuple(json.loads(metadata["sparsekd.teachers"])),
            calibration=json.loads(metadata["sparsekd.calibration"]),
            rescale=said["rescale"],
            label_range=None if said["range"] is None else (float(said["range"][0]), float(said["range"][1])),
            dimension=said["dimension"],
            vocabulary=said["vocabulary"],
        )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise IntegrityError(f"{path}: metadata is incomplete ({error!r}); rebuild the table") from error
    _check_contract(path, kind, contract)
    return kind, contract


def refuse_other_scale(path: Path, schema: Any, first_path: Path, first: Any) -> None:
    """Raise ValueError, naming what differs, if a shard's labels are not of the first shard's kind, teachers and scale.

    No IntegrityError: the shards are whole and as their manifest says, somebody has put together what does not belong together.
    """
    theirs, ours = (_decoded(part) for part in (schema, first))
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{path}: metadata {name} is {theirs.get(name)!r}, but {first_path.name} says {ours.get(name)!r}: labels on "
                "different scales in one table; rebuild the table"
            )


def _decoded(schema: Any) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def _check_contract(path: Path, kind: Kind, contract: Contract) -> None:
    least, found = _LEAST_PASSAGES[kind], contract.num_passages
    if found < least or (least < 1 and found) or (kind == "similarity" and found != 1):
        expected = {
            "none": "at least a positive",
            "similarity": "one",
            "embedding": "none: one text per row",
        }.get(kind, "a positive and at least one negative")
        raise IntegrityError(f"{path}: {found} passages per row, expected {expected}")
    if (kind == "embedding") != (contract.dimension is not None) or (kind == "similarity") != (contract.label_range is not None):
        raise IntegrityError(f"{path}: metadata sparsekd.dimension or sparsekd.range do not fit a {kind} table; rebuild the table")
