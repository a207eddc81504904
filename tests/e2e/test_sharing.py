"""Several processes of one stage over one cache: the work is done once, whoever dies, and the bytes are those of one process."""

from __future__ import annotations

import json
import re
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import read_manifest
from sparsekd.collection import read_collection
from sparsekd.labels.score_table import ScoreTable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Content = Callable[[Path, str], dict[str, bytes]]


def banked_rows(cache: Path, kind: str) -> int:
    """Rows over all segments: a pair that two processes scored counts twice."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in (cache / "bank" / kind).glob("*/manifest.json")]
    return sum(segment["rows"] for manifest in manifests for segment in manifest["segments"])


@pytest.fixture(scope="module")
def alone(make_workplace: Callable[..., Any]) -> Any:
    """Where one process has scored the pairs with a cross-encoder; its ``expected`` is the table's folder."""
    place = make_workplace("cross-encoder")
    place.expected = place.folder / place.run("teacher_scores").folder
    return place


def last_line(process: Any) -> Path:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return Path(stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["dense", pytest.param("cross-encoder", marks=pytest.mark.long)])
def test_three_processes_do_the_work_of_one_once(make_workplace: Callable[..., Any], content_of: Content, kind: str) -> None:
    alone, shared = make_workplace(kind), make_workplace(kind)
    expected = alone.run("teacher_scores").folder

    processes = [shared.start("teacher_scores", f"run.shard={number}/3") for number in range(3)]
    folders = [shared.folder / last_line(process) for process in processes]

    assert {folder.name for folder in folders} == {expected.name}
    assert content_of(folders[0], "*.arrow") == content_of(expected, "*.arrow")
    assert banked_rows(shared.cache, "scores") == banked_rows(alone.cache, "scores")
    assert banked_rows(shared.cache, "embeddings") == banked_rows(alone.cache, "embeddings")
    theirs, ours = read_manifest(folders[0]), read_manifest(expected)
    assert theirs["files"] == ours["files"]
    assert theirs["fields"] == ours["fields"]


def test_a_process_that_is_killed_leaves_its_part_to_the_other(
    alone: Any, make_workplace: Callable[..., Any], content_of: Content
) -> None:
    shared = make_workplace("cross-encoder")

    first, second = (shared.start("teacher_scores", f"run.shard={number}/2") for number in range(2))
    claims = shared.cache / "bank" / "claims" / "scores"
    while not any(path.is_file() and path.stat().st_size for path in claims.rglob("*")):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    folder = shared.folder / last_line(second)
    assert first.returncode == -signal.SIGKILL
    assert content_of(folder, "*.arrow") == content_of(alone.expected, "*.arrow")


def test_two_workers_give_the_bytes_of_one_process(alone: Any, make_workplace: Callable[..., Any], content_of: Content) -> None:
    shared = make_workplace("cross-encoder")

    finished = shared.run("teacher_scores", "run.workers=2")
    folder = shared.folder / finished.folder

    assert folder.name == alone.expected.name
    assert content_of(folder, "*.arrow") == content_of(alone.expected, "*.arrow")
    assert banked_rows(shared.cache, "scores") == banked_rows(alone.cache, "scores")
    assert "2 workers share stage 1" in finished.log
    assert read_manifest(folder)["command"] == "python pipeline/teacher_scores.py recipe.toml --set run.workers=2"


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_ends_stage_1_within_ten_seconds_and_the_same_command_goes_on(
    alone: Any, make_workplace: Callable[..., Any], content_of: Content, number: signal.Signals, num_workers: int
) -> None:
    shared = make_workplace("cross-encoder")
    process = shared.start("teacher_scores", f"run.workers={num_workers}")
    claims = shared.cache / "bank" / "claims" / "scores"
    while not any(path.is_file() and path.stat().st_size for path in claims.rglob("*")):
        assert process.poll() is None, "ended before the signal"
        time.sleep(0.002)

    process.send_signal(number)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)

    assert time.monotonic() - started < 15  # 10 promised, and a machine that is shared
    assert process.returncode == 128 + number, stderr
    assert f"go on with: python pipeline/teacher_scores.py recipe.toml --set run.workers={num_workers}" in stderr
    assert not any(b'"running": true' in path.read_bytes() for path in claims.rglob("*") if path.is_file())
    folder = shared.run("teacher_scores").folder
    assert content_of(shared.folder / folder, "*.arrow") == content_of(alone.expected, "*.arrow")


JUDGE = """
import os, signal

def judge(pairs):
    if any(passage == {poison!r} for _, passage in pairs):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(query) % 7 + len(passage) % 97) for query, passage in pairs]
"""
TEACHER = """[[teachers]]
name = "mine"
kind = "callable"
function = "judges:judge"
identity = {v = "1"}
"""


def test_a_passage_that_kills_is_named_with_exit_3_and_all_other_pairs_are_banked(make_workplace: Callable[..., Any]) -> None:
    place = make_workplace()
    place.mine_by_bm25_alone()
    path = place.folder / "recipe.toml"
    recipe = path.read_text(encoding="utf-8")
    path.write_text(recipe[: recipe.index("[[teachers]]")] + TEACHER + recipe[recipe.index("[labels]") :], encoding="utf-8")
    collection = read_collection(Path(tomllib.loads(recipe)["collection"]["path"]))
    poison = collection.passages[next(iter(next(iter(collection.qrels["train"].values()))))]
    (place.folder / "judges.py").write_text(JUDGE.format(poison=poison), encoding="utf-8")

    process = place.start("teacher_scores", "run.workers=2", "run.shard_pairs=2")
    stdout, stderr = process.communicate(timeout=500)

    assert (process.returncode, stdout) == (3, ""), stderr
    assert re.search(r"error: teacher mine: (\d+) of (\d+) are in quarantine, .*; all others are banked", stderr)
    assert repr(poison[:80]) in stderr
    num_ill, num_pairs = map(int, re.findall(r"teacher mine: (\d+) of (\d+) are", stderr)[0])
    assert banked_rows(place.cache, "scores") == num_pairs - num_ill
    assert not list((place.cache / "tables").glob("[!.]*"))

    process = place.start("teacher_scores", f"labels.allow_quarantine={num_ill - 1}")
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 3, stderr
    assert not list((place.cache / "tables").glob("[!.]*"))
    allowed = place.run("teacher_scores", f"labels.allow_quarantine={num_ill}")
    [poisoned] = [passage_id for passage_id, text in collection.passages.items() if text == poison]
    manifest = read_manifest(place.folder / allowed.folder)
    assert manifest["counts"]["pairs_quarantined"] == num_ill
    ids = [passage_id for _, passage_ids, _ in ScoreTable.open(place.folder / allowed.folder).rows() for passage_id in passage_ids]
    assert ids
    assert poisoned not in ids
    assert place.run("train_student", f"labels.allow_quarantine={num_ill}", "training.max_steps=2").folder
