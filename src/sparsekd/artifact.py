"""Artifacts: folders named by what went into them, published whole or not at all.

A key is the digest of everything that can change an artifact's bytes. Publish = write in a temporary folder beside the final
one, fsync, record rows, bytes and checksum of every file in ``manifest.json``, rename, fsync the parent. What is not in a
manifest does not exist; readers verify. sha256 is used for identity, xxh3_128 for integrity. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

MANIFEST = "manifest.json"
ABSENT = "(absent)"
_SEAL = "seal"
_BLOCK_BYTES = 1 << 20
_ABANDONED_SECONDS = 86_400


class IntegrityError(ValueError):
    """A file on disk is not what its manifest says: missing, cut, changed or foreign."""


def key_of(fields: Mapping[str, Any]) -> str:
    """Return the 16-hex-digit key of JSON-able ``fields``, whatever the order of their names.

    >>> key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    True
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum_of_file(path: Path) -> str:
    """Return the xxh3_128 of a file's bytes, read in blocks."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError raised within the name of a path: writing and flushing know descriptors, and say only what went wrong."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each flushed into the one above: what it will hold must not go with it."""
    if path.is_dir():
        return
    if not path.parent.exists():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def temporary_name(name: str) -> str:
    """Return a name no other process uses, recognisable as unpublished; it tells host and process for clean-up."""
    return f".tmp-{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def is_abandoned(path: Path) -> bool:
    """Whether nobody will publish this temporary file: its process on this host is gone, or another host left it a day ago."""
    maker, _, process = path.name.rpartition("-")[0].rpartition("-")
    if maker.endswith(f"-{socket.gethostname()}") and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # alive, another user's
            return False
        return False
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:  # published or removed meanwhile
        return False


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, fsync, rename to ``path``, fsync the folder: old or new, never half."""
    make_folder(path.parent)
    temporary = path.parent / temporary_name(path.name)
    try:
        with naming(path), temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_file_atomically(path, text.encode("utf-8"))


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """The key the folder was made under."""
        return str(self.manifest["key"])


@contextlib.contextmanager
def publish(folder: Path, *, kind: str, fields: Mapping[str, Any], extra: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit publish it as ``folder``, on an exception leave nothing.

    ``fields`` is what the key was made of; ``extra`` (read at exit, so the caller may fill it meanwhile) holds counts,
    command and versions. If another process published the same key first, its result stands and ours is dropped. What a killed
    process has left of the same key is removed first.
    """
    make_folder(folder.parent)
    _remove_abandoned(folder)
    temporary = folder.parent / temporary_name(folder.name)
    temporary.mkdir()
    try:
        with naming(folder):
            yield temporary
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            fsync_path(path)
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": checksum_of_file(path)}
        write_manifest(temporary, {**extra, "kind": kind, "key": key_of(fields), "fields": dict(fields), "files": files})
        for path in (p for p in temporary.rglob("*") if p.is_dir()):
            fsync_path(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # a real failure, not a lost race
                raise
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.glob(f".tmp-{folder.name}-*"):
        if is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def find(folder: Path, fields: Mapping[str, Any]) -> Artifact | None:
    """Return the artifact at ``folder`` if it is complete and was made from ``fields``, else None.

    Checks that each listed file is there with its size, which costs microseconds; ``verify`` reads the bytes.
    Raises IntegrityError naming the file if the folder is published but damaged.
    """
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    if manifest.get("key") != key_of(fields):
        raise IntegrityError(
            f"{folder}: made from key {manifest.get('key')}, expected {key_of(fields)}; remove the folder and rerun"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.is_symlink():
            raise IntegrityError(f"{path}: a symbolic link, expected a file of its own; remove {folder} and rerun")
        if not path.is_file():
            raise IntegrityError(f"{path}: missing, its manifest lists it; remove {folder} and rerun")
        if path.stat().st_size != entry["bytes"]:
            raise IntegrityError(
                f"{path}: {path.stat().st_size} bytes, its manifest says {entry['bytes']}; remove {folder} and rerun"
            )
    return Artifact(folder, manifest)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest with a seal, the digest of all the rest of it."""
    written = json.loads(json.dumps(manifest, allow_nan=False))  # as it will be read: keys are strings, tuples are lists
    write_json_atomically(folder / MANIFEST, {**written, _SEAL: key_of(written)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a published folder's manifest without its seal; IntegrityError if there is none, it is not one or has changed.

    Manifests that were written before there were seals have none.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["key"], str) or not all(_is_entry(*item) for item in manifest["files"].items()):
            raise ValueError("key or files are not what publish writes")
        if manifest.pop(_SEAL, None) not in (None, key_of(manifest)):
            raise ValueError("changed since it was written, its own seal does not fit")
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing, so {folder} was never published; remove the folder and rerun") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a manifest ({error}); remove {folder} and rerun") from error
    return dict(manifest)


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a manifest's entry is of a file inside the folder: what it names is opened, so it must not lead elsewhere."""
    place = PurePosixPath(name)
    is_inside = bool(place.parts) and not place.is_absolute() and ".." not in place.parts
    return is_inside and type(entry["bytes"]) is int and isinstance(entry["xxh3_128"], str)


def verify(artifact: Artifact) -> None:
    """Read every file and compare its checksum; IntegrityError names the first that differs."""
    for name, entry in artifact.manifest["files"].items():
        found = checksum_of_file(artifact.folder / name)
        if found != entry["xxh3_128"]:
            raise IntegrityError(
                f"{artifact.folder / name}: checksum {found}, its manifest says {entry['xxh3_128']}; "
                f"remove {artifact.folder} and rerun"
            )


def nearest(parent: Path, fields: Mapping[str, Any]) -> tuple[Path, dict[str, tuple[Any, Any]]] | None:
    """Return the published sibling whose fields differ least from ``fields`` and what differs, as {dotted: (theirs, ours)}."""
    best: tuple[Path, dict[str, tuple[Any, Any]]] | None = None
    for path in sorted(parent.glob(f"*/{MANIFEST}")):
        if path.parent.name.startswith("."):
            continue
        try:
            theirs = read_manifest(path.parent)["fields"]
        except (IntegrityError, KeyError):
            continue  # unreadable neighbours are reported where they are used
        changed = differing_fields(theirs, fields)
        if best is None or len(changed) < len(best[1]):
            best = (path.parent, changed)
    return best


def differing_fields(theirs: Any, ours: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {dotted field: (theirs, ours)} for every leaf that differs; empty if and only if their keys are equal.

    >>> differing_fields({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    {'a.c': (2, 3)}
    """
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        changed: dict[str, tuple[Any, Any]] = {}
        for name in sorted({*theirs, *ours}):
            dotted = f"{prefix}.{name}" if prefix else str(name)
            if name in theirs and name in ours:
                changed |= differing_fields(theirs[name], ours[name], dotted)
            else:
                changed[dotted] = (theirs.get(name, ABSENT), ours.get(name, ABSENT))
        return changed
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple) and len(theirs) == len(ours):
        changed = {}
        for position, (left, right) in enumerate(zip(theirs, ours, strict=True)):
            changed |= differing_fields(left, right, f"{prefix}.{position}")
        return changed
    # As JSON, which keys are made of: 1, 1.0 and True are equal in Python only.
    return {} if json.dumps(theirs, sort_keys=True) == json.dumps(ours, sort_keys=True) else {prefix: (theirs, ours)}
