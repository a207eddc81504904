"""F8 many processes on one key, F9 two experiments over one bank, F18 holders that died and clocks that are wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import publish, temporary_name
from sparsekd.bank import ScoreBank, text_keys, upkeep
from sparsekd.bank.manifest import LOCK, read_manifest
from sparsekd.bank.sharing import Items, Part, SharedShards

pytestmark = pytest.mark.slow

WRITER = Path(__file__).with_name("write_subject.py")
ROUNDS = 3
Count = Callable[[int], None]


@pytest.mark.fault("F8")
@pytest.mark.parametrize("stage", ["mine", "embed", "score", "table", "evaluate"])
def test_processes_that_write_one_key_at_once_all_end_well(
    stage: str, subjects: Any, nursery: Any, tmp_path: Path, count: Count
) -> None:
    for number in range(ROUNDS):
        for num_processes in (2, 4, 8):
            folder = tmp_path / f"{number}-{num_processes}"
            folder.mkdir()
            subject = subjects[stage](folder / "cache")
            subject.prepare()
            children = [nursery.start(folder, WRITER, stage, "cache") for _ in range(num_processes)]

            codes = [child.wait() for child in children]

            assert codes == [0] * num_processes, "\n".join(child.stderr for child in children)
            assert subject.state() == "new"
            assert not list(folder.rglob(".tmp-*"))
    count(3 * ROUNDS)


@pytest.mark.fault("F9")
@pytest.mark.parametrize("stage", ["embed", "score"])
def test_two_experiments_over_one_bank_each_end_as_if_alone(
    stage: str, subjects: Any, nursery: Any, tmp_path: Path, count: Count
) -> None:
    rounds = 10
    for number in range(rounds):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        ours, theirs = subjects[stage](folder / "cache"), subjects[stage](folder / "cache", "theirs")
        ours.prepare()
        theirs.prepare()
        children = [nursery.start(folder, WRITER, stage, "cache", name) for name in ("", "theirs") for _ in range(2)]

        codes = [child.wait() for child in children]

        assert codes == [0] * 4, "\n".join(child.stderr for child in children)
        assert ours.folder != theirs.folder
        assert (ours.state(), theirs.state()) == ("new", "new")
        alone = subjects[stage](folder / "alone")
        alone.prepare()
        alone.write()
        assert read_manifest(ours.folder).num_rows >= read_manifest(alone.folder).num_rows
        assert upkeep.find_damage(ours.folder) == upkeep.find_damage(theirs.folder) == []
    count(rounds)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("stage", ["mine", "embed", "score", "table"])
@pytest.mark.timeout(60)
def test_what_dead_processes_held_and_clocks_an_hour_off_stop_nobody(
    stage: str, subject: Any, nursery: Any, tmp_path: Path, count: Count
) -> None:
    dead = nursery.start(tmp_path, WRITER)  # without arguments: it ends at once
    assert dead.wait() != 0
    cases = 0
    for hours in (-1, 0, 1):
        each = type(subject)(tmp_path / f"{hours}")
        each.prepare()
        for folder in [path for path in each.root.rglob("*") if path.is_dir()] or [each.root]:
            mine = temporary_name("segment")
            (folder / mine.replace(f"-{os.getpid()}-", f"-{dead.pid}-")).write_bytes(b"half")
            (folder / mine.replace(f"-{os.uname().nodename}-", "-elsewhere-")).write_bytes(b"half")
            (folder / LOCK).touch()
        then = time.time() + hours * 3600
        for path in each.root.rglob("*"):
            os.utime(path, (then, then))

        each.write()

        assert each.state() == "new"
        cases += 1
    count(cases)


@pytest.mark.fault("F18", "evaluate")
def test_what_a_killed_process_left_of_an_artifact_goes_when_it_is_made(tmp_path: Path, nursery: Any, count: Count) -> None:
    dead = nursery.start(tmp_path, WRITER)
    dead.wait()
    left = tmp_path / temporary_name("key").replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    (left / "deep").mkdir(parents=True)
    others = tmp_path / temporary_name("another").replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    others.mkdir()
    alive = tmp_path / temporary_name("key")
    alive.mkdir()

    with publish(tmp_path / "key", kind="run", fields={}, extra={}):
        pass

    assert [path.exists() for path in (left, others, alive)] == [False, True, True]
    count(3)


@pytest.mark.fault("F18", "score")
@pytest.mark.timeout(60)
def test_a_claim_whose_holder_died_is_taken_over_at_once(tmp_path: Path, count: Count) -> None:
    keys = text_keys(f"text {number}" for number in range(8)).reshape(-1, 2)
    done = np.zeros(8, dtype=np.bool_)
    items = Items(keys, np.arange(8), ~done, lambda positions: done[positions], str)
    folder = ScoreBank(tmp_path / "bank").open({"a": 1}).folder
    cases = 0
    for content in (b"", b'{"deaths": 0, "running": true, "suspects": null}', b'{"deaths": 1, "running": true', b"\x00" * 9):
        done[:] = False
        claims = tmp_path / "bank" / "claims" / folder.parent.name / folder.name
        with SharedShards(folder, items, size=4, part=Part()) as shards:
            shards._claim(shards._waiting[0]).leave()
        for path in claims.iterdir():
            path.write_bytes(content)
        with SharedShards(folder, items, size=4, part=Part()) as shards:
            for free in shards.passes():
                for shard in free:
                    done[shard] = True
                    shards.committed()
        assert done.all()
        cases += 1
    count(cases)
