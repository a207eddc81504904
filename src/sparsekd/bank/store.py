"""A bank folder: append-only segments under one manifest, shared by any number of processes.

A segment is written and flushed under a temporary name; renaming it and listing it happen together under a lock that the
kernel releases if its holder dies. So a crash loses at most the batch in flight, and readers, which take no lock, see whole
states only. Small segments are merged as they gather: n appends of equal size leave about log2(n) segments.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from sparsekd.artifact import IntegrityError, fsync_path, key_of, make_folder, temporary_name, write_file_atomically
from sparsekd.bank.manifest import (
    COMPACTION_LOCK,
    IDENTITY,
    LOCK,
    REFERENCE,
    Manifest,
    decode_manifest,
    locked,
    read_identity,
    read_manifest,
    read_manifest_bytes,
    repair_hint,
    write_identity,
    write_manifest,
)
from sparsekd.bank.segment import Owner, SegmentEntry, fault_of, open_segment, write_segment

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """What a store needs to know of its segments."""

    kind: str
    """Name of the folder above the keys."""
    max_segment_bytes: int
    """Segments are not merged beyond this size."""
    num_rows: Callable[[pa.RecordBatch], int]
    """Pairs or texts in a batch."""
    merge: Callable[[Sequence[pa.RecordBatch], Path], pa.RecordBatch]
    """Join sorted batches into one; of equal keys the first batch's row stays. The folder is for what memory would not hold."""
    find_fault: Callable[[pa.RecordBatch], str | None]
    """Say what in a batch no append would have written: another column, keys out of order, a number that is not finite."""


