from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.bank import scores, upkeep
from sparsekd.bank.manifest import locked, read_manifest


def fail_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, failing as on a full disk at its ``number``-th call and after."""
    calls = 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize("name", ["fsync", "replace", "rename", "open"])
def test_disk_failure_at_any_call_leaves_the_old_state_or_the_new(
    sample: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.fill()  # three segments, full for their writer; the writer below merges them with its own
    numbers = np.arange(400)
    old = np.where(numbers < 300, numbers + 0.5, np.nan).astype(np.float32)
    new = numbers.astype(np.float32) + np.float32(0.5)
    failed = 0
    for number in range(1, 100):
        scores = sample.open()
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail_at(number, getattr(os, name)))
            try:
                scores.append(*sample.pairs(np.arange(300, 400)))
                raised = False
            except OSError:
                raised = True
        found = sample.answers(sample.open(), numbers)
        is_new = np.array_equal(found, new)
        assert is_new or np.array_equal(found, old, equal_nan=True)
        assert is_new or raised, "said to be stored and is not"
        assert upkeep.find_damage(scores.folder) == []
        if is_new:
            break
        failed += 1
        assert not list(scores.folder.glob(".tmp-*"))
    assert is_new
    assert failed or name == "rename"


@pytest.mark.parametrize("name", ["fsync", "replace", "rename"])
def test_disk_failure_while_the_folder_is_made_leaves_none_or_a_sound_one(
    sample: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 50):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail_at(number, getattr(os, name)))
            try:
                sample.open().append(*sample.pairs([1, 2]))
                break
            except OSError:
                pass
        assert np.isnan(sample.answers(sample.open(), [1])).all() or sample.open().num_pairs == 2
        assert not list((sample.root / "scores").glob(".tmp-*"))

    assert sample.answers(sample.open(), [1, 2]).tolist() == [1.5, 2.5]


def test_full_disk_during_compaction_is_said_and_loses_nothing(
    sample: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scores = sample.open()
    scores.append(*sample.pairs(np.arange(50)))

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scores._store, "_merge", full)
    with caplog.at_level(logging.WARNING):
        scores.append(*sample.pairs(np.arange(50, 100)))

    assert "stored, but its segments could not be merged: [Errno 28]" in caplog.text
    assert not np.isnan(sample.answers(sample.open(), np.arange(100))).any()


def test_many_appends_leave_few_segments_and_no_replaced_file(sample: Any) -> None:
    scores = sample.open()

    for start in range(0, 640, 10):
        scores.append(*sample.pairs(np.arange(start, start + 10)))

    listed = {entry.name for entry in read_manifest(scores.folder).segments}
    assert len(listed) <= 7
    assert {path.name for path in sample.segments(scores)} == listed
    np.testing.assert_array_equal(sample.answers(sample.open(), np.arange(640)), sample.pairs(np.arange(640))[2])


def test_equal_content_gives_equal_segment_names(sample: Any, tmp_path: Path) -> None:
    first = [path.name for path in sample.segments(sample.fill())]
    sample.root.rename(tmp_path / "before")

    assert [path.name for path in sample.segments(sample.fill())] == first


def test_repeating_an_append_stores_it_once(sample: Any) -> None:
    scores = sample.open()
    scores.append(*sample.pairs(np.arange(50)))
    scores.append(*sample.pairs(np.arange(50)))

    assert scores.num_pairs == 50


def test_reader_that_opened_before_a_compaction_keeps_answering(sample: Any) -> None:
    reader = sample.fill()
    manifest = read_manifest(reader.folder)
    sample.answers(reader, [0])

    sample.open().append(*sample.pairs(np.arange(300, 600)))

    assert not {entry.name for entry in manifest.segments} & {path.name for path in sample.segments(reader)}, "all were merged"
    np.testing.assert_array_equal(sample.answers(reader, np.arange(600)), sample.pairs(np.arange(600))[2])


def test_reader_that_finds_a_listed_segment_replaced_reads_the_manifest_again(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = sample.fill()
    open_as_before = reader._store._open

    def compacted_meanwhile(entry: Any) -> Any:
        monkeypatch.setattr(reader._store, "_open", open_as_before)
        sample.open().append(*sample.pairs(np.arange(300, 600)))
        return open_as_before(entry)

    monkeypatch.setattr(reader._store, "_open", compacted_meanwhile)

    np.testing.assert_array_equal(sample.answers(reader, np.arange(600)), sample.pairs(np.arange(600))[2])


def test_repair_during_a_compaction_wins(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = sample.segments(sample.fill())[1]

    def merge_while_another_repairs(batches: Any, folder: Path) -> Any:
        victim.write_bytes(victim.read_bytes()[:-1] + b"x")
        upkeep.repair(victim.parent)
        return merge_as_before(batches, folder)

    merge_as_before = scores.merge_segments
    monkeypatch.setattr(scores, "merge_segments", merge_while_another_repairs)
    sample.open().append(*sample.pairs(np.arange(300, 600)))

    found = sample.answers(sample.open(), np.arange(600))
    assert np.isnan(found).sum() == 100
    assert not np.isnan(found[300:]).any()
    assert upkeep.find_damage(victim.parent) == []


def test_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as ours, locked(tmp_path / "lock", wait=False) as theirs:
        assert (ours, theirs) == (True, False)

    with locked(tmp_path / "lock", wait=False) as again:
        assert again


def test_bank_and_its_command_line_import_no_torch_and_no_pandas(sample: Any) -> None:
    process = sample.start(2, 10, 10)
    assert process.communicate(timeout=60)[0].split()[-1] == "done"

    heavy = sample.modules(
        "import sparsekd.cli, sparsekd.bank, fill_bank, sys; sys.argv[1:] = ['{root}', '1', '5', '5']; fill_bank.main()"
    )

    assert not {"torch", "transformers", "pandas", "scipy"} & heavy
