"""Shards that processes share: who takes what, what a death leaves behind, and how one item that kills is found."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.bank.sharing import DEATHS, Items, Part, Positions, QuarantineError, SharedShards

WORKER = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from sparsekd.bank.sharing import Items, Part, SharedShards

folder, count, size, index, of, poison, seconds = sys.argv[1:]
folder, poison = Path(folder), {int(each) for each in poison.split(",") if each}
banked = folder.parent.parent / "banked"

def known(positions):
    return np.array([(banked / str(position)).exists() for position in positions.tolist()], dtype=bool)

items = np.arange(int(count))
keys = items.astype(np.uint64)[:, None]
part = Part(int(index), int(of))
(banked.parent / f"ready-{index}").touch()
while len(list(banked.parent.glob("ready-*"))) < part.of:  # imports take longer than the work
    time.sleep(0.001)
with SharedShards(folder, Items(keys, items, ~known(items), known, str), size=int(size), part=part) as shards:
    for free in shards.passes():
        for piece in free:
            for item in piece.tolist():
                if item in poison:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(float(seconds))
            for item in piece.tolist():
                with (banked / str(item)).open("a") as stream:
                    stream.write(f"{os.getpid()}\\n")
            shards.committed()
    shards.refuse_quarantined("test", items)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bank's folder of one teacher; beside it ``banked`` has a file per item that is done, a line per time it was."""
    (tmp_path / "banked").mkdir()
    return tmp_path / "scores" / "key"