class SegmentStore:
    """The segments of one identity; the folder appears with the first ``publish``."""

    def __init__(self, root: Path, layout: Layout, identity: Mapping[str, Any], reference: str = "") -> None:
        """Bind to ``root/<kind>/<key>``; IntegrityError if that folder is damaged or another identity's.

        ``reference``, how people call the model, is written beside the identity when the folder is made; it enters no key.
        """
        self._reference = reference
        self._layout = layout
        self._owner = Owner(layout.kind, key_of(identity), dict(identity))
        self.folder = root / layout.kind / self._owner.key
        self._opened: dict[str, pa.RecordBatch] = {}
        self._raw = b""
        self._manifest = Manifest(layout.kind, self._owner.key)
        if self.folder.exists():
            read_identity(self.folder)
            self.manifest()

    def manifest(self) -> Manifest:
        """Return the state published last, by whichever process."""
        if self.folder.exists():
            raw = read_manifest_bytes(self.folder)
            if raw != self._raw:
                self._manifest, self._raw = decode_manifest(self.folder, raw), raw
        return self._manifest

    def batches(self) -> list[pa.RecordBatch]:
        """Return every segment, mapped, in manifest order; each is verified once per store object.

        Raises IntegrityError naming the segment that is missing, cut, changed or foreign.
        """
        while True:
            manifest = self.manifest()
            try:
                opened = {entry.name: self._opened.get(entry.name) or self._open(entry) for entry in manifest.segments}
            except FileNotFoundError as error:
                if self.manifest() == manifest:  # nobody replaced it
                    raise IntegrityError(
                        f"{error.filename}: missing, its manifest lists it; {repair_hint(self.folder)}"
                    ) from error
                continue
            self._opened = opened  # what compaction replaced is unmapped here
            return list(opened.values())

    def publish(self, batch: pa.RecordBatch) -> None:
        """Add one sorted batch for good; when this returns it is on disk and seen by every process.

        Raises ValueError if its columns differ from the store's, OSError if the disk fails; then the store is as before.
        """
        self._create_folder()
        schema = batch.schema.remove_metadata().to_string()
        temporary, entry = write_segment(self.folder, batch, self._layout.num_rows(batch), self._owner)
        try:
            with locked(self.folder / LOCK):
                manifest = read_manifest(self.folder)
                if manifest.schema not in ("", schema):
                    raise ValueError(f"{self.folder}: holds {manifest.schema!r}, expected the same columns, found {schema!r}")
                if entry not in manifest.segments:
                    self._replace(manifest, temporary, entry, (*manifest.segments, entry), schema)
        finally:
            temporary.unlink(missing_ok=True)

    def compact(self) -> None:
        """Merge the newest segments if it is time, unless another process is at it; readers and writers go on meanwhile.

        A full disk is logged, not raised: everything stays as it was and nothing is lost but speed.
        """
        try:
            with locked(self.folder / COMPACTION_LOCK, wait=False) as is_ours:
                names = _due([(entry.name, entry.bytes) for entry in self.manifest().segments], self._layout.max_segment_bytes)
                if is_ours and names:
                    self._merge(names)
        except OSError as error:
            _log.warning("%s: stored, but its segments could not be merged: %s", self.folder, error)

    def _merge(self, names: list[str]) -> None:
        """Write the merged segment without the lock, then swap it in under the lock."""
        self.batches()
        sources = [self._opened[name] for name in names if name in self._opened]
        if len(sources) != len(names):
            return  # repaired meanwhile
        merged = self._layout.merge(sources, self.folder)
        temporary, entry = write_segment(self.folder, merged, self._layout.num_rows(merged), self._owner)
        try:
            with locked(self.folder / LOCK):
                self._swap(temporary, entry, names)
        finally:
            temporary.unlink(missing_ok=True)

    def _swap(self, temporary: Path, entry: SegmentEntry, names: list[str]) -> None:
        """Put the merged segment where its sources stand, if all of them still do, and remove them."""
        manifest = read_manifest(self.folder)
        listed = [segment.name for segment in manifest.segments]
        start = listed.index(names[0]) if names[0] in listed else len(listed)
        if listed[start : start + len(names)] != names:
            return  # repaired or merged meanwhile; the next append tries again
        kept = manifest.segments[:start], manifest.segments[start + len(names) :]
        self._replace(manifest, temporary, entry, (*kept[0], entry, *kept[1]), manifest.schema)
        # Only now, and under the lock: a writer that publishes equal content again does so before or after, not between.
        for name in {*names} - {segment.name for segment in read_manifest(self.folder).segments}:
            (self.folder / name).unlink(missing_ok=True)

    def _replace(
        self, manifest: Manifest, temporary: Path, entry: SegmentEntry, segments: tuple[SegmentEntry, ...], schema: str
    ) -> None:
        """Rename a written segment to its name, then list it; the caller holds the lock."""
        temporary.replace(self.folder / entry.name)
        fsync_path(self.folder)
        write_manifest(self.folder, replace(manifest, generation=manifest.generation + 1, schema=schema, segments=segments))

    def _open(self, entry: SegmentEntry) -> pa.RecordBatch:
        try:
            batch = open_segment(self.folder / entry.name, self._owner.kind, self._owner.key, entry)
            fault = fault_of(batch, self._layout.find_fault)
            if fault is not None:
                raise IntegrityError(f"{self.folder / entry.name}: {fault}, which nothing here writes")
        except IntegrityError as error:
            raise IntegrityError(f"{error}; {repair_hint(self.folder)}") from error
        if self._layout.num_rows(batch) != entry.rows:
            raise IntegrityError(
                f"{self.folder / entry.name}: {self._layout.num_rows(batch)} rows, its manifest says {entry.rows}; "
                f"{repair_hint(self.folder)}"
            )
        return batch

    def _create_folder(self) -> None:
        """Publish the folder, with identity and empty manifest, by rename: a folder without them is a damaged one."""
        if self.folder.exists():
            return
        make_folder(self.folder.parent)
        temporary = self.folder.parent / temporary_name(self.folder.name)
        temporary.mkdir()
        try:
            write_identity(temporary, self._owner.identity)
            if self._reference:
                write_file_atomically(temporary / REFERENCE, f"{self._reference}\n".encode())
            write_manifest(temporary, Manifest(self._owner.kind, self._owner.key))
            try:
                temporary.rename(self.folder)
            except OSError:
                if not (self.folder / IDENTITY).is_file():  # a real failure, not a lost race
                    raise
            fsync_path(self.folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _due(segments: Sequence[tuple[str, int]], max_bytes: int) -> list[str]:
    """Return the names of the newest segments to merge: while the next older is not much larger than the newer together.

    1.5 leaves room for appends of slightly different sizes, which still merge in pairs like the digits of a binary counter.

    >>> _due([("a", 100), ("b", 20), ("c", 10), ("d", 10)], 1000)
    ['b', 'c', 'd']
    """
    total, count = 0, 0
    for _, size in reversed(segments):
        if count and (size > 1.5 * total or total + size > max_bytes):
            break
        total, count = total + size, count + 1
    return [name for name, _ in segments[len(segments) - count :]] if count > 1 else []
