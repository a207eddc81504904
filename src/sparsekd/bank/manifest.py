"""A bank folder's two small files: ``identity.json`` (whose it is) and ``manifest.json`` (which segments it consists of).

What the manifest does not list does not exist. It carries a checksum of itself, the owner's key and the folder's name must
agree, and any changed byte is refused. Written only under the folder's lock, replaced by rename, read without a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from sparsekd.artifact import MANIFEST, IntegrityError, key_of, write_file_atomically
from sparsekd.bank.segment import SUFFIX, SegmentEntry
from sparsekd.collection.reading import shown

IDENTITY = "identity.json"
REFERENCE = "reference.txt"
LOCK = ".lock"
COMPACTION_LOCK = ".compaction.lock"
_FORMAT = 1
_SEGMENT = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))


@dataclass(frozen=True)
class Manifest:
    """The published state of one bank folder."""

    kind: str
    key: str
    generation: int = 0
    """Counts the changes, so no two states of a folder share their bytes."""
    schema: str = ""
    """Columns of every segment; empty until the first one."""
    segments: tuple[SegmentEntry, ...] = ()
    """In the order of appending; of a pair scored twice by racing writers, the first listed counts."""

    @property
    def num_rows(self) -> int:
        """Pairs or texts over all segments; what racing writers stored twice counts twice until compaction."""
        return sum(entry.rows for entry in self.segments)

    @property
    def num_bytes(self) -> int:
        """Size of all segments."""
        return sum(entry.bytes for entry in self.segments)

    def encode(self) -> bytes:
        """Return the file's exact bytes."""
        fields = {**asdict(self), "format": _FORMAT}
        text = json.dumps(fields, sort_keys=True)
        return (
            json.dumps({**fields, "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}, indent=1, sort_keys=True) + "\n"
        ).encode()


def repair_hint(folder: Path) -> str:
    """Return what to do about a damaged bank folder: ``<cache>/bank/<kind>/<key>``."""
    return f"run: sparsekd bank repair {folder.name} --cache {folder.parent.parent.parent}"


def decode_manifest(folder: Path, raw: bytes) -> Manifest:
    """Parse a manifest's bytes; IntegrityError unless they are exactly what ``encode`` wrote for this folder."""
    path = folder / MANIFEST
    try:
        fields = json.loads(raw)
        entries = tuple(SegmentEntry(**entry) for entry in fields["segments"])
        manifest = Manifest(fields["kind"], fields["key"], fields["generation"], fields["schema"], entries)
        is_intact = manifest.encode() == raw
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a bank manifest ({error!r}); {repair_hint(folder)}") from error
    foreign = next((entry for entry in entries if not _is_segment(entry)), None)
    if foreign is not None:  # its checksum is no signature, and names here are opened, moved and removed
        raise IntegrityError(f"{path}: lists {shown(foreign.name)}, which names no segment of this folder; {repair_hint(folder)}")
    if not is_intact:
        raise IntegrityError(f"{path}: changed since it was written, its own checksum does not fit; {repair_hint(folder)}")
    if (manifest.kind, manifest.key) != (folder.parent.name, folder.name):
        raise IntegrityError(
            f"{path}: belongs to {manifest.kind}/{manifest.key}, expected {folder.parent.name}/{folder.name}; "
            "a bank folder answers only under its own name: move it back"
        )
    return manifest


def _is_segment(entry: SegmentEntry) -> bool:
    is_name = isinstance(entry.name, str) and _SEGMENT.fullmatch(entry.name) is not None
    return is_name and all(type(number) is int and number >= 0 for number in (entry.rows, entry.bytes))


def read_manifest_bytes(folder: Path) -> bytes:
    """Return the manifest's bytes; IntegrityError if the folder stands without one."""
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(f"{folder / MANIFEST}: missing; {repair_hint(folder)}") from error


def read_manifest(folder: Path) -> Manifest:
    """Return the folder's manifest, checked."""
    return decode_manifest(folder, read_manifest_bytes(folder))


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the identity a folder was made for; IntegrityError unless its digest is the folder's name."""
    path = folder / IDENTITY
    try:
        raw = path.read_bytes()
        identity = json.loads(raw)
        found = key_of(identity)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing; {repair_hint(folder)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path}: not an identity ({error}); {repair_hint(folder)}") from error
    if found != folder.name or not isinstance(identity, dict):
        raise IntegrityError(f"{path}: its key is {found}, expected {folder.name}, the folder's name; {repair_hint(folder)}")
    if _encode_identity(identity) != raw:
        raise IntegrityError(f"{path}: changed since it was written; {repair_hint(folder)}")
    return identity


def read_reference(folder: Path) -> str:
    """Return how people call the model the folder is for, "" if nobody said."""
    try:
        return (folder / REFERENCE).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a manifest; the caller holds the folder's lock."""
    write_file_atomically(folder / MANIFEST, manifest.encode())


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the identity a folder is for."""
    write_file_atomically(folder / IDENTITY, _encode_identity(identity))


def _encode_identity(identity: Mapping[str, Any]) -> bytes:
    return (json.dumps(identity, indent=2, sort_keys=True) + "\n").encode()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock; yield False at once if another holds it and ``wait`` is off.

    The kernel drops it when the holder dies, so there are no stale locks. OSError if a symbolic link stands there, which would have
    a file made where it leads.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not by closing alone: a forked child may share the descriptor
    finally:
        os.close(descriptor)
