"""SIGKILL at random moments, then the same command again: the bytes of a run that was never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Content = Callable[[Path, str], dict[str, bytes]]
POLL_SECONDS = 0.002
DROPOUT = "student.dropout=0.1"


def kill_when(process: subprocess.Popen[str], is_reached: Callable[[], bool], delay_seconds: float) -> bool:
    """Kill a stage ``delay_seconds`` after the moment; False if it finished before."""
    while process.poll() is None and not is_reached():
        time.sleep(POLL_SECONDS)
    time.sleep(delay_seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def banked_pairs(cache: Path) -> int:
    """Scored pairs on disk, as the bank's manifests say."""
    published = (path for path in (cache / "bank" / "scores").glob("*/manifest.json") if not path.parent.name.startswith("."))
    return sum(_rows(path) for path in published)


def _rows(path: Path) -> int:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return sum(segment["rows"] for segment in manifest["segments"])


def newest_step(cache: Path) -> int:
    """Step of the newest checkpoint that has begun to be written."""
    steps = [int(path.name.rpartition("-")[2]) for path in (cache / "students").glob("*.work/checkpoint-*")]
    return max(steps, default=0)


@pytest.mark.parametrize("kind", ["dense", "cross-encoder"])
def test_stage_1_killed_at_random_moments_ends_with_the_same_bytes(
    make_workplace: Callable[..., Any], content_of: Content, kind: str
) -> None:
    uninterrupted = make_workplace(kind).run("teacher_scores")
    generator, killed = random.Random(kind), make_workplace(kind)
    num_kills = 0
    for moment in sorted(generator.sample(range(1, 80), 3)):
        process = killed.start("teacher_scores")
        num_kills += kill_when(process, lambda moment=moment: banked_pairs(killed.cache) >= moment, generator.uniform(0, 0.004))

    finished = killed.run("teacher_scores")

    counts = finished.manifest["counts"]
    reused = counts["pairs_reused"]
    assert num_kills >= 1
    assert reused > 0  # what the killed runs had committed was not scored again
    assert counts["pairs_scored"] + reused == uninterrupted.manifest["counts"]["pairs"]
    assert finished.folder.name == uninterrupted.folder.name
    assert content_of(finished.folder, "*.arrow") == content_of(uninterrupted.folder, "*.arrow")
    assert not [path for path in killed.cache.rglob(".tmp-*") if path.parent == finished.folder]


@pytest.fixture(scope="module")
def uninterrupted(make_workplace: Callable[..., Any]) -> Any:
    """A student that was trained in one go, with dropout, so that the state of the random numbers matters too."""
    return make_workplace().run("train_student", DROPOUT)


def test_stage_2_killed_at_random_steps_ends_with_the_same_weights(
    make_workplace: Callable[..., Any], uninterrupted: Any, content_of: Content
) -> None:
    generator, killed = random.Random(2), make_workplace()
    num_kills = 0
    for moment in sorted(generator.sample(range(3, 31, 3), 3)):
        process = killed.start("train_student", DROPOUT)
        num_kills += kill_when(process, lambda moment=moment: newest_step(killed.cache) >= moment, generator.uniform(0, 0.03))

    finished = killed.run("train_student", DROPOUT)

    assert num_kills >= 1
    assert finished.manifest["counts"]["resumed_from_step"] > 0
    assert finished.manifest["counts"]["steps"] == 30
    assert finished.folder.name == uninterrupted.folder.name
    for pattern in ("model.safetensors", "config.json", "modules.json"):
        assert content_of(finished.folder, pattern) == content_of(uninterrupted.folder, pattern)


def test_a_run_killed_while_it_publishes_ends_with_the_same_weights(
    make_workplace: Callable[..., Any], uninterrupted: Any, content_of: Content
) -> None:
    workplace = make_workplace()
    process = workplace.start("train_student", DROPOUT)
    was_killed = kill_when(process, lambda: any((workplace.cache / "students").glob(".tmp-*")), 0.0)

    finished = workplace.run("train_student", DROPOUT)

    if was_killed:
        assert finished.manifest["counts"]["resumed_from_step"] == 30
    assert content_of(finished.folder, "model.safetensors") == content_of(uninterrupted.folder, "model.safetensors")


def test_a_run_killed_between_two_rounds_goes_on_with_the_second(
    make_workplace: Callable[..., Any], content_of: Content
) -> None:
    rounds = ("mining.rounds=2", "mining.student_miner.quota=2", "training.max_steps=4")
    uninterrupted, killed = make_workplace().run("train_student", *rounds), make_workplace()
    process = killed.start("train_student", *rounds)

    def published() -> list[Path]:
        """Students under their names; pathlib's * takes temporary folders, which begin with a dot, too."""
        found = (killed.cache / "students").glob("*/manifest.json")
        return [path for path in found if not path.parent.name.startswith(".")]

    was_killed = kill_when(process, lambda: bool(published()), 0.0)
    [first] = published()

    finished = killed.run("train_student", *rounds)

    assert was_killed
    assert f"student {first.parent.name}: hit" in finished.log
    assert finished.folder.name == uninterrupted.folder.name != first.parent.name
    assert content_of(finished.folder, "model.safetensors") == content_of(uninterrupted.folder, "model.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_training_saves_the_step_and_says_how_to_go_on(
    make_workplace: Callable[..., Any], uninterrupted: Any, content_of: Content, number: signal.Signals, code: int
) -> None:
    workplace = make_workplace()
    process = workplace.start("train_student", DROPOUT)
    while process.poll() is None and newest_step(workplace.cache) < 6:
        time.sleep(POLL_SECONDS)

    process.send_signal(number)
    stdout, log = process.communicate(timeout=120)

    assert (process.returncode, stdout) == (code, "")
    first, second = log.splitlines()[-2:]
    assert first.startswith(f"stopped by {number.name} after step ")
    assert second == "go on with: python pipeline/train_student.py recipe.toml --set student.dropout=0.1"
    assert "Traceback" not in log
    finished = workplace.run("train_student", DROPOUT)
    assert finished.manifest["counts"]["resumed_from_step"] == int(first.split()[5])
    assert content_of(finished.folder, "model.safetensors") == content_of(uninterrupted.folder, "model.safetensors")
