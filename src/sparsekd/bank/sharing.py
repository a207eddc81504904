"""Shards of work that any number of processes share: each takes what nobody holds, until everything is banked.

Processes that run one recipe over one cache, on one machine or on several with a shared file system, find the same items in the
same order, so they agree on the shards without talking. A shard is claimed by a lock on a file named by its content; the kernel
drops the lock when its holder dies, and another process takes the shard over. A claim saves time and decides nothing: where a file
system keeps locks to one machine, others compute the shard too, and the bank keeps the first of two equal answers.

A shard that keeps killing who computes it is halved until one item is left, which is put in quarantine: named, and not tried
again. Everything else is computed. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from sparsekd.artifact import naming, write_json_atomically

Positions = npt.NDArray[np.int64]

CLAIMS = "claims"
QUARANTINE = "quarantine"
DEATHS = 3
"""Times that a shard, or an item alone, may take its process with it before it is halved, or put in quarantine: once or twice
may be a reboot, or a scheduler in need of memory."""
_POLL_SECONDS = 0.05  # first wait for other processes' shards; doubles up to the next
_LONGEST_POLL_SECONDS = 2.0

_log = logging.getLogger(__name__)


class QuarantineError(RuntimeError):
    """Items that take their process with them; all others are computed and banked."""


@dataclass(frozen=True)
class Part:
    """Which of several processes that share work this is. It decides where one begins, never what it does."""

    index: int = 0
    of: int = 1


@dataclass(frozen=True, eq=False)
class Items:
    """What is to be computed, n pairs or texts, in one order for all processes."""

    keys: npt.NDArray[np.uint64]
    """[n, w], the items' contents."""
    order: Positions
    """int64 [n], the order in which they are computed."""
    missing: npt.NDArray[np.bool_]
    """[n], which were not banked at first sight."""
    known: Callable[[Positions], npt.NDArray[np.bool_]]
    """Asks the bank again, bool for each position."""
    describe: Callable[[int], str]
    """Names an item for people."""


def attempts(bank: Path) -> frozenset[tuple[str, bytes]]:
    """Return what a bank tells of the shards that processes hold, or died of: it changes with every attempt at one."""
    claims = [path for path in (bank / CLAIMS).glob("*/*/*") if path.is_file()]
    return frozenset((path.name, _content(path)) for path in [*claims, *(bank / CLAIMS).glob(f"*/*/{QUARANTINE}/*")])


def quarantined_items(folder: Path) -> list[str]:
    """Return the names, by content, of the items in quarantine whose answers a bank keeps in ``folder``; see ``SharedShards``."""
    quarantine = _claims_of(folder) / QUARANTINE
    return sorted(path.name for path in quarantine.iterdir()) if quarantine.is_dir() else []


def _claims_of(folder: Path) -> Path:
    return folder.parent.parent / CLAIMS / folder.parent.name / folder.name


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # finished since it was listed
        return b""


class SharedShards:
    """Items in shards, as one process sees them; a context manager that gives up its claims at the end."""

    def __init__(self, folder: Path, items: Items, *, size: int, part: Part) -> None:
        """Split all items into shards of ``size``, whatever is known of them, so that all processes agree.

        ``folder`` is where the bank keeps the answers, ``<root>/<kind>/<key>``; claims are in ``<root>/claims/<kind>/<key>``.
        """
        self._folder = _claims_of(folder)
        self._items = items
        shards = [items.order[start : start + size] for start in range(0, len(items.order), size)]
        first = part.index * len(shards) // part.of
        self._waiting = [shard for shard in [*shards[first:], *shards[:first]] if items.missing[shard].any()]
        self._taken: deque[tuple[Positions, _Claim, Positions]] = deque()
        self._num_claimed = 0

    def __enter__(self) -> SharedShards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _, claim, _ in self._taken:
            claim.leave()
        self._taken.clear()

    def passes(self) -> Iterator[Iterator[Positions]]:
        """Yield what is free, again and again, until every item is banked or in quarantine.

        A pass is the missing items of one shard after another that nobody else holds; each must be banked and ``committed``, in
        their order. Where others hold all that is left, the next pass comes after a moment.
        """
        seconds = _POLL_SECONDS
        while self._waiting:
            num_before = self._num_claimed
            yield self._free()
            if self._num_claimed > num_before:
                seconds = _POLL_SECONDS
                continue
            if seconds == _POLL_SECONDS:
                _log.info("%d shards are being computed by other processes; waiting", len(self._waiting))
            time.sleep(seconds)
            seconds = min(2 * seconds, _LONGEST_POLL_SECONDS)

    @property
    def oldest(self) -> Positions:
        """The items that were yielded first of those not yet committed."""
        return self._taken[0][2]

    def committed(self) -> None:
        """Say that the oldest items yielded are banked."""
        shard, claim, _ = self._taken.popleft()
        if claim.suspects is None:
            self._finish(shard, claim)
        else:
            claim.survived()

    def quarantined(self, positions: Positions) -> Positions:
        """Return those of the items that are in quarantine."""
        folder = self._folder / QUARANTINE
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return np.array([position for position in positions.tolist() if names and self._name(position) in names], dtype=np.int64)

    def refuse_quarantined(self, what: str, positions: Positions, *, allowed: int = 0) -> None:
        """Raise QuarantineError, naming how many and the first, if more than so many of these items are in quarantine."""
        found = self.quarantined(positions)
        if len(found) <= allowed:
            if len(found):
                _log.warning("%s: %d are in quarantine and left out, as allowed", what, len(found))
            return
        first = int(found[0])
        raise QuarantineError(
            f"{what}: {len(found):,} of {len(self._items.keys):,} are in quarantine, each of which ended {DEATHS} processes that "
            f"computed it alone (first: {self._items.describe(first)}); all others are banked. Mend or leave out these texts; or "
            f"give the processes more memory and remove {self._folder / QUARANTINE / self._name(first)} to try again"
        )

    def _free(self) -> Iterator[Positions]:
        """Yield the items of one pass. A shard that ended its processes comes alone and in pieces, after the others."""
        suspected = []
        for shard in list(self._waiting):
            claim = self._claim(shard)
            if claim is None:
                continue
            missing = self._missing(shard)
            if not len(missing):
                self._finish(shard, claim)
            elif claim.suspects is None:
                self._begin(shard, claim, missing)
                yield missing
            else:
                claim.leave()
                suspected.append(shard)
        if suspected and not self._taken:
            yield from self._piece(suspected[0])

    def _piece(self, shard: Positions) -> Iterator[Positions]:
        """Yield the piece of a suspected shard that is to be tried next, unless it is settled already."""
        claim = self._claim(shard)
        if claim is None:
            return
        if claim.suspects is None:  # another process has found the item meanwhile
            claim.leave()
            return
        begin, end = claim.piece
        if end - begin == 1 and claim.deaths >= DEATHS:
            self._quarantine(int(shard[begin]))
        missing = self._missing(shard[begin:end])
        if not len(missing):
            self._num_claimed += 1
            claim.survived()
            return
        self._begin(shard, claim, missing)
        yield missing

    def _begin(self, shard: Positions, claim: _Claim, missing: Positions) -> None:
        self._num_claimed += 1
        claim.begin()
        self._taken.append((shard, claim, missing))

    def _quarantine(self, position: int) -> None:
        item = self._items.describe(position)
        write_json_atomically(self._folder / QUARANTINE / self._name(position), {"item": item, "deaths": DEATHS})
        _log.error("in quarantine after %d processes that it ended: %s", DEATHS, item)

    def _finish(self, shard: Positions, claim: _Claim) -> None:
        self._num_claimed += 1
        claim.finish()
        self._waiting = [each for each in self._waiting if each is not shard]

    def _missing(self, shard: Positions) -> Positions:
        missing = shard[~self._items.known(shard)]
        return missing[~np.isin(missing, self.quarantined(missing))]

    def _claim(self, shard: Positions) -> _Claim | None:
        content = np.ascontiguousarray(self._items.keys[shard]).tobytes()
        return _Claim.take(self._folder / xxhash.xxh3_128_hexdigest(content), len(shard))

    def _name(self, position: int) -> str:
        return "".join(f"{word:016x}" for word in self._items.keys[position].tolist())


