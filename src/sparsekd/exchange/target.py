"""The folder that an export becomes: refused where something stands, published by one rename, replaced only if it is an export."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekd.artifact import IntegrityError, fsync_path, publish, read_manifest, temporary_name

KIND = "export"


def require_free(target: Path, overwrite: bool) -> None:
    """Raise ValueError if ``target`` exists, unless it is an earlier export that may be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target}: exists already; choose another folder, or replace an earlier export with --overwrite")
    if not _is_export(target):
        raise ValueError(f"{target}: is no export of this program, so --overwrite leaves it alone; choose another folder")


@contextlib.contextmanager
def exported(target: Path, *, fields: Mapping[str, Any], extra: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yield a folder to fill; on a clean exit it stands as ``target`` with its manifest, on an exception nothing has changed.

    ``fields`` and ``extra`` are those of ``artifact.publish``. An earlier export is moved aside first and removed last. Raises
    ValueError as ``require_free`` does, before and after the folder is filled: somebody else may have been faster.
    """
    require_free(target, overwrite)
    staged = target.parent / temporary_name(target.name)
    try:
        with publish(staged, kind=KIND, fields=fields, extra=extra) as temporary:
            yield temporary
        _put(staged, target, overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    try:
        return read_manifest(folder).get("kind") == KIND
    except (IntegrityError, NotADirectoryError):
        return False


def _put(staged: Path, target: Path, overwrite: bool) -> None:
    require_free(target, overwrite)
    if not target.exists():
        staged.rename(target)
        fsync_path(target.parent)
        return
    aside = target.parent / temporary_name(target.name)
    target.rename(aside)
    try:
        staged.rename(target)
    except OSError:
        aside.rename(target)
        raise
    fsync_path(target.parent)  # or a power cut may find the earlier export in its place, half removed
    shutil.rmtree(aside, ignore_errors=True)
