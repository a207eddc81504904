"""The sbatch script: what it asks Slurm for, and that its shell does what it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsekd.cli import app
from sparsekd.runners.slurm import array_script

NOTHING = {"cpus": 4, "gpus": 0, "time": None, "partition": None}


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_it_asks_for_what_was_told() -> None:
    script = array_script("r.toml", [], jobs=8, cpus=16, gpus=2, time="24:00:00", partition="a100")

    asked = {"--array=0-7", "--cpus-per-task=16", "--gpus-per-task=2", "--time=24:00:00", "--partition=a100", "--requeue"}
    assert asked <= set(directives(script))
    assert "--set run.threads=8 --set run.device=cuda --set run.workers=2" in script


def test_it_asks_for_no_more() -> None:
    script = array_script("r.toml", [], jobs=1, **NOTHING)

    assert not [line for line in directives(script) if line.startswith(("--gpus", "--time", "--partition"))]
    assert "run.device" not in script


def run(script: str, folder: Path, codes: list[int]) -> tuple[int, list[list[str]]]:
    """Run the script with an ``srun`` that ends with one code after another; return its own, and the arguments of each call."""
    (folder / "codes").write_text("\n".join(map(str, codes)) + "\n", encoding="utf-8")
    srun = folder / "srun"
    srun.write_text(
        '#!/bin/bash\nprintf "%s\\t" "$@" >> calls; echo >> calls\ncode=$(head -n 1 codes); sed -i 1d codes; exit $code\n',
        encoding="utf-8",
    )
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash"], input=script, text=True, cwd=folder, env=environment, check=False, capture_output=True)
    return done.returncode, [line.split("\t")[:-1] for line in (folder / "calls").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143])
def test_a_job_ends_as_its_stage_does(tmp_path: Path, code: int) -> None:
    found, calls = run(array_script("r.toml", ["collection.path='a b'"], jobs=8, **NOTHING), tmp_path, [code])

    assert found == code
    stage = [".venv/bin/python", "pipeline/teacher_scores.py", "r.toml"]
    assert calls == [[*stage, "--set", "collection.path='a b'", "--set", "run.threads=4", "--shard", "3/8"]]


def test_what_was_killed_is_started_again(tmp_path: Path) -> None:
    found, calls = run(array_script("r.toml", [], jobs=8, **NOTHING), tmp_path, [137, 139, 3])

    assert (found, len(calls)) == (3, 3)


def test_the_command_prints_it(sample_folder: Path) -> None:
    recipe = sample_folder.parents[1] / "pipeline" / "recipes" / "quickstart.toml"

    done = CliRunner().invoke(app, ["slurm", str(recipe), "--jobs", "2", "--set", "labels.num_negatives=3"])

    expected = array_script(str(recipe), ["labels.num_negatives=3"], jobs=2, **NOTHING)
    assert (done.exit_code, done.output) == (0, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "labels.num_negatives=0"], "[labels] num_negatives = 0"),
        (["--partition", "a\n#SBATCH --uid=0"], "--partition 'a\\n#SBATCH --uid=0': expected letters"),
        (["--time", "1 day"], "--time '1 day': expected letters"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(sample_folder: Path, arguments: list[str], message: str) -> None:
    recipe = sample_folder.parents[1] / "pipeline" / "recipes" / "quickstart.toml"

    done = CliRunner().invoke(app, ["slurm", str(recipe), "--jobs", "2", *arguments])

    assert done.exit_code == 2
    assert message in done.output
