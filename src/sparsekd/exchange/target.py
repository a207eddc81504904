"""Where an export goes: a new folder that appears by one rename, or the place of an earlier export; nothing else is touched."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekd.artifact import IntegrityError, publish, read_manifest, temporary_name

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
def new_export(target: Path, *, overwrite: bool, fields: Mapping[str, Any], extra: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder to fill, which a clean exit publishes as ``target`` and an exception removes.

    ``fields`` and ``extra`` are the manifest's, as ``artifact.publish`` takes them.
    """
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
    """Rename to the target, an earlier export moved aside first and removed last."""
    require_free(target, overwrite)  # somebody else may have been faster
    if not target.exists():
        staged.rename(target)
        return
    aside = target.parent / temporary_name(target.name)
    target.rename(aside)
    try:
        staged.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
