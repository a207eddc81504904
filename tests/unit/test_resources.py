"""What a plan says it needs: it grows with what makes it grow, what cannot fit is refused before anything is made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd import resources
from sparsekd.dry_run import describe_plan
from sparsekd.plan import Plan
from sparsekd.recipe import load_recipe
from sparsekd.resources import Need, needs_of, require

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["candidates", "tables", "students", "evaluations"]
RECIPE = """
[collection]
path = "{collection}"
[[mining.miners]]
kind = "bm25"
quota = 3
[[mining.miners]]
kind = "dense"
model = "{model}"
max_length = 64
quota = 3
[[teachers]]
name = "judge"
kind = "dense"
model = "{model}"
max_length = 64
[[teachers]]
name = "lexical"
kind = "bm25"
[labels]
num_negatives = 2
[student]
model = "{model}"
max_length = 64
initial_active_dims = 60
[training]
batch_size = 4
max_steps = 4
[run]
cache = "{cache}"
threads = 1
"""


@pytest.fixture
def plan_of(tmp_path: Path, sample_folder: Path, tiny_encoder_folder: Path) -> Callable[..., Plan]:
    """Return ``plan(*overrides)`` over a collection that may be another one."""

    def make(*overrides: str, collection: Path = sample_folder) -> Plan:
        path = tmp_path / "recipe.toml"
        text = RECIPE.format(collection=collection, model=tiny_encoder_folder, cache=tmp_path / "cache")
        path.write_text(text, encoding="utf-8")
        return Plan(load_recipe(path, list(overrides)), overrides)

    return make


def needs(plan: Plan) -> dict[str, Need]:
    return {need.kind: need for need in needs_of(plan, KINDS)}


@pytest.fixture
def make_collection(tmp_path: Path, sample_folder: Path) -> Callable[[int], Path]:
    """Return ``make(times)``: the sample collection, that many times over under other ids and with a number in each text."""

    def make(times: int) -> Path:
        folder = tmp_path / f"collection-{times}"
        (folder / "qrels").mkdir(parents=True)
        for name in ("corpus.jsonl", "queries.jsonl"):
            rows = [json.loads(line) for line in (sample_folder / name).read_text(encoding="utf-8").splitlines()]
            copies = [
                {**row, "_id": f"{row['_id']}-{copy}", "text": f"{row['text']} number {copy}"}
                for copy in range(times)
                for row in rows
            ]
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in copies), encoding="utf-8")
        for path in (sample_folder / "qrels").iterdir():
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            judged = [line.split("\t") for line in lines]
            copies = [f"{query}-{copy}\t{passage}-{copy}\t{grade}" for copy in range(times) for query, passage, grade in judged]
            (folder / "qrels" / path.name).write_text("\n".join([head, *copies]) + "\n", encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    ("override", "kind", "what"),
    [
        ("mining.miners.bm25.quota=30", "candidates", "disk"),
        ("run.batch_tokens=1_000_000", "candidates", "memory"),
        ("run.batch_tokens=1_000_000", "tables", "memory"),
        ("training.batch_size=64", "students", "memory"),
        ("student.max_length=128", "students", "memory"),
        ("run.fused_head=false", "students", "memory"),
        ("run.batch_tokens=1_000_000", "evaluations", "memory"),
    ],
)
def test_what_takes_more_is_said_to_need_more(plan_of: Any, override: str, kind: str, what: str) -> None:
    before, after = needs(plan_of())[kind], needs(plan_of(override))[kind]

    assert getattr(after, what) > getattr(before, what)


def test_mini_batches_bound_a_step(plan_of: Any) -> None:
    large = "training.batch_size=512"

    assert needs(plan_of(large, "training.mini_batch_size=8"))["students"].memory < needs(plan_of(large))["students"].memory


def test_ten_times_the_collection_needs_ten_times_the_disk_for_scores(plan_of: Any, make_collection: Any) -> None:
    small, large = needs(plan_of(collection=make_collection(1))), needs(plan_of(collection=make_collection(10)))

    assert large["tables"].disk == 10 * small["tables"].disk
    assert all(large[kind].memory > small[kind].memory for kind in KINDS)


def test_memory_that_is_not_there_is_refused_before_anything_is_made(plan_of: Any, tmp_path: Path) -> None:
    plan = plan_of("run.memory_gb=0.5")

    with pytest.raises(ValueError, match=r"candidates: it needs up to \d+ MB of memory, 500 MB are there; .*: lower .*memory_gb"):
        require(plan, KINDS)
    require(plan_of("run.memory_gb=4"), KINDS)
    assert not (tmp_path / "cache").exists()


def test_workers_need_as_much_each(plan_of: Any) -> None:
    require(plan_of("run.memory_gb=2"), KINDS)
    with pytest.raises(ValueError, match=r"candidates: 4 workers need up to .* of memory, 2.0 GB are there"):
        require(plan_of("run.memory_gb=2", "run.workers=4"), KINDS)


def test_a_disk_without_room_is_refused(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_disk", lambda cache: 1000)

    with pytest.raises(ValueError, match=r"candidates, tables, students, evaluations need up to .* on this disk, 0 MB are free"):
        require(plan_of(), KINDS)


def test_the_plan_says_what_each_artifact_needs(plan_of: Any) -> None:
    told = describe_plan(plan_of("run.memory_gb=8"), KINDS).splitlines()

    for kind in KINDS:
        assert any(line.startswith(f"needs        {kind}: memory up to ") and "; disk up to " in line for line in told), kind
    assert any(line.startswith("there are 8.0 GB of memory and ") for line in told)


def test_a_student_that_is_not_trained_yet_is_named_and_not_counted(plan_of: Any) -> None:
    plan = plan_of("mining.rounds=2")
    [model] = [miner.model for miner in plan.student_miners]

    assert needs(plan)["candidates"].unknown == (model,)
    assert f"of unknown size, so not counted: {model}" in describe_plan(plan, KINDS)


@pytest.mark.parametrize(
    ("group", "machine", "expected"),
    [("max", "MemTotal:  2000 kB\n", 2_048_000), ("1000000", "MemTotal: 2000 kB\n", 1_000_000), (None, None, None)],
)
def test_the_limit_is_the_smaller_of_machine_and_control_group(
    tmp_path: Path, group: str | None, machine: str | None, expected: int | None
) -> None:
    for name, content in (("group", group), ("machine", machine)):
        if content is not None:
            (tmp_path / name).write_text(content, encoding="ascii")
    found = [resources.control_group_limit(tmp_path / "group"), resources.machine_memory(tmp_path / "machine")]

    assert min((limit for limit in found if limit is not None), default=None) == expected


STAGES = [("teacher_scores", ["candidates", "tables"]), ("train_student", ["students"]), ("evaluate", ["evaluations"])]


TELLS_ITS_PEAK = """
import atexit, re, runpy, sys
from pathlib import Path

