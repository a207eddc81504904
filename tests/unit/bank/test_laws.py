"""The six laws of the bank: no foreign score, no stale score, no lost score, no lock-step, no silence, no NaN."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import IntegrityError, key_of
from sparsekd.bank import ScoreBank, upkeep

sys.path.insert(0, str(Path(__file__).parent))
from fill_bank import pairs_of

sys.path.pop(0)


# Law 1: never another teacher's or another text's score, whatever is renamed, moved or reordered.


def test_two_teachers_in_one_bank_never_mix(sample: Any) -> None:
    ours, theirs = sample.fill(), sample.fill(sample.other_identity, add=1000)

    np.testing.assert_array_equal(sample.answers(ours, np.arange(300)), sample.pairs(np.arange(300))[2])
    np.testing.assert_array_equal(sample.answers(theirs, np.arange(300)), sample.pairs(np.arange(300))[2] + 1000)


def test_folder_under_another_teachers_key_is_refused(sample: Any) -> None:
    theirs = sample.fill(sample.other_identity)
    theirs.folder.rename(theirs.folder.with_name(key_of(sample.identity)))

    with pytest.raises(IntegrityError, match=rf"identity.json: its key is {key_of(sample.other_identity)}, expected"):
        sample.open()


def test_folder_with_only_its_identity_forged_is_refused(sample: Any) -> None:
    ours, theirs = sample.fill(), sample.fill(sample.other_identity)
    for path in [theirs.folder / "manifest.json", *sample.segments(theirs)]:
        shutil.copy(path, ours.folder)

    with pytest.raises(IntegrityError, match=r"manifest.json: belongs to scores/.*, expected scores/"):
        sample.open()


def test_segment_of_another_teacher_is_never_taken_in(sample: Any) -> None:
    ours, theirs = sample.fill(), sample.fill(sample.other_identity, add=1000)
    foreign = sample.segments(theirs)[0]
    shutil.copy(foreign, ours.folder)
    (ours.folder / "manifest.json").unlink()  # so that the repair must look at every file

    repaired = upkeep.repair(ours.folder)

    assert any(
        f"{foreign.name}: holds scores of {key_of(sample.other_identity)}, expected" in line for line in repaired.taken_out
    )
    np.testing.assert_array_equal(sample.answers(sample.open(), np.arange(300)), sample.pairs(np.arange(300))[2])


def test_segments_swapped_or_put_in_each_others_place_are_refused(sample: Any) -> None:
    scores = sample.fill()
    first, second, _ = sample.segments(scores)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)

    with pytest.raises(IntegrityError, match=first.stem):
        sample.answers(sample.open(), [0])


def test_moving_the_whole_cache_changes_nothing(sample: Any, tmp_path: Path) -> None:
    sample.fill()
    sample.root.parent.rename(tmp_path / "elsewhere")

    found = sample.answers(ScoreBank(tmp_path / "elsewhere" / "bank").open(sample.identity), np.arange(300))

    np.testing.assert_array_equal(found, sample.pairs(np.arange(300))[2])


# Law 2: any change of the identity misses; the order of its fields is no change.


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 129},
        {"max_length": None},
        {"max_length": "128"},
        {"weights": {"model.safetensors": "00fe"}},
        {"prompt": ""},
    ],
)
def test_changed_identity_misses(sample: Any, change: dict[str, Any]) -> None:
    sample.fill()

    found = sample.answers(sample.open({**sample.identity, **change}), np.arange(300))

    assert np.isnan(found).all()


def test_identity_with_its_fields_in_another_order_hits(sample: Any) -> None:
    sample.fill()

    found = sample.answers(sample.open(dict(reversed(sample.identity.items()))), np.arange(300))

    assert not np.isnan(found).any()


# Law 3: SIGKILL at any moment loses at most the shard in flight; the rerun ends as if nothing had happened.


def test_killed_writer_loses_at_most_the_shard_in_flight(sample: Any) -> None:
    num_shards, size = 120, 50
    moments = random.Random(0)
    is_done, kills = False, 0
    while not is_done:
        process = sample.start(num_shards, size, size)
        assert process.stdout.readline() == "ready\n"
        if kills < 10:
            kills += 1
            time.sleep(moments.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.communicate()
        is_done = "done" in said
        stored = [int(word) for word in said if word.isdigit()]
        query_keys, passage_keys, gold_sim = pairs_of(np.arange((max(stored, default=-1) + 1) * size))
        np.testing.assert_array_equal(sample.open({"worker": 1}).lookup(query_keys, passage_keys), gold_sim)

    scores = sample.open({"worker": 1})
    query_keys, passage_keys, gold_sim = pairs_of(np.arange(num_shards * size))
    np.testing.assert_array_equal(scores.lookup(query_keys, passage_keys), gold_sim)
    assert scores.num_pairs == num_shards * size, "a shard that was stored was never scored again"
    assert upkeep.find_damage(scores.folder) == []
    assert kills >= 2


# Law 4: any number of processes fill one bank at once, compaction running, and all end right.


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_filling_one_bank_at_once_all_end_right(sample: Any, num_processes: int) -> None:
    num_shards, size, stride = 24, 60, 40
    processes = [sample.start(num_shards, size, stride) for _ in range(num_processes)]

    ends = [process.communicate(timeout=120)[0].split()[-1] for process in processes]

    scores = sample.open({"worker": 1})
    query_keys, passage_keys, gold_sim = pairs_of(np.arange((num_shards - 1) * stride + size))
    assert ends == ["done"] * num_processes
    np.testing.assert_array_equal(scores.lookup(query_keys, passage_keys), gold_sim)
    assert upkeep.find_damage(scores.folder) == []
    assert len(sample.segments(scores)) < num_shards, "nobody compacted"
    assert not list(sample.root.rglob(".tmp-*"))


def test_reader_is_right_at_every_moment_of_writing_and_compaction(sample: Any) -> None:
    writer: subprocess.Popen[str] = sample.start(60, 50, 50)
    query_keys, passage_keys, gold_sim = pairs_of(np.arange(60 * 50))
    scores, num_found = sample.open({"worker": 1}), 0
    while writer.poll() is None:
        found = scores.lookup(query_keys, passage_keys)
        is_known = ~np.isnan(found)
        np.testing.assert_array_equal(found[is_known], gold_sim[is_known])
        assert is_known.sum() >= num_found, "a stored score was missing for a moment"
        num_found = is_known.sum()
    writer.communicate()

    np.testing.assert_array_equal(scores.lookup(query_keys, passage_keys), gold_sim)


# Law 5: damage is named and refused, never silently fewer rows; repair takes out the damaged segment only.


def test_truncated_segment_is_refused_at_every_cut(sample: Any) -> None:
    scores = sample.fill()
    victim = sample.segments(scores)[1]
    content = victim.read_bytes()

    for size in [0, 1, 7, 8, *range(16, len(content), 64), len(content) - 1]:
        victim.write_bytes(content[:size])
        with pytest.raises(
            IntegrityError, match=rf"{victim.name}: {size} bytes, its manifest says {len(content)}; run: sparsekd"
        ):
            sample.answers(sample.open(), [0])


def test_flipped_bit_anywhere_in_a_segment_is_refused(sample: Any) -> None:
    scores = sample.fill()
    victim = sample.segments(scores)[2]
    content, places = victim.read_bytes(), random.Random(0)

    for _ in range(200):
        flipped = bytearray(content)
        flipped[places.randrange(len(content))] ^= 1 << places.randrange(8)
        victim.write_bytes(flipped)
        with pytest.raises(IntegrityError, match=f"{victim.name}: checksum"):
            sample.answers(sample.open(), [0])


def test_missing_segment_is_refused(sample: Any) -> None:
    victim = sample.segments(sample.fill())[0]
    victim.unlink()

    with pytest.raises(IntegrityError, match=rf"{victim.name}: missing, its manifest lists it; run: sparsekd bank repair "):
        sample.answers(sample.open(), [0])


def test_file_that_is_no_segment_is_refused_even_under_its_own_checksum(sample: Any) -> None:
    scores = sample.fill()
    (scores.folder / "manifest.json").unlink()
    (scores.folder / "99aa06d3014798d86001c324468d497f.arrow").write_bytes(b"")  # xxh3_128 of nothing

    repaired = upkeep.repair(scores.folder)

    assert any("99aa06d3014798d86001c324468d497f.arrow: " in line for line in repaired.taken_out)
    assert repaired.num_rows == 300


def test_flipped_bit_anywhere_in_the_manifest_or_the_identity_is_refused(sample: Any) -> None:
    scores, places = sample.fill(), random.Random(1)
    for victim in (scores.folder / "manifest.json", scores.folder / "identity.json"):
        content = victim.read_bytes()
        for _ in range(150):
            flipped = bytearray(content)
            flipped[places.randrange(len(content))] ^= 1 << places.randrange(8)
            victim.write_bytes(flipped)
            with pytest.raises(IntegrityError, match=re.escape(str(victim))):
                sample.answers(sample.open(), [0, 299])
        victim.write_bytes(content)


def test_missing_manifest_is_refused(sample: Any) -> None:
    scores = sample.fill()
    (scores.folder / "manifest.json").unlink()

    with pytest.raises(IntegrityError, match=r"manifest\.json: missing; run: sparsekd bank repair"):
        sample.open()
    with pytest.raises(IntegrityError, match=r"manifest\.json: missing"):
        scores.append(*sample.pairs([1000]))


def test_repair_takes_out_the_damaged_segment_only(sample: Any) -> None:
    scores = sample.fill()
    victim = sample.segments(scores)[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)

    repaired = upkeep.repair(scores.folder)

    found = sample.answers(sample.open(), np.arange(300))
    lost = np.isnan(found)
    assert (repaired.num_segments, repaired.num_rows, lost.sum()) == (2, 200, 100)
    np.testing.assert_array_equal(found[~lost], sample.pairs(np.arange(300))[2][~lost])
    assert (scores.folder / "damaged" / f"0-{victim.name}").read_bytes() == content, "moved aside, not deleted"
    query_keys, passage_keys, gold_sim = sample.pairs(np.flatnonzero(lost))
    sample.open().append(query_keys, passage_keys, gold_sim)
    np.testing.assert_array_equal(sample.answers(sample.open(), np.arange(300)), sample.pairs(np.arange(300))[2])


# Law 6: NaN and infinity never enter.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_score_that_is_not_finite_leaves_the_bank_as_it_was(sample: Any, bad: float) -> None:
    scores = sample.fill()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in scores.folder.iterdir())
    query_keys, passage_keys, gold_sim = sample.pairs(np.arange(300, 310))
    gold_sim[4] = bad

    with pytest.raises(ValueError, match=r"1 of 10 scores are NaN or infinite.*nothing was stored \(first: pair 4: "):
        scores.append(query_keys, passage_keys, gold_sim, describe="pair {}".format)

    assert sorted((path.name, path.stat().st_mtime_ns) for path in scores.folder.iterdir()) == before
