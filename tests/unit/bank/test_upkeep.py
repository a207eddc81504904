from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.bank import EmbeddingBank, ScoreBank, text_keys, upkeep


def gone_process() -> int:
    """Return the id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_sound_bank_has_no_damage_and_repair_changes_nothing(sample: Any) -> None:
    folder = sample.fill().folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert upkeep.find_damage(folder) == []
    assert upkeep.repair(folder) == upkeep.Repair((), 3, 300)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_verification_names_every_damaged_file(sample: Any) -> None:
    scores = sample.fill()
    cut, flipped, missing = sample.segments(scores)
    cut.write_bytes(cut.read_bytes()[:-1])
    content = bytearray(flipped.read_bytes())
    content[100] ^= 4
    flipped.write_bytes(content)
    missing.unlink()

    damage = upkeep.find_damage(scores.folder)

    assert len(damage) == 3
    assert all(any(path.name in line for line in damage) for path in (cut, flipped, missing))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b"{}", b'{"segments": []}'])
def test_manifest_is_rebuilt_from_the_segments(sample: Any, content: bytes | None) -> None:
    scores = sample.fill()
    manifest = scores.folder / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)

    repaired = upkeep.repair(scores.folder)

    assert (repaired.num_segments, repaired.num_rows) == (3, 300)
    np.testing.assert_array_equal(sample.answers(sample.open(), np.arange(300)), sample.pairs(np.arange(300))[2])
    if content is not None:
        assert (scores.folder / "damaged" / "0-manifest.json").read_bytes() == content


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"kind": "dense"}'])
def test_identity_is_rebuilt_from_the_segments(sample: Any, content: bytes | None) -> None:
    scores = sample.fill()
    (scores.folder / "identity.json").unlink()
    if content is not None:
        (scores.folder / "identity.json").write_bytes(content)

    upkeep.repair(scores.folder)

    assert upkeep.find_damage(scores.folder) == []
    assert sample.answers(sample.open(), [7]).tolist() == [7.5]


def test_folder_under_another_key_is_not_repaired_but_moved_back(sample: Any) -> None:
    folder = sample.fill(sample.other_identity).folder
    elsewhere = folder.rename(folder.with_name(key_of(sample.identity)))

    with pytest.raises(ValueError, match=f"its identity says it is {folder.name}; move the folder back to that name"):
        upkeep.repair(elsewhere)

    assert len(list(elsewhere.glob("*.arrow"))) == 3


def test_embeddings_are_verified_and_repaired_like_scores(tmp_path: Path) -> None:
    keys = text_keys(str(number) for number in range(20))
    bank = EmbeddingBank(tmp_path, max_segment_bytes=1).open({"kind": "dense"})
    for rows in (slice(0, 10), slice(10, 20)):
        bank.append(keys[rows], np.ones((10, 4), dtype=np.float32))
    victim = sorted(bank.folder.glob("*.arrow"))[0]
    victim.write_bytes(b"cut")

    assert len(upkeep.find_damage(bank.folder)) == 1
    assert upkeep.repair(bank.folder).num_rows == 10
    assert EmbeddingBank(tmp_path).open({"kind": "dense"}).known(keys).sum() == 10


def test_key_is_found_by_its_beginning_if_only_one_begins_so(sample: Any) -> None:
    folders = [sample.fill().folder, sample.fill(sample.other_identity).folder]

    assert upkeep.bank_folders(sample.root) == sorted(folders)
    assert upkeep.find_folder(sample.root, folders[0].name[:3]) == folders[0]
    with pytest.raises(ValueError, match=r"'' fits 2 keys; say which of scores/.*, scores/"):
        upkeep.find_folder(sample.root, "")
    with pytest.raises(ValueError, match="'xyz' fits no key; there are: "):
        upkeep.find_folder(sample.root, "xyz")


def test_kind_before_the_key_tells_scores_from_embeddings(tmp_path: Path) -> None:
    identity, keys = {"kind": "dense"}, text_keys(["a", "b"])
    scores = ScoreBank(tmp_path).open(identity)
    scores.append(keys, keys, np.array([1, 2], dtype=np.float32))
    embeddings = EmbeddingBank(tmp_path).open(identity)
    embeddings.append(keys, np.ones((2, 3), dtype=np.float32))

    key = scores.folder.name

    assert upkeep.find_folder(tmp_path, f"scores/{key[:5]}") == scores.folder
    assert upkeep.find_folder(tmp_path, f"embeddings/{key[:5]}") == embeddings.folder
    with pytest.raises(ValueError, match=r"fits 2 keys; say which of scores/.*, embeddings/"):
        upkeep.find_folder(tmp_path, key)


def test_only_what_nobody_will_publish_is_swept(sample: Any) -> None:
    scores, other = sample.fill(), sample.fill(sample.other_identity)
    host = socket.gethostname()
    old, old_segment = time.time() - 90_000, sample.segments(other)[0]
    dead = scores.folder / f".tmp-segment-{host}-{gone_process()}-0123abcd"
    alive = scores.folder / f".tmp-segment-{host}-{os.getpid()}-0123abcd"
    elsewhere = scores.folder / ".tmp-segment-another-host-1-0123abcd"
    elsewhere_old = scores.folder / ".tmp-segment-another-host-2-0123abcd"
    unlisted, unlisted_old = (scores.folder / f"{digit * 32}.arrow" for digit in "ab")
    for path in (dead, alive, elsewhere, elsewhere_old, unlisted, unlisted_old):
        path.write_bytes(b"1234")
    for path in (alive, elsewhere_old, unlisted_old, old_segment):
        os.utime(path, (old, old))
    half_made = sample.root / "scores" / f".tmp-0123456789abcdef-{host}-{gone_process()}-0123abcd"
    half_made.mkdir()
    (half_made / "identity.json").write_bytes(b"{}")

    leftovers = upkeep.find_leftovers(sample.root)
    for leftover in leftovers:
        upkeep.remove(leftover)

    assert {leftover.path for leftover in leftovers} == {dead, elsewhere_old, unlisted_old, half_made}
    assert not any(leftover.path.exists() for leftover in leftovers)
    assert all(path.exists() for path in (alive, elsewhere, unlisted, old_segment))
    assert upkeep.find_damage(scores.folder) == upkeep.find_damage(other.folder) == []


def test_nothing_is_swept_from_a_folder_whose_manifest_is_damaged(sample: Any) -> None:
    scores = sample.fill()
    (scores.folder / "manifest.json").unlink()
    for path in sample.segments(scores):
        os.utime(path, (0, 0))

    assert upkeep.find_leftovers(sample.root) == []
