"""Arrow IPC *stream* shards of a published artifact: written whole, read only after their checksums agree.

The stream format is what ``datasets.Dataset.from_file`` loads; a stream cut at a batch boundary loads fewer rows without an
error and most flipped bits go unseen, so ``open_shards`` compares every byte with the manifest first.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from sparsekd.artifact import Artifact, IntegrityError, naming, read_manifest, verify

ROWS_PER_SHARD = 50_000


def write_shards(folder: Path, stem: str, shards: Iterable[pa.Table], num_shards: int) -> dict[str, int]:
    """Write one file per table, ``<stem>-00000-of-0000N.arrow``; return rows by file name, for the manifest."""
    rows = {}
    for number, table in enumerate(shards):
        name = f"{stem}-{number:05d}-of-{num_shards:05d}.arrow"
        with naming(folder / name), pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        rows[name] = table.num_rows
    return rows


def open_shards(folder: Path, kind: str) -> tuple[Artifact, list[Path]]:
    """Return the verified artifact and its shards in order; IntegrityError names the file that is not what was published."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != kind:
        raise IntegrityError(f"{folder}: holds {manifest.get('kind')!r}, expected {kind!r}; give a folder of {kind}")
    artifact = Artifact(folder, manifest)
    missing = [name for name in sorted(manifest["files"]) if not (folder / name).is_file()]
    if missing:
        raise IntegrityError(f"{folder / missing[0]}: missing, its manifest lists it; remove {folder} and rerun")
    verify(artifact)
    return artifact, [folder / name for name in sorted(manifest.get("shards", {}))]


def read_shard(path: Path, artifact: Artifact) -> pa.Table:
    """Return a shard as a memory-mapped ``pyarrow.Table``; IntegrityError if it has other rows than its manifest says."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(f"{path}: not an Arrow stream ({error}); remove {artifact.folder} and rerun") from error
    expected = artifact.manifest["shards"][path.name]
    if table.num_rows != expected:
        raise IntegrityError(f"{path}: {table.num_rows} rows, its manifest says {expected}; remove {artifact.folder} and rerun")
    return table
