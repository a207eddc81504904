"""What one would push to a hub: a student with its card, and the score table that taught it as a dataset with a card of its own.

    student/    a plain sentence-transformers folder, its vectors unchanged
    scores/     rows.parquet, texts and labels as a trainer takes them; table.parquet, ids and labels as the table has them

No path of this machine and no host name is written; what licence applies is left to the owner, and the cards say so. Publishes by
one rename. R rows, V dims of a vector.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsekd.artifact import (
    Artifact,
    IntegrityError,
    checksum_of_file,
    read_manifest,
    verify,
    write_file_atomically,
    write_manifest,
)
from sparsekd.exchange.hub_cards import ROWS, TABLE, scores_card, student_card
from sparsekd.exchange.source import Source, read_source
from sparsekd.exchange.target import exported, require_free
from sparsekd.labels.score_table import ScoreTable
from sparsekd.mining.shards import read_shard
from sparsekd.provenance import provenance
from sparsekd.report.text import paths_in, without_paths_in
from sparsekd.training.rows import LABEL_COLUMN, text_columns

HUB_STAGE = "exchange/hub-folder v1"
_CARD = "README.md"
_ROWS_PER_BATCH = 256  # a vector of 30,522 dims is 122 KB: 31 MB a batch


@dataclass(frozen=True)
class HubFolder:
    """What was written."""

    num_rows: int
    has_texts: bool


def export_hub_folder(
    student_folder: Path,
    table_folder: Path,
    target: Path,
    *,
    collection: Path | None = None,
    texts: bool | None = None,
    overwrite: bool = False,
) -> HubFolder:
    """Write a trained student and the table it was trained on as ``target``, a new folder. Nothing is left if anything fails.

    Without ``texts`` the dataset has ids and labels alone; None leaves texts out where the recipe that student or table was made
    by said ``[collection] publish_texts = false``. Raises ValueError if the student was trained on another table, the target
    exists, or the collection's texts are not those that were scored; IntegrityError if either folder is not what was published.
    """
    require_free(target, overwrite)
    student, table = _open_student(student_folder), ScoreTable.open(table_folder)
    trained_on = student.manifest["fields"].get("table")
    if trained_on != table.key:
        raise ValueError(
            f"{student_folder}: was trained on table {trained_on}, not on {table.key}; give CACHE/tables/{trained_on}"
        )
    fields: dict[str, Any] = {"stage": HUB_STAGE, "student": student.key, "table": table.key}
    source = None
    if texts if texts is not None else _may_publish(student) and _may_publish(table.artifact):
        source, fields["collection"] = read_source(table, collection)
    places = [str(path.absolute()) for path in (student_folder, table_folder, target, collection) if path is not None]
    extra: dict[str, Any] = without_paths_in(provenance(()), places)
    with exported(target, overwrite=overwrite, fields=fields, extra=extra) as folder:
        _write_student(student, folder / "student")
        _write_scores(table, source, folder / "scores")
        extra["counts"] = {"rows": len(table)}
    return HubFolder(len(table), source is not None)


def _open_student(folder: Path) -> Artifact:
    """Return the student's artifact, every byte verified."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "student":
        raise IntegrityError(f"{folder}: holds {manifest.get('kind')!r}, expected a student; give a folder CACHE/students/KEY")
    artifact = Artifact(folder, manifest)
    missing = [name for name in manifest["files"] if not (folder / name).is_file()]
    if missing:
        raise IntegrityError(f"{folder / missing[0]}: missing, its manifest lists it; train the student again")
    verify(artifact)
    return artifact


def _may_publish(artifact: Artifact) -> bool:
    """Whether the recipe that made it lets texts out; artifacts older than the question, and imported tables, say nothing."""
    return bool(artifact.manifest.get("recipe", {}).get("collection", {}).get("publish_texts", True))


def _write_student(student: Artifact, folder: Path) -> None:
    """Copy what the manifest lists; card and manifest without paths, and the card with a word on the licence."""
    known = paths_in(student.manifest)
    manifest = without_paths_in(student.manifest, known)
    for name in student.manifest["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(student.folder / name, folder / name)
    card = folder / _CARD
    write_file_atomically(card, student_card(card.read_text(encoding="utf-8"), known).encode("utf-8"))
    manifest["files"][_CARD] = {"bytes": card.stat().st_size, "xxh3_128": checksum_of_file(card)}
    write_manifest(folder, manifest)


def _write_scores(table: ScoreTable, source: Source | None, folder: Path) -> None:
    import pyarrow.parquet

    folder.mkdir()
    shards = (read_shard(path, table.artifact) for path in table.shard_paths)
    first = next(shards)
    with pyarrow.parquet.ParquetWriter(folder / TABLE, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for shard in shards:
            writer.write_table(shard)
    columns: list[str] = []
    if source is not None:
        schema = _rows_schema(table)
        columns = schema.names
        rows = _texts_and_vectors(source) if table.kind == "embedding" else _texts_and_labels(source)
        with pyarrow.parquet.ParquetWriter(folder / ROWS, schema, compression="zstd") as writer:
            for batch in _batches(schema, rows):
                writer.write_batch(batch)
    write_file_atomically(folder / _CARD, scores_card(table, columns).encode("utf-8"))


def _rows_schema(table: ScoreTable) -> Any:
    label = {"none": None, "similarity": pa.float32()}.get(table.kind, pa.list_(pa.float32()))
    fields = [pa.field(name, pa.string()) for name in text_columns(table.kind, table.num_passages)]
    return pa.schema(fields + ([] if label is None else [pa.field(LABEL_COLUMN, label)]))


def _texts_and_labels(source: Source) -> Iterator[tuple[Any, ...]]:
    """Yield the texts of each row, then its label where the kind has one."""
    kind = source.table.kind
    for query_id, passage_ids, labels in source.table.rows():
        texts = (source.query(query_id), *map(source.passage, passage_ids))
        if kind == "none":
            yield texts
        else:
            yield (*texts, labels[0] if kind == "similarity" else labels)


def _texts_and_vectors(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield each text with its vector, float32 [V]."""
    table = source.table
    for path in table.shard_paths:
        for batch in read_shard(path, table.artifact).to_batches(max_chunksize=_ROWS_PER_BATCH):
            for row in batch.to_pylist():
                vector = np.zeros(int(table.contract.dimension or 0), dtype=np.float32)
                vector[row["indices"]] = row["values"]
                yield (source.query if row["role"] == "query" else source.passage)(row["text_id"]), vector


def _batches(schema: Any, rows: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    rows = iter(rows)
    while block := list(islice(rows, _ROWS_PER_BATCH)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*block, strict=True), schema, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
