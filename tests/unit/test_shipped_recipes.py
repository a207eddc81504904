"""Every recipe of pipeline/recipes: what its head says, and the plan of each stage script over tiny stand-ins.

All dry runs happen in one process, for the imports; each runs the stage script itself as __main__.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsekd.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "pipeline" / "recipes").glob("*.toml"))}
SCRIPTS = ("train_teacher", "teacher_scores", "train_student", "evaluate", "study")
ORDER = {
    "teacher_scores": "candidates -> tables",
    "train_student": "candidates -> tables -> students",
    "evaluate": "candidates -> tables -> students -> evaluations",
}
HEAD = ("Source", "Needs", "Cost", "Reach")
# Runs pipeline/SCRIPT.py RECIPE ARGUMENTS… for each case of argv[1] and prints exit code, stdout and stderr by case.
PROGRAM = """
import contextlib, io, json, runpy, sys
said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = arguments
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    said[name] = [code, out.getvalue(), log.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def stand_ins(
    sample_folder: Path,
    tiny_encoder_folder: Path,
    tiny_masked_lm_folder: Path,
    tiny_splade_folder: Path,
    tiny_cross_encoder_folder: Path,
) -> Callable[[Recipe], list[str]]:
    """Return ``stand_ins(recipe)``: overrides that replace its collection and each model by a tiny one of the same kind."""
    model_by_kind = {"dense": tiny_encoder_folder, "sparse": tiny_splade_folder, "cross-encoder": tiny_cross_encoder_folder}

    def overrides(recipe: Recipe) -> Iterator[str]:
        yield f"collection.path={sample_folder}"
        for position, miner in enumerate(recipe.mining.miners):
            if hasattr(miner, "model"):
                yield f"mining.miners.{position}.model={model_by_kind[miner.kind]}"
        for teacher in recipe.teachers:
            if hasattr(teacher, "model"):
                yield f"teachers.{teacher.name}.model={model_by_kind[teacher.kind]}"
        if recipe.train_teacher is not None:
            yield f"train_teacher.model={tiny_encoder_folder}"
        has_head = recipe.student.kind == "splade" and recipe.student.initial_active_dims is None
        yield f"student.model={tiny_masked_lm_folder if has_head else tiny_encoder_folder}"

    return lambda recipe: list(overrides(recipe))


@pytest.fixture(scope="module")
def dry_runs(
    stand_ins: Callable[[Recipe], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr by ``SCRIPT RECIPE``."""
    folder = tmp_path_factory.mktemp("dry-runs")
    cases = {}
    for name, path in RECIPES.items():
        overrides = [*stand_ins(load_recipe(path)), f"run.cache={folder / name}"]
        arguments = [str(path), "--dry-run", *(word for override in overrides for word in ("--set", override))]
        for script in SCRIPTS:
            cases[f"{script} {name}"] = [str(ROOT / "pipeline" / f"{script}.py"), *arguments]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return {case: tuple(said) for case, said in json.loads(done.stdout).items()}


@pytest.mark.parametrize("script", ORDER)
@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_plans_every_recipe_over_stand_ins(name: str, script: str, dry_runs: dict[str, tuple[int, str, str]]) -> None:
    code, plan, log = dry_runs[f"{script} {name}"]

    assert code == 0, log
    assert plan.splitlines()[-1] == f"order of work: {ORDER[script]}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_teacher_is_trained_where_the_recipe_asks_for_one(name: str, dry_runs: dict[str, tuple[int, str, str]]) -> None:
    code, plan, log = dry_runs[f"train_teacher {name}"]

    if load_recipe(RECIPES[name]).train_teacher is None:
        assert code == 2
        assert log.startswith("error: the recipe has no [train_teacher]")
    else:
        assert code == 0, log
        assert plan.splitlines()[-1] == "order of work: candidates -> teachers"


@pytest.mark.parametrize("name", RECIPES)
def test_every_member_of_a_study_has_its_plan(name: str, dry_runs: dict[str, tuple[int, str, str]]) -> None:
    code, plan, log = dry_runs[f"study {name}"]

    study = load_recipe(RECIPES[name]).study
    if study is None:
        assert code == 2
        assert log.startswith("error: [study] has no member")
    else:
        assert code == 0, log
        assert plan.count(f"order of work: {ORDER['evaluate']}") == len(study.overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_recipe_says_source_needs_cost_and_reach(name: str) -> None:
    head: list[str] = []
    for line in RECIPES[name].read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").removeprefix(" "))

    said = {label: "" for label in HEAD}
    at = ""
    for line in head:
        label = line.partition(":")[0]
        at = label if label in HEAD else at if line.startswith(" ") else ""
        if at:
            said[at] += line + "\n"
    assert [label for label in HEAD if not said[label].partition(":")[2].strip()] == []
    assert "measured" in said["Cost"] or "estimate" in said["Cost"]
