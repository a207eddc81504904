"""Several processes of one stage over one cache: the work is done once, whoever dies, and the bytes are those of one process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Content = Callable[[Path, str], dict[str, bytes]]
OF_THE_RUN = ("wall_seconds", "command", "overrides", "counts", "recipe", "when", "machine", "warnings")


def banked_rows(cache: Path, kind: str) -> int:
    """Rows over all segments: a pair that two processes scored counts twice."""
    manifests = [read_json(path) for path in (cache / "bank" / kind).glob("*/manifest.json")]
    return sum(segment["rows"] for manifest in manifests for segment in manifest["segments"])


def read_json(path: Path) -> Any:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


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
