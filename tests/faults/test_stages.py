"""The real stages, killed, signalled, given other inputs meanwhile, moved, and run with other shards and threads.

Each run is a child of one process that has imported torch, so it costs its work alone.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.labels.score_table import ScoreTable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
[collection]
path = "collection"
[[mining.miners]]
kind = "bm25"
quota = 3
[[mining.miners]]
kind = "dense"
model = "encoder"
quota = 3
[[teachers]]
name = "tiny"
kind = "cross-encoder"
model = "judge"
[labels]
num_negatives = 3
[student]
model = "encoder"
max_length = 32
initial_active_dims = 60
[training]
batch_size = 4
max_steps = 4
[run]
cache = "cache"
save_steps = 2
shard_pairs = 6
threads = 1
"""
IMPORTED = (
    "sparsekd.experiment.stages", "sparsekd.evaluation.evaluate", "sparsekd.evaluation.student", "sparsekd.training.fit",
    "sparsekd.training.trainer", "sparsekd.teachers.scoring", "sparsekd.teachers.cross_encoder", "sparsekd.mining.miners",
    "sparsekd.mining.dense", "sparsekd.mining.bm25", "sparsekd.cli", "sparsekd.cli.exports", "sparsekd.engines.student",
    "sentence_transformers", "faiss", "datasets",
)  # fmt: skip
EXPORT = ROOT / "tests" / "faults" / "export_student.py"
Count = Callable[[int], None]


@pytest.fixture(scope="module")
def stages(make_nursery: Callable[..., Any]) -> Any:
    """Processes that have torch and what the stages import."""
    return make_nursery(*IMPORTED)


