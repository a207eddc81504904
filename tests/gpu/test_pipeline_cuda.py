"""The three stage scripts on a CUDA device, tiny models, the sample collection; a run that diverges stops.

Mined by BM25 and taught by a cross-encoder: dense search on a GPU needs faiss-gpu, which a machine may lack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
[collection]
path = "{collection}"

[[mining.miners]]
kind = "bm25"
quota = 3

[[teachers]]
name = "tiny"
kind = "cross-encoder"
model = "{teacher}"

[labels]
num_negatives = 2

[student]
model = "{student}"
max_length = 32
initial_active_dims = 20

[training]
max_steps = 8
batch_size = 4
learning_rate = 1e-3

[run]
cache = "{cache}"
device = "{device}"
"""

Stage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory,
    sample_folder: Path,
    tiny_cross_encoder_folder: Path,
    tiny_headless_folder: Path,
    device: str,
) -> Stage:
    """Return ``stage(script, *overrides)``: run a stage script on one recipe and one cache."""
    for needed in ("bm25s", "Stemmer", "ir_measures", "pytrec_eval", "datasets", "pyarrow", "scipy", "xxhash"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("pipeline-cuda")
    recipe = folder / "recipe.toml"
    values = {
        "collection": sample_folder,
        "teacher": tiny_cross_encoder_folder,
        "student": tiny_headless_folder,
        "cache": folder / "cache",
        "device": device,
    }
    recipe.write_text(RECIPE.format(**values), encoding="utf-8")

    def run(script: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        options = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, str(ROOT / "pipeline" / script), str(recipe), *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)

    return run


def test_three_stages_run_and_the_second_run_is_a_hit(stage: Stage) -> None:
    runs = [stage(script) for script in ("teacher_scores.py", "train_student.py", "evaluate.py")]

    again = stage("evaluate.py")

    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(run.stderr[-2000:] for run in runs)
    assert again.stdout.splitlines()[-1] == runs[-1].stdout.splitlines()[-1]
    metrics = json.loads((Path(again.stdout.splitlines()[-1]) / "metrics.json").read_text(encoding="utf-8"))
    assert {"bm25", "teacher:tiny", "student:untrained", "student"} <= metrics["systems"].keys()


def test_training_that_diverges_stops_with_the_batch(stage: Stage) -> None:
    run = stage("train_student.py", "training.learning_rate=1e30")

    assert run.returncode == 1
    assert "nothing of this step was applied" in run.stderr