def tell(path):
    high_water = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    Path(path).write_text(str(int(high_water[1]) * 1024))

atexit.register(tell, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The kernel's own figure of the process: what it tells a parent begins with the parent's."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [10, 100])
def test_memory_and_disk_stay_within_what_the_plan_says(plan_of: Any, make_collection: Any, tmp_path: Path, times: int) -> None:
    collection = make_collection(times)
    for stage, kinds in STAGES:
        stated = needs_of(plan_of(collection=collection), kinds)
        before = _size(tmp_path / "cache")
        script, peak_file = ROOT / "pipeline" / f"{stage}.py", tmp_path / "peak"
        command = [sys.executable, "-c", TELLS_ITS_PEAK, str(peak_file), str(script), str(tmp_path / "recipe.toml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak, grown = int(peak_file.read_text()), _size(tmp_path / "cache") - before
        print(f"\n{times} times {stage}: peak {peak / 1e6:.0f} MB of {max(each.memory for each in stated) / 1e6:.0f}", end="")
        print(f", disk {grown / 1e6:.1f} MB of {sum(each.disk for each in stated) / 1e6:.1f}", end="")
        assert peak <= max(need.memory for need in stated) <= 1.6 * peak
        assert grown <= sum(need.disk for need in stated) + 1_000_000  # manifests, logs


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
