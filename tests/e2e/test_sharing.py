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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Content = Callable[[Path, str], dict[str, bytes]]


def banked_rows(cache: Path, kind: str) -> int:
    """Rows over all segments: a pair that two processes scored counts twice."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in (cache / "bank" / kind).glob("*/manifest.json")]
    return sum(segment["rows"] for manifest in manifests for segment in manifest["segments"])


def last_line(process: Any) -> Path:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return Path(stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["dense", "cross-encoder"])
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


def test_a_process_that_is_killed_leaves_its_part_to_the_other(make_workplace: Callable[..., Any], content_of: Content) -> None:
    alone, shared = make_workplace("cross-encoder"), make_workplace("cross-encoder")
    expected = alone.run("teacher_scores").folder

    first, second = (shared.start("teacher_scores", f"run.shard={number}/2") for number in range(2))
    claims = shared.cache / "bank" / "claims" / "scores"
    while not any(path.is_file() and path.stat().st_size for path in claims.rglob("*")):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    folder = shared.folder / last_line(second)
    assert first.returncode == -signal.SIGKILL
    assert content_of(folder, "*.arrow") == content_of(expected, "*.arrow")


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
    path = place.folder / "recipe.toml"
    recipe = path.read_text(encoding="utf-8")
    path.write_text(recipe[: recipe.index("[[teachers]]")] + TEACHER + recipe[recipe.index("[labels]") :], encoding="utf-8")
    collection = read_collection(Path(tomllib.loads(recipe)["collection"]["path"]))
    poison = collection.passages[next(iter(next(iter(collection.qrels["train"].values()))))]
    (place.folder / "judges.py").write_text(JUDGE.format(poison=poison), encoding="utf-8")

    for _ in range(60):
        process = place.start("teacher_scores")
        stdout, stderr = process.communicate(timeout=240)
        if process.returncode != -signal.SIGKILL:
            break

    assert (process.returncode, stdout) == (3, ""), stderr
    assert re.search(r"error: teacher mine: (\d+) of (\d+) are in quarantine, .*; all others are banked", stderr)
    assert repr(poison[:80]) in stderr
    num_ill, num_pairs = map(int, re.findall(r"teacher mine: (\d+) of (\d+) are", stderr)[0])
    assert banked_rows(place.cache, "scores") == num_pairs - num_ill
    assert not list((place.cache / "tables").glob("[!.]*"))