class _Claim:
    """A locked file that tells whoever takes a shard next how the last one fared with it.

    Absent or empty while nobody has been at the shard. Else JSON: ``running``, whether its last holder was computing when it was
    written, and so died if the lock is free; ``suspects``, the range of the shard's items that ended a process, null while none has
    by itself; ``deaths``, how many processes the piece to be tried next has ended.
    """

    def __init__(self, path: Path, descriptor: int, num_items: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.suspects: tuple[int, int] | None = None
        self.deaths = 0
        told = _decoded(os.read(descriptor, 1 << 12), num_items)
        if told is not None:
            self.suspects, self.deaths = told.suspects, told.deaths
            if told.running:
                self._count_death(num_items)

    @classmethod
    def take(cls, path: Path, num_items: int) -> _Claim | None:
        """Return the claim of a shard, None if another process holds it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return cls(path, descriptor, num_items)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            os.close(descriptor)  # who finished the shard removed the file between our opening and locking it

    @property
    def piece(self) -> tuple[int, int]:
        """The range to be tried next: the first half of the suspects, the one that is left."""
        assert self.suspects is not None
        begin, end = self.suspects
        return begin, begin + max(1, (end - begin) // 2)

    def begin(self) -> None:
        """Note that the piece, or the whole shard, is being computed."""
        self._write(running=True)

    def survived(self) -> None:
        """Take the piece out of the suspects, and let the shard go: it is not finished."""
        assert self.suspects is not None
        (_, end), (_, tried) = self.suspects, self.piece
        self.suspects, self.deaths = ((tried, end) if tried < end else None), 0
        self.leave()

    def leave(self) -> None:
        """Let the shard go, nobody being at it."""
        self._write(running=False)
        self._unlock()

    def finish(self) -> None:
        """Let the shard go for good."""
        self._path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # not by closing alone: a forked child may share the descriptor
        os.close(self._descriptor)

    def _count_death(self, num_items: int) -> None:
        self.deaths += 1
        if self.suspects is None:
            if self.deaths >= DEATHS:
                self.suspects, self.deaths = (0, num_items), (self.deaths if num_items == 1 else 0)
        elif self.suspects[1] - self.suspects[0] > 1:
            self.suspects = self.piece
            self.deaths = 1 if self.suspects[1] - self.suspects[0] == 1 else 0

    def _write(self, *, running: bool) -> None:
        """Put the state in the file; not atomically, as a state that is lost costs another attempt and nothing else."""
        content = b""
        if running or self.suspects is not None or self.deaths:
            content = json.dumps({"suspects": self.suspects, "deaths": self.deaths, "running": running}).encode("ascii")
        with naming(self._path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)


@dataclass(frozen=True)
class _Told:
    suspects: tuple[int, int] | None
    deaths: int
    running: bool


def _decoded(content: bytes, num_items: int) -> _Told | None:
    """Return what the file of a claim on so many items says; None if it says nothing, or what no claim writes."""
    try:
        told = json.loads(content)
        suspects, deaths = told["suspects"], int(told["deaths"])
        if suspects is not None:
            begin, end = map(int, suspects)
            if not 0 <= begin < end <= num_items:
                return None
            suspects = begin, end
        return _Told(suspects, deaths, bool(told["running"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
