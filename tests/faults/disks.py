"""Disks that go wrong: one that fails at its N-th call, one that loses its power, one that is small.

The first two stand in for the operating system's calls as this project and pathlib make them; the third is a real one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

CALLS: dict[str, tuple[tuple[Any, str], ...]] = {
    "open": ((os, "open"), (io, "open"), (pa, "OSFile")),
    "fsync": ((os, "fsync"),),
    "rename": ((os, "rename"), (os, "replace")),
    "mkdir": ((os, "mkdir"),),
}
"""The calls by what they do; writing is in no table, for the kernel itself refuses it below."""


@contextlib.contextmanager
def failing(kind: str, number: int, *, from_then_on: bool) -> Iterator[Callable[[], int]]:
    """Have the ``number``-th call of this kind, from 1, or all from it on, fail as on a broken disk; yield what counts them."""
    made = 0

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal made
            made += 1
            if made == number or (from_then_on and made > number):
                # As the kernel does: a descriptor has no name, a path is told.
                told = [] if isinstance(arguments[0], int) else [str(arguments[0])]
                raise OSError(errno.EIO, os.strerror(errno.EIO), *told)
            return function(*arguments, **keywords)

        return call

    with contextlib.ExitStack() as stack:
        for module, name in CALLS[kind]:
            function = getattr(module, name)
            setattr(module, name, wrapped(function))
            stack.callback(setattr, module, name, function)
        yield lambda: made


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Have the kernel refuse every write beyond so many bytes of a file, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk of ``num_bytes`` at ``folder`` and yield what resizes it; PermissionError where nobody may mount."""
    folder.mkdir()
    size = f"size={num_bytes}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        raise PermissionError("this machine lets nobody mount a tmpfs")
    try:
        yield lambda more: run(["mount", "-o", f"remount,size={more}", str(folder)])
    finally:
        run(["umount", "--lazy", str(folder)])


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


Entries = dict[str, int]
"""Names of a folder and the inodes they stand for."""


@dataclass
class Moment:
    """The tree after one call: what is in memory, and what of it is on the disk for certain."""

    root: int
    folders: dict[int, Entries]
    files: dict[int, bytes]
    durable_folders: dict[int, Entries]
    durable_files: dict[int, bytes]


@dataclass
class PowerLoss:
    """Records, call by call, the tree under ``root``, and what a power cut after that call may leave of it.

    What a file held when it was last flushed is on the disk; what was written since may be missing, cut or zeros. The entries of a
    folder are on the disk as they were when it was last flushed; those since may be there or not, folder by folder.
    """

    root: Path
    moments: list[Moment] = field(default_factory=list)
    _kept_open: dict[int, int] = field(default_factory=dict)
    _seen_files: set[int] = field(default_factory=set)
    _durable_folders: dict[int, Entries] = field(default_factory=dict)
    _durable_files: dict[int, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record every call that flushes, renames, makes or removes."""
        self._look()
        self._durable_folders, self._durable_files = dict(self.moments[0].folders), dict(self.moments[0].files)
        self.moments.clear()
        self._look()
        names = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
        before = {name: getattr(os, name) for name in names}
        try:
            for name in names:
                setattr(os, name, self._watched(name, before[name]))
            yield
            self._look()
        finally:
            for name in names:
                setattr(os, name, before[name])
            for descriptor in self._kept_open.values():
                os.close(descriptor)

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._look()  # what was written since the last call
            result = function(*arguments, **keywords)
            if name == "fsync":
                self._flushed(os.fstat(arguments[0]).st_ino)
            self._look()
            return result

        return call

    def _flushed(self, inode: int) -> None:
        newest = self.moments[-1]
        if inode in newest.folders:
            self._durable_folders[inode] = newest.folders[inode]
        elif inode in newest.files:
            self._durable_files[inode] = newest.files[inode]

    def _look(self) -> None:
        folders: dict[int, Entries] = {}
        files: dict[int, bytes] = {}
        for path in [self.root, *self.root.rglob("*")]:
            inode = path.stat().st_ino
            if inode not in self._kept_open:
                self._kept_open[inode] = os.open(path, os.O_RDONLY)  # no other file can take its number
            if path.is_dir():
                folders[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                files[inode] = path.read_bytes()
                self._seen_files.add(inode)
        root = self.root.stat().st_ino
        self.moments.append(Moment(root, folders, files, dict(self._durable_folders), dict(self._durable_files)))

    def outcomes(self, moment: Moment) -> Iterator[dict[str, bytes | None]]:
        """Yield what may be found after a power cut: content by path, None for folders; each once."""
        seen = set()
        undecided = [
            inode for inode, entries in moment.folders.items() if moment.durable_folders.get(inode, {}) != entries
        ]
        for lost in itertools.chain.from_iterable(itertools.combinations(undecided, n) for n in range(len(undecided) + 1)):
            for damage in (lambda live: live, lambda _: b"", lambda live: live[: len(live) // 2], lambda live: bytes(len(live))):
                found = dict(self._tree(moment, moment.root, "", set(lost), damage))
                key = tuple(sorted(found.items()))
                if key not in seen:
                    seen.add(key)
                    yield found

    def _tree(
        self, moment: Moment, inode: int, path: str, lost: set[int], damage: Callable[[bytes], bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        durable = moment.durable_folders.get(inode, {})
        entries = durable if inode in lost or inode not in moment.folders else moment.folders[inode]
        for name, child in sorted(entries.items()):
            below = f"{path}{name}"
            live = moment.files.get(child)
            if child in self._seen_files:
                flushed = moment.durable_files.get(child)
                yield below, flushed if flushed is not None and live in (None, flushed) else damage(live or b"")
            else:
                yield below, None
                yield from self._tree(moment, child, f"{below}/", lost, damage)


def lay_out(root: Path, tree: dict[str, bytes | None]) -> None:
    """Make a folder of a tree, instead of what stands there."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, content in tree.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
