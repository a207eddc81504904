"""The contract of the stage scripts: exit codes, what goes to which stream, and bad input named before any model is loaded.

Runs the real scripts; none of these runs reaches torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsekd.artifact import publish
from sparsekd.evaluation.evaluate import METRICS
from sparsekd.plan import Plan
from sparsekd.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("teacher_scores", "train_student", "evaluate")
RECIPE = """
[collection]
path = "collection"
[[mining.miners]]
kind = "bm25"
quota = 4
[[teachers]]
name = "judge"
kind = "cross-encoder"
model = "model"
[student]
model = "model"
"""
# Runs a script as __main__ and says at the end whether torch came in; the exit code is the script's.
WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
code = 1
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
sys.stderr.write("loaded: " + " ".join(sorted({"torch", "transformers", "faiss"} & set(sys.modules))) + "\\n")
sys.exit(code)
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def place(tmp_path: Path, sample_folder: Path) -> Path:
    """A working directory with a recipe, its collection, and a model folder that is digested and never loaded."""
    shutil.copytree(sample_folder, tmp_path / "collection")
    (tmp_path / "model").mkdir()
    save_file({"weight": np.zeros(4, dtype=np.float32)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "modules.json").write_text("[]", encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE + f'[run]\ncache = "{tmp_path / "cache"}"\n', encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(place: Path) -> Run:
    """Return ``run(script, *arguments)``: a stage script, watched, in the working directory."""

    def start(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WATCHED, str(ROOT / "pipeline" / f"{script}.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return start


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def publish_all(place: Path, kinds: Sequence[str]) -> Path:
    """Publish placeholders under the recipe's own keys; return the last one's folder."""
    old = Path.cwd()
    os.chdir(place)
    try:
        plan = Plan(load_recipe(Path("recipe.toml"), []))
        for kind, fields in plan.artifacts(kinds):
            folder = plan.folder(kind, fields)
            with publish(folder, kind=kind, fields=fields, extra={}) as temporary:
                (temporary / METRICS).write_text(json.dumps({"systems": {"bm25": {"nDCG@10": 0.5}}}), encoding="utf-8")
    finally:
        os.chdir(old)
    return folder


BAD_INPUT = {
    "an unknown key": (["--set", "student.lambda_pasage=1"], "lambda_pasage is not a known key; did you mean lambda_passage?"),
    "a value out of range": (["--set", "training.batch_size=0"], "[training] batch_size = 0: "),
    "an override that is none": (["--set", "training"], "expected section.key=value"),
    "a collection that is not there": (["--set", "collection.path=nowhere"], "nowhere"),
    "a teacher that is not there": (["--set", "teachers.judge.model=no/such/model"], "model 'no/such/model': no such folder"),
    "a student that is not there": (["--set", "student.model=./nowhere"], "model './nowhere': no such folder"),
    "a shard beyond their number": (["--shard", "2/2"], "expected i/N with i from 0 to N - 1"),
    "a shard that is no fraction": (["--shard", "two"], "[run] shard = 'two'"),
    "a path that is too long": (["--set", f"collection.path={'x' * 300}"], "/corpus.jsonl: file name too long; name another path"),
    "a model's path that is too long": (["--set", f"student.model={'x' * 300}"], "file name too long; name another path"),
    "nobody's home": (["--set", "student.model=~no-such-user/x"], "model '~no-such-user/x': Could not determine home"),
    "NUL in a path": (["--set", 'run.cache="a\\u0000"'], "recipe.toml: [run] cache: a text with NUL at character 2; expected none"),
    "an option for a model": (["--set", "student.model=-rf"], "model '-rf': no such folder, and not a hub id; expected "),
    "labels that do not fit the loss": (["--set", "labels.kind=margin"], 'needs [labels] kind = "score_list"'),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_exits_2_and_says_why_before_torch(run: Run, place: Path, name: str) -> None:
    arguments, message = BAD_INPUT[name]

    done = run("train_student", "recipe.toml", *arguments)

    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "loaded: \n" in done.stderr
    assert not (place / "cache").exists()


def test_a_recipe_that_is_not_there_exits_2(run: Run) -> None:
    done = run("teacher_scores", "missing.toml")

    assert done.returncode == 2
    assert "error: missing.toml: no such recipe; expected a TOML file" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["recipe.toml", "--unknown"]])
def test_a_wrong_command_line_exits_2(run: Run, arguments: list[str]) -> None:
    done = run("evaluate", *arguments)

    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_torch(run: Run, script: str) -> None:
    done = run(script, "-h")

    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert "SECTION.KEY=VALUE" in done.stdout
    assert done.stderr == "loaded: \n"


def test_a_failure_that_is_not_the_inputs_exits_1_with_its_traceback(run: Run, place: Path) -> None:
    # python -c looks here first.
    (place / "bm25s.py").write_text("raise RuntimeError('a library that is broken')", encoding="utf-8")

    done = run("teacher_scores", "recipe.toml")

    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a library that is broken" in done.stderr
    assert done.stdout == ""


def test_a_cache_that_is_a_file_exits_2_and_stays_what_it_is(run: Run, place: Path) -> None:
    (place / "cache").write_text("a file where the cache's folder should be", encoding="utf-8")

    done = run("teacher_scores", "recipe.toml", "--set", "run.cache=cache")

    assert done.returncode == 2
    assert "not a directory; name another path in the recipe" in done.stderr
    assert (place / "cache").read_text(encoding="utf-8") == "a file where the cache's folder should be"


@pytest.mark.parametrize(
    ("script", "kind"), [("train_student", "students"), ("evaluate", "evaluations")], ids=["train_student", "evaluate"]
)
def test_a_hit_answers_without_torch_and_its_folder_is_the_last_line(run: Run, place: Path, script: str, kind: str) -> None:
    folder = publish_all(place, [kind])
    before = files_under(place)

    done = run(script, "recipe.toml")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
    assert ": hit" in done.stderr
    assert "loaded: \n" in done.stderr
    assert files_under(place) == before


def test_a_damaged_hit_is_named(run: Run, place: Path) -> None:
    folder = publish_all(place, ["students"])
    (folder / METRICS).unlink()

    done = run("train_student", "recipe.toml")

    assert done.returncode == 1
    assert f"{METRICS}: missing, its manifest lists it; remove {folder} and rerun" in done.stderr


def test_the_log_goes_to_stderr_at_the_level_asked_for(run: Run, place: Path) -> None:
    publish_all(place, ["students"])

    done = run("train_student", "recipe.toml", "--set", "run.log_level=WARNING")

    assert ": hit" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_imports_no_torch_and_makes_nothing(run: Run, place: Path, script: str) -> None:
    before = files_under(place)

    done = run(script, "recipe.toml", "--dry-run")

    assert done.returncode == 0, done.stderr
    assert "order of work: candidates -> tables" in done.stdout
    assert "loaded: \n" in done.stderr
    assert files_under(place) == before