@pytest.fixture
def start(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return ``start(count, size, part, poison, seconds)``: a process that shares the work."""

    def start(
        count: int, size: int, part: tuple[int, int] = (0, 1), poison: str = "", seconds: float = 0.0
    ) -> subprocess.Popen[str]:
        words = [str(each) for each in (folder, count, size, *part, poison, seconds)]
        return subprocess.Popen([sys.executable, "-c", WORKER, *words], stderr=subprocess.PIPE, text=True, env=os.environ)

    return start


def times_done(folder: Path) -> dict[int, int]:
    banked = folder.parent.parent / "banked"
    return {int(path.name): len(path.read_text().splitlines()) for path in banked.iterdir()}


ALONE = Part()


class Bank:
    """What is known, in memory."""

    def __init__(self, count: int) -> None:
        self.items = np.arange(count)
        self.is_known = np.zeros(count, dtype=bool)

    def shared(self, folder: Path, size: int, part: Part = ALONE) -> SharedShards:
        keys = self.items.astype(np.uint64)[:, None]
        items = Items(keys, self.items, ~self.is_known, lambda positions: self.is_known[positions], "item {}".format)
        return SharedShards(folder, items, size=size, part=part)


@given(count=st.integers(0, 40), size=st.integers(1, 12), known=st.sets(st.integers(0, 39)), of=st.integers(1, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_process_is_given_every_missing_item_once_wherever_it_begins(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, known: set[int], of: int, data: st.DataObject
) -> None:
    bank = Bank(count)
    bank.is_known[[each for each in known if each < count]] = True
    wanted = np.flatnonzero(~bank.is_known).tolist()
    given_items: list[int] = []
    part = Part(data.draw(st.integers(0, of - 1)), of)
    folder = tmp_path_factory.mktemp("bank") / "scores" / "key"

    with bank.shared(folder, size, part) as shards:
        for free in shards.passes():
            for piece in free:
                bank.is_known[piece] = True
                given_items += piece.tolist()
                shards.committed()

    assert sorted(given_items) == wanted
    claims = folder.parent.parent / "claims" / "scores" / "key"
    assert not claims.exists() or not [path for path in claims.iterdir() if path.is_file()]


def test_what_another_holds_is_passed_over_and_taken_once_it_is_let_go(folder: Path) -> None:
    bank = Bank(6)
    with bank.shared(folder, 3) as ours, bank.shared(folder, 3) as theirs:
        held = next(next(ours.passes()))
        others = [piece.tolist() for piece in next(theirs.passes())]

    assert (held.tolist(), others) == ([0, 1, 2], [[3, 4, 5]])
    with bank.shared(folder, 3) as again:
        assert [piece.tolist() for piece in next(again.passes())] == [[0, 1, 2], [3, 4, 5]]


def test_an_error_counts_as_no_death(folder: Path) -> None:
    bank = Bank(4)
    for _ in range(2 * DEATHS):
        with contextlib.suppress(KeyboardInterrupt), bank.shared(folder, 4) as shards:
            given_items = next(next(shards.passes())).tolist()
            raise KeyboardInterrupt
        assert given_items == [0, 1, 2, 3]


def test_processes_share_the_work_and_none_is_done_twice(folder: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    processes = [start(60, 4, (number, 3), "", 0.01) for number in range(3)]

    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert times_done(folder) == dict.fromkeys(range(60), 1)
    banked = folder.parent.parent / "banked"
    assert len({path.read_text() for path in banked.iterdir()}) > 1


def test_a_killed_process_s_shard_is_taken_over(folder: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    first = start(8, 8, (0, 1), "", 5.0)
    claims = folder.parent.parent / "claims" / "scores" / "key"
    while not (claims.is_dir() and any(path.stat().st_size for path in claims.iterdir())):
        assert first.poll() is None
    second = start(8, 8)
    first.kill()

    second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0
    assert times_done(folder) == dict.fromkeys(range(8), 1)


@pytest.mark.slow  # a process per death
@pytest.mark.parametrize("poison", [5, 0, 15])
def test_the_item_that_kills_is_found_and_everything_else_is_done(
    folder: Path, start: Callable[..., subprocess.Popen[str]], poison: int
) -> None:
    message, deaths = "", 0
    for deaths in itertools.count():  # noqa: B007
        process = start(20, 16, (0, 1), str(poison))
        _, message = process.communicate(timeout=60)
        if process.returncode != -9:
            break

    assert deaths <= 2 * DEATHS + 4  # the shard, its halves, the item alone
    assert process.returncode == 1
    assert f"1 of 20 are in quarantine, each of which ended {DEATHS} processes" in message
    assert f"(first: {poison})" in message
    assert times_done(folder) == dict.fromkeys([item for item in range(20) if item != poison], 1)
    again = start(20, 16, (0, 1))
    again.communicate(timeout=60)
    assert again.returncode == 1  # it stays there until somebody takes it out


@pytest.mark.slow
def test_two_items_that_kill_are_both_found(folder: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    for _ in range(40):
        process = start(8, 8, (0, 1), "2,6")
        process.communicate(timeout=60)
        if process.returncode != -9:
            break

    assert process.returncode == 1
    assert sorted(times_done(folder)) == [0, 1, 3, 4, 5, 7]


def test_items_in_quarantine_are_named_and_nothing_else_is_refused(folder: Path) -> None:
    bank = Bank(3)
    shards = bank.shared(folder, 3)
    name = "0" * 15 + "1"
    quarantine = folder.parent.parent / "claims" / "scores" / "key" / "quarantine"
    quarantine.mkdir(parents=True)
    (quarantine / name).write_text("{}")

    assert shards.quarantined(np.arange(3)).tolist() == [1]
    shards.refuse_quarantined("teacher t", np.array([0, 2]))
    message = r"teacher t: 1 of 3 are in quarantine, .*\(first: item 1\).*remove .*0001 to try again"
    with pytest.raises(QuarantineError, match=message):
        shards.refuse_quarantined("teacher t", bank.items)


OUTSIDE = b'{"suspects": [1, 9], "deaths": 3, "running": true}'


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"suspects": 3, "deaths": 1, "running": true}', b"\x00\xff", b'{"deaths": 9}', OUTSIDE]
)
def test_a_claim_that_says_nonsense_is_as_good_as_none(folder: Path, content: bytes) -> None:
    bank = Bank(2)
    with bank.shared(folder, 2) as shards:
        next(next(shards.passes()))
    claim = next(path for path in (folder.parent.parent / "claims" / "scores" / "key").iterdir())
    claim.write_bytes(content)

    with bank.shared(folder, 2) as again:
        pieces: list[Positions] = list(next(again.passes()))

    assert [piece.tolist() for piece in pieces] == [[0, 1]]
