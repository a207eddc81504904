"""Looking after a bank: list its folders, verify them, take damaged segments out, sweep what crashes left behind.

``repair`` removes nothing: what it takes out lies in ``damaged/`` inside the folder, and only pairs that no sound segment
holds are scored again. Sweeping touches unpublished files only.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from sparsekd.artifact import MANIFEST, IntegrityError, fsync_path, is_abandoned, key_of
from sparsekd.bank import embeddings, scores, sparse
from sparsekd.bank.manifest import (
    IDENTITY,
    LOCK,
    Manifest,
    locked,
    read_identity,
    read_manifest,
    write_identity,
    write_manifest,
)
from sparsekd.bank.segment import SUFFIX, SegmentEntry, fault_of, open_segment, owner_of

DAMAGED = "damaged"
_NUM_ROWS = {scores.KIND: scores.num_pairs_of, embeddings.KIND: embeddings.num_texts_of, sparse.KIND: sparse.num_texts_of}
_FIND_FAULT = {scores.KIND: scores.find_fault, embeddings.KIND: embeddings.find_fault, sparse.KIND: sparse.find_fault}
_UNLISTED_SECONDS = 3600  # a segment is renamed and listed under one lock, so minutes would do


@dataclass(frozen=True)
class Repair:
    """What ``repair`` did to one folder."""

    taken_out: tuple[str, ...]
    """What was wrong, file by file."""
    num_segments: int
    """Segments that are sound and stay."""
    num_rows: int
    """Pairs or texts in them."""


@dataclass(frozen=True)
class Leftover:
    """An unpublished file or folder."""

    path: Path
    num_bytes: int
    why: str


def bank_folders(root: Path) -> list[Path]:
    """Return the folders of all teachers, then of all encoders, by key."""
    return [path for kind in _NUM_ROWS for path in sorted((root / kind).glob("[!.]*")) if path.is_dir()]


def find_folder(root: Path, prefix: str) -> Path:
    """Return the one folder whose key begins with ``prefix``; ValueError if none or several do.

    A dense teacher's scores and its embeddings have one key; ``scores/`` or ``embeddings/`` before it says which.
    """
    named = {path: f"{path.parent.name}/{path.name}" for path in bank_folders(root)}
    found = [path for path, name in named.items() if (name if "/" in prefix else path.name).startswith(prefix)]
    if len(found) != 1:
        keys = ", ".join(named[path] for path in (found or list(named))[:8])
        what = f"fits {len(found)} keys; say which of {keys}" if found else f"fits no key; there are: {keys or 'none'}"
        raise ValueError(f"{root}: {prefix!r} {what}")
    return found[0]


def find_damage(folder: Path) -> list[str]:
    """Read everything a folder lists and return what is wrong with it, one line per file; [] if it is sound."""
    damage = []
    try:
        read_identity(folder)
    except IntegrityError as error:
        damage.append(str(error))
    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        return [*damage, str(error)]
    for entry in manifest.segments:
        try:
            _checked(folder, entry)
        except FileNotFoundError:
            if entry in read_manifest(folder).segments:  # else compaction has just replaced it
                damage.append(_missing(folder, entry))
        except IntegrityError as error:
            damage.append(str(error))
    return damage


def repair(folder: Path) -> Repair:
    """Move damaged segments aside and list the sound ones; rebuild a damaged manifest or identity from the segments.

    Raises ValueError if the folder stands under another key's name, or holds nothing to rebuild it from.
    """
    with locked(folder / LOCK):
        taken_out = _repair_identity(folder)
        try:
            manifest = read_manifest(folder)
            candidates: Sequence[SegmentEntry] = manifest.segments
        except IntegrityError as error:
            # Order tells only between racing writers' scores of one pair, so the order of names will do.
            candidates = [SegmentEntry(path.name, -1, path.stat().st_size) for path in sorted(folder.glob(f"*{SUFFIX}"))]
            manifest = Manifest(folder.parent.name, folder.name)
            taken_out += [str(error), *_set_aside(folder, MANIFEST)]
        sound, schema = [], manifest.schema
        for entry in candidates:
            try:
                batch = _checked(folder, entry)
            except FileNotFoundError:
                taken_out.append(_missing(folder, entry))
            except IntegrityError as error:
                taken_out += [str(error), *_set_aside(folder, entry.name)]
            else:
                sound.append(replace(entry, rows=_NUM_ROWS[folder.parent.name](batch)))
                schema = batch.schema.remove_metadata().to_string()
        repaired = replace(manifest, generation=manifest.generation + 1, schema=schema, segments=tuple(sound))
        if taken_out:
            write_manifest(folder, repaired)
        return Repair(tuple(taken_out), len(sound), repaired.num_rows)


def find_leftovers(root: Path) -> list[Leftover]:
    """Return what nobody will publish any more: temporary files of dead processes, segments that no manifest lists."""
    leftovers = [
        Leftover(path, _size(path), "temporary, its process is gone") for path in _temporaries(root) if is_abandoned(path)
    ]
    for folder in bank_folders(root):
        try:
            listed = {entry.name for entry in read_manifest(folder).segments}
        except IntegrityError:
            continue  # repair needs them
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if path.name not in listed and _age_seconds(path) > _UNLISTED_SECONDS:
                leftovers.append(Leftover(path, _size(path), "segment that its manifest does not list"))
    return leftovers


def remove(leftover: Leftover) -> None:
    """Delete a leftover, unless it was published meanwhile; of a symbolic link the link, never what it leads to."""
    path = leftover.path
    if path.suffix == SUFFIX:
        with locked(path.parent / LOCK):
            if path.name not in {entry.name for entry in read_manifest(path.parent).segments}:
                path.unlink(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checked(folder: Path, entry: SegmentEntry) -> pa.RecordBatch:
    """Open a segment afresh, with every check; -1 rows are not compared."""
    batch = open_segment(folder / entry.name, folder.parent.name, folder.name, entry)
    fault = fault_of(batch, _FIND_FAULT[folder.parent.name])
    if fault is not None:
        raise IntegrityError(f"{folder / entry.name}: {fault}, which nothing here writes")
    if entry.rows not in (-1, rows := _NUM_ROWS[folder.parent.name](batch)):
        raise IntegrityError(f"{folder / entry.name}: {rows} rows, its manifest says {entry.rows}")
    return batch


def _missing(folder: Path, entry: SegmentEntry) -> str:
    return f"{folder / entry.name}: missing, its manifest lists it with {entry.rows:,} rows"


def _repair_identity(folder: Path) -> list[str]:
    """Rewrite a damaged identity from a sound segment; return what was wrong."""
    try:
        read_identity(folder)
        return []
    except IntegrityError as error:
        problem = str(error)
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            owner = owner_of(open_segment(path, folder.parent.name, folder.name))
        except IntegrityError:
            continue
        if owner is not None and key_of(owner.identity) == folder.name:
            aside = _set_aside(folder, IDENTITY) if (folder / IDENTITY).exists() else []
            write_identity(folder, owner.identity)
            return [problem, *aside]
    raise ValueError(
        f"{problem}; no segment here is of {folder.name}, so there is nothing to rebuild it from: " + _advice(folder)
    )


def _advice(folder: Path) -> str:
    """Return what to do with a folder that holds nothing of its key."""
    try:
        key = key_of(json.loads((folder / IDENTITY).read_bytes()))
        return f"its identity says it is {key}; move the folder back to that name"
    except (OSError, ValueError):
        return "move the folder away"


def _set_aside(folder: Path, name: str) -> list[str]:
    """Move a file into the folder of damaged ones, under a name that is free, and say so."""
    if not (folder / name).exists():
        return []
    aside = folder / DAMAGED
    aside.mkdir(exist_ok=True)
    number = sum(1 for _ in aside.iterdir())
    target = aside / f"{number}-{name}"
    (folder / name).replace(target)
    fsync_path(aside)
    return [f"  moved to {target}"]


def _temporaries(root: Path) -> Iterator[Path]:
    """Yield unpublished files and folders, outermost only."""
    for pattern in ("*/.tmp-*", "*/[!.]*/.tmp-*"):
        yield from sorted(root.glob(pattern))


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # merged meanwhile
        return 0.0


def _size(path: Path) -> int:
    is_folder = path.is_dir() and not path.is_symlink()
    return sum(inner.lstat().st_size for inner in path.rglob("*")) if is_folder else path.lstat().st_size