class Place:
    """A working directory with a recipe, a collection and models of its own."""

    def __init__(self, folder: Path, stages: Any) -> None:
        self.folder, self.cache, self._stages = folder, folder / "cache", stages

    def start(self, stage: str, *overrides: str) -> Any:
        script = EXPORT if stage == "export" else ROOT / "pipeline" / f"{stage}.py"
        settings = [word for override in overrides for word in ("--set", override)]
        return self._stages.start(self.folder, script, "recipe.toml", *settings)

    def run(self, stage: str, *overrides: str) -> Path:
        """Carry a stage out and return the folder it says."""
        child = self.start(stage, *overrides)
        assert child.wait() == 0, child.stderr
        return self.folder / child.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def make_place(
    tmp_path_factory: pytest.TempPathFactory,
    stages: Any,
    sample_folder: Path,
    tiny_encoder_folder: Path,
    tiny_cross_encoder_folder: Path,
) -> Callable[..., Place]:
    """Return ``make(like=None)``: a place of its own, or one that begins with another's cache."""

    def make(like: Place | None = None) -> Place:
        folder = tmp_path_factory.mktemp("place")
        shutil.copytree(sample_folder, folder / "collection")
        shutil.copytree(tiny_encoder_folder, folder / "encoder")
        shutil.copytree(tiny_cross_encoder_folder, folder / "judge")
        (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
        if like is not None:
            shutil.copytree(like.cache, folder / "cache")
        return Place(folder, stages)

    return make


@pytest.fixture(scope="module")
def finished(make_place: Callable[..., Place]) -> Place:
    """A place where everything is made."""
    place = make_place()
    place.run("evaluate")
    place.run("export")
    return place


def content(place: Place) -> dict[str, bytes]:
    """Return the bytes of what was made: rows, weights, rankings; manifests tell the time."""
    patterns = ("searches/*/*.npy", "candidates/*/*.arrow", "tables/*/*.arrow", "students/*/model.safetensors", "runs/*/run.trec")
    patterns = (*patterns, "*/*/metrics.json")
    found = {path.relative_to(place.cache).as_posix(): path for pattern in patterns for path in place.cache.glob(pattern)}
    return {name: path.read_bytes() for name, path in found.items() if "/.tmp-" not in name}


BEGUN: dict[str, tuple[str, str]] = {
    "mine": ("teacher_scores", "bank/embeddings"),
    "embed": ("teacher_scores", "bank/embeddings/*/*.arrow"),
    "score": ("teacher_scores", "bank/scores/*/*.arrow"),
    "table": ("teacher_scores", "bank/scores/*/manifest.json"),
    "train": ("train_student", "tables/*/manifest.json"),
    "checkpoint": ("train_student", "students/*.work/checkpoint-*"),
    "evaluate": ("evaluate", "runs"),
    "export": ("export", "indexes"),
}
"""Which script a stage is a part of, and the file by which one sees that it has begun."""


@pytest.mark.fault("F1")
@pytest.mark.parametrize("stage", BEGUN)
def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(
    stage: str, make_place: Callable[..., Place], finished: Place, count: Count
) -> None:
    generator, place = random.Random(stage), make_place()
    script, sign = BEGUN[stage]
    if script in ("evaluate", "export"):
        place.run("train_student")
    kills = 0
    for _ in range(3):
        child = place.start(script)
        while child.is_running() and not any(place.cache.glob(sign)):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        child.signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL

    place.run(script)

    assert kills >= 1
    made = content(place)
    assert made
    assert made == {name: each for name, each in content(finished).items() if name in made}
    if stage == "export":
        assert exported(place) == exported(finished)
    count(kills)


def exported(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (place.folder / "out").rglob("*.json*") if path.name != "manifest.json"}


@pytest.mark.fault("F14")
@pytest.mark.parametrize("stage", ["score", "train", "evaluate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stage_in_seconds_and_says_how_to_go_on(
    stage: str, number: signal.Signals, make_place: Callable[..., Place], finished: Place, count: Count
) -> None:
    place = make_place()
    script, sign = BEGUN[stage]
    if stage == "evaluate":
        place.run("train_student")
        sign = "runs/*/run.trec"
    child = place.start(script)
    while child.is_running() and not any(place.cache.glob(sign)):
        time.sleep(0.002)
    started = time.monotonic()
    child.signal(number)

    code = child.wait()

    assert code == 128 + number, child.stderr
    assert time.monotonic() - started < 10
    assert child.stderr.splitlines()[-1].startswith("go on with: python pipeline/")
    assert "Traceback" not in child.stderr
    assert not [path for path in place.cache.rglob(".tmp-*") if "bank" not in path.parts]
    place.run(script)
    made = content(place)
    assert made == {name: each for name, each in content(finished).items() if name in made}
    count(1)


CHANGED = {
    "mine": ("teacher_scores", "bank/embeddings", "collection/corpus.jsonl"),
    "score": ("teacher_scores", "candidates/*/manifest.json", "judge/config.json"),
    "table": ("teacher_scores", "bank/scores/*/*.arrow", "collection/qrels/train.tsv"),
    "train": ("train_student", "students/*.work/checkpoint-*", "collection/queries.jsonl"),
    "evaluate": ("evaluate", "runs", "collection/qrels/test.tsv"),
}
"""Which script, when, and which of its inputs gets another byte; white space at its end changes no row, and yet its key."""


@pytest.mark.fault("F15")
@pytest.mark.parametrize("stage", CHANGED)
def test_an_input_that_changes_meanwhile_is_named_with_exit_2_before_anything_is_published(
    stage: str, make_place: Callable[..., Place], count: Count
) -> None:
    script, sign, name = CHANGED[stage]
    place = make_place()
    if stage == "evaluate":
        place.run("train_student")
    child = place.start(script)
    while child.is_running() and not any(place.cache.glob(sign)):
        time.sleep(0.001)
    child.signal(signal.SIGSTOP)
    before = {path for path in place.cache.glob("*/*/manifest.json")}
    with (place.folder / name).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    child.signal(signal.SIGCONT)

    code = child.wait()

    assert code == 2, child.stderr
    assert ("bm25.qrels was " if stage == "evaluate" else Path(name).name) in child.stderr.splitlines()[-1]
    assert "run the same command again" in child.stderr.splitlines()[-1]
    made = {path for path in place.cache.glob("*/*/manifest.json") if path.parent.parent.name != "bank"}
    kinds = {"mine": "searches candidates", "score": "tables", "table": "tables", "train": "students", "evaluate": "evaluations"}
    assert not [path for path in made - before if path.parent.parent.name in kinds[stage].split()]
    place.run(script)
    count(1)


@pytest.mark.fault("F17")
@pytest.mark.parametrize("stage", ["teacher_scores", "train_student", "evaluate"])
def test_a_cache_that_was_copied_moved_touched_or_made_read_only_still_hits(
    stage: str, make_place: Callable[..., Place], finished: Place, tmp_path: Path, count: Count
) -> None:
    place = make_place(like=finished)
    for path in place.cache.rglob("*"):
        path.touch()
    moved = place.cache.rename(place.folder / "elsewhere")
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*") if path.is_file()}
    is_mounted = not subprocess.run(["mount", "--bind", "-o", "ro", moved, moved], capture_output=True, check=False).returncode
    for path in [moved, *moved.rglob("*")] if not is_mounted else []:
        path.chmod(0o555)
    try:
        child = place.start(stage, "run.cache=elsewhere")
        code = child.wait()
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", moved], check=True)

    assert code == 0, child.stderr
    assert ": hit" in child.stderr
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("*") if path.is_file()} == before
    count(4)


@pytest.mark.fault("F19", "score")
def test_other_shards_batches_and_threads_give_the_same_rows_and_scores(
    make_place: Callable[..., Place], finished: Place, count: Count
) -> None:
    from sparsekd.labels.score_table import ScoreTable

    [expected] = (finished.cache / "tables").glob("[!.]*")
    rows = list(ScoreTable.open(expected).rows())
    settings = [(3, 64, 1), (50, 64, 2), (6, 4096, 2), (1000, 100_000, 1)]
    for shard, tokens, threads in settings:
        place = make_place()
        folder = place.run("teacher_scores", f"run.shard_pairs={shard}", f"run.batch_tokens={tokens}", f"run.threads={threads}")
        assert folder.name == expected.name
        found = list(ScoreTable.open(folder).rows())
        assert [row[:2] for row in found] == [row[:2] for row in rows]
        for ours, theirs in zip(found, rows, strict=True):
            assert ours[2] == pytest.approx(theirs[2], abs=1e-5)
    count(len(settings))


@pytest.mark.fault("F8", "stage 1")
def test_four_processes_of_stage_1_make_one_table(make_place: Callable[..., Place], finished: Place, count: Count) -> None:
    place = make_place()
    children = [place.start("teacher_scores", f"run.shard={number}/4") for number in range(4)]

    assert [child.wait() for child in children] == [0] * 4, "\n".join(child.stderr for child in children)
    assert len({child.stdout.splitlines()[-1] for child in children}) == 1
    made = content(place)
    assert made == {name: each for name, each in content(finished).items() if name in made}
    assert not list(place.cache.rglob(".tmp-*"))
    count(1)


@pytest.mark.fault("F9", "stage 1")
def test_two_recipes_over_one_cache_each_make_what_they_make_alone(
    make_place: Callable[..., Place], finished: Place, count: Count
) -> None:
    other = "mining.miners.bm25.quota=2"
    alone, together = make_place(), make_place()
    expected = alone.run("teacher_scores", other)
    children = [together.start("teacher_scores"), together.start("teacher_scores", other)]

    assert [child.wait() for child in children] == [0, 0], "\n".join(child.stderr for child in children)
    folders = [together.folder / child.stdout.splitlines()[-1] for child in children]
    assert folders[1].name == expected.name != folders[0].name
    # A pair that both need is scored in the batches of whoever comes first: ids are equal, scores to float32's rounding.
    for folder, alone_folder in zip(folders, (next((finished.cache / "tables").glob("[!.]*")), expected), strict=True):
        found, whole = ScoreTable.open(folder), ScoreTable.open(alone_folder)
        assert [(query_id, ids) for query_id, ids, _ in found.rows()] == [(query_id, ids) for query_id, ids, _ in whole.rows()]
        assert found.labels() == pytest.approx(whole.labels(), abs=1e-5)
    count(1)


@pytest.mark.fault("F3", "stage 1")
def test_stage_1_on_a_full_disk_says_so_in_a_line_and_goes_on_once_there_is_room(
    make_place: Callable[..., Place], finished: Place, disks: Any, count: Count
) -> None:
    place = make_place()
    try:
        disk = disks.small_disk(place.cache, 4096 * 8)
        resize = disk.__enter__()
    except PermissionError as error:
        pytest.skip(str(error))
    try:
        child = place.start("teacher_scores")
        assert child.wait() == 1, child.stderr
        last = child.stderr.splitlines()[-1]
        assert last.startswith("error: cache/")
        assert "no space left on device; " in last
        assert "Traceback" not in child.stderr
        resize(1 << 24)
        place.run("teacher_scores")
        made = content(place)
    finally:
        disk.__exit__(None, None, None)
    assert made == {name: each for name, each in content(finished).items() if name in made}
    count(1)


@pytest.mark.fault("F5", "stage 1")
def test_a_damaged_table_is_named_and_made_again_without_a_teacher(
    make_place: Callable[..., Place], finished: Place, count: Count
) -> None:
    place = make_place(like=finished)
    [folder] = (place.cache / "tables").glob("[!.]*")
    [shard] = folder.glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-8])
    child = place.start("teacher_scores")

    assert child.wait() == 1
    assert child.stderr.splitlines()[-1].endswith(f"remove {folder.relative_to(place.folder)} and rerun")
    shutil.rmtree(folder)
    again = place.run("teacher_scores")
    assert json.loads((again / "manifest.json").read_text(encoding="utf-8"))["counts"]["pairs_scored"] == 0
    assert content(place) == content(finished)
    count(1)
