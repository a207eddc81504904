"""F5 shards cut, F6 bits flipped, F7 files moved about, F13 checkpoints torn: named, or without effect, and made again alone."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sparsekd.artifact import IntegrityError
from sparsekd.bank import upkeep

pytestmark = pytest.mark.slow

Count = Callable[[int], None]
BANKS = ("embed", "score")
FLIPS = {"mine": 150, "embed": 150, "score": 150, "table": 150, "train": 100, "checkpoint": 100, "evaluate": 100, "export": 100}
"""1,000 in all."""


def written(subject: Any) -> Any:
    subject.prepare()
    subject.write()
    assert subject.state() == "new"
    return subject


@pytest.mark.fault("F5")
@pytest.mark.parametrize("stage", ["mine", "table"])
def test_a_shard_cut_anywhere_is_named_and_its_artifact_is_made_again(stage: str, subject: Any, count: Count) -> None:
    cases = 0
    for victim in written(subject).shards:
        cases += refused_at_every_cut(subject, victim)
        shutil.rmtree(victim.parent)
        subject.write()
        assert subject.state() == "new"
    count(cases)


@pytest.mark.fault("F5")
@pytest.mark.parametrize("stage", BANKS)
def test_a_segment_cut_anywhere_is_named_and_made_again_alone(stage: str, subject: Any, count: Count) -> None:
    subject.prepare()
    cases, num_segments = 0, len(subject.shards)
    for number in range(num_segments):
        victim = subject.shards[number]
        cases += refused_at_every_cut(subject, victim)
        upkeep.repair(subject.folder)
        others = subject.shards

        assert subject.refill() == subject.rows_per_segment
        assert subject.state() == "old"
        assert {*others} < {*subject.shards}
    count(cases)


def refused_at_every_cut(subject: Any, victim: Path) -> int:
    content = victim.read_bytes()
    sizes = sorted({*range(0, len(content), 8), *batch_ends(victim), len(content) - 1} - {len(content)})
    for size in sizes:
        victim.write_bytes(content[:size])
        with pytest.raises(IntegrityError, match=victim.name):
            subject.state()
    return len(sizes)


def batch_ends(path: Path) -> set[int]:
    """Return where each message of an Arrow file or stream ends: a stream cut there loads without an error."""
    ends = set()
    with path.open("rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(8 if is_file else 0)
        try:
            while True:
                pa.ipc.read_message(stream)
                ends.add(stream.tell())
        except (EOFError, pa.ArrowInvalid):
            return ends


@pytest.mark.fault("F6")
@pytest.mark.parametrize("stage", FLIPS)
def test_a_flipped_bit_in_any_file_is_refused_or_changes_nothing(stage: str, subject: Any, tmp_path: Path, count: Count) -> None:
    written(subject)
    generator = random.Random(stage)
    kept = shutil.copytree(subject.root, tmp_path / "kept")
    held = kept / "checkpoint-4" if stage == "checkpoint" else kept  # nobody reads the one before while this one is whole
    files = sorted(path.relative_to(kept) for path in held.rglob("*") if path.is_file())
    harmless = set()
    for _ in range(FLIPS[stage]):
        name = generator.choice([each for each in files if (kept / each).stat().st_size])
        content = bytearray((kept / name).read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (subject.root / name).write_bytes(content)
        if refused(subject):
            shutil.rmtree(subject.root)
            shutil.copytree(kept, subject.root)
        else:  # state() has compared every row with what was written
            harmless.add(name.name)
            shutil.copy(kept / name, subject.root / name)
    assert harmless <= {"manifest.json", "reference.txt"}
    count(FLIPS[stage])


def refused(subject: Any) -> bool:
    """Whether a reader refuses what it finds, or, of checkpoints, falls back; other rows are an AssertionError."""
    try:
        return bool(subject.state() == "old")
    except IntegrityError:
        return True


def delete(victim: Path, other: Path) -> None:
    victim.unlink()


def exchange(victim: Path, other: Path) -> None:
    content = victim.read_bytes()
    victim.write_bytes(other.read_bytes())
    other.write_bytes(content)


def take_anothers_content(victim: Path, other: Path) -> None:
    victim.write_bytes(other.read_bytes())


def rename(victim: Path, other: Path) -> None:
    victim.rename(victim.with_name(f"0{victim.name}"))


def empty(victim: Path, other: Path) -> None:
    victim.write_bytes(b"")


def lengthen(victim: Path, other: Path) -> None:
    victim.write_bytes(victim.read_bytes() + other.read_bytes())


def link_out(victim: Path, other: Path) -> None:
    outside = victim.parents[2] / "outside"
    victim.rename(outside)
    victim.symlink_to(outside)


def make_a_folder(victim: Path, other: Path) -> None:
    victim.unlink()
    victim.mkdir()


MOVES = [delete, exchange, take_anothers_content, rename, empty, lengthen, link_out, make_a_folder]


@pytest.mark.fault("F7")
@pytest.mark.parametrize("stage", ["mine", "embed", "score", "table"])
def test_files_that_are_not_where_they_were_put_are_refused_by_name(
    stage: str, subject: Any, tmp_path: Path, count: Count
) -> None:
    for move in MOVES:
        each = type(subject)(tmp_path / move.__name__)
        each.prepare()
        if stage not in BANKS:
            each.write()
        victim, other = each.shards[:2]
        move(victim, other)
        with pytest.raises(IntegrityError, match=f"{victim.name}|{other.name}"):
            each.state()
    count(len(MOVES))


@pytest.mark.fault("F7")
@pytest.mark.parametrize("stage", ["mine", "embed", "score", "table"])
def test_files_that_nobody_listed_change_nothing(stage: str, subject: Any, count: Count) -> None:
    [first, *_] = written(subject).shards
    shutil.copy(first, first.with_name(f"copy-{first.name}"))
    (first.parent / "notes.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(first.parent, first.parent.with_name(".tmp-half-made"))

    assert subject.state() == "new"
    count(3)


@pytest.mark.fault("F7")
@pytest.mark.parametrize("stage", ["mine", "embed", "score", "table", "train", "evaluate"])
def test_a_manifest_that_was_edited_is_refused(stage: str, subject: Any, count: Count) -> None:
    written(subject)
    manifest = next(path for path in subject.root.rglob("manifest.json"))
    text = manifest.read_text(encoding="utf-8")
    edits = list(edited(text))
    for edit in edits:
        manifest.write_text(edit, encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            subject.state()
    count(len(edits))


def edited(text: str) -> Iterator[str]:
    """Yield a manifest with each of its numbers, one at a time, made another."""
    for place, character in enumerate(text):
        if character.isdigit() and not text[place - 1].isalnum():
            yield text[:place] + str((int(character) + 1) % 10) + text[place + 1 :]


@pytest.mark.fault("F13", "checkpoint")
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_checkpoint_torn_in_any_of_its_files_leaves_the_one_before(
    damage: str, tmp_path: Path, count: Count, subjects: Any
) -> None:
    names = [*subjects["checkpoint"].files, "sparsekd.json"]
    for name in names:
        subject = written(subjects["checkpoint"](tmp_path / name.replace("/", "-")))
        victim = subject.root / "checkpoint-4" / name
        content = victim.read_bytes()
        victim.unlink() if damage == "gone" else victim.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")

        assert subject.state() == "old"
        assert not victim.parent.exists()
    count(len(names))
