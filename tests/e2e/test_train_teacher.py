"""Stage 0 by the real script: from judgements to a cross-encoder that teaches by its name; kills; bad input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
Content = Callable[[Path, str], dict[str, bytes]]
SECTION = """
[train_teacher]
name = "own"
model = "{encoder}"
max_length = 64
num_negatives = 2
batch_size = 4
max_steps = 12
learning_rate = 1e-3
dev_steps = 2
patience = 9
"""
BY_NAME = 'teachers.tiny.model="trained:own"'


@pytest.fixture
def workplace(make_workplace: Callable[..., Any], tiny_encoder_folder: Path) -> Any:
    """A recipe whose teacher can be its own cross-encoder."""
    made = make_workplace("cross-encoder")
    path = made.folder / "recipe.toml"
    path.write_text(path.read_text(encoding="utf-8") + SECTION.format(encoder=tiny_encoder_folder), encoding="utf-8")
    return made


# Carries a stage out for each case of argv[1], {name: [script, arguments]}, and prints exit code, stdout and stderr by name.
PROGRAM = """
import contextlib, io, json, runpy, sys
from sparsekd.stage import run_stage
said = {}
for name, (script, arguments) in json.loads(sys.argv[1]).items():
    make = runpy.run_path(script)["make"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        code = run_stage("", make, [], arguments)
    said[name] = [code, out.getvalue(), log.getvalue()]
print(json.dumps(said))
"""


def refusals(workplace: Any, cases: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the one message by name of stages, each (script, override), that all exit with 2; in one process, for the imports."""
    recipe = str(workplace.folder / "recipe.toml")
    told = {
        name: [str(ROOT / "pipeline" / f"{script}.py"), [recipe, "--set", override]] for name, (script, override) in cases.items()
    }
    process = workplace.fork(PROGRAM, json.dumps(told))
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    messages = {}
    for name, (code, out, log) in json.loads(stdout).items():
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        assert (code, out, len(errors)) == (2, "", 1), (name, log)
        messages[name] = errors[0]
    return messages


def test_a_trained_teacher_teaches_by_name_and_is_evaluated_as_a_reranker(workplace: Any) -> None:
    teacher = workplace.run("train_teacher", BY_NAME)
    again = workplace.run("train_teacher", BY_NAME)
    evaluation = workplace.run("evaluate", BY_NAME, "training.max_steps=2")

    assert teacher.folder == again.folder
    assert "hit" in again.log
    figures = json.loads((evaluation.folder / "metrics.json").read_text(encoding="utf-8"))["systems"]
    assert {"bm25", "teacher:tiny", "student"} <= {*figures}


def test_training_killed_at_random_moments_ends_with_the_same_weights(workplace: Any, content_of: Content) -> None:
    uninterrupted = workplace.run("train_teacher")
    expected = content_of(uninterrupted.folder, "*.safetensors")
    shutil.rmtree(workplace.cache / "teachers")
    generator = random.Random(3)
    for moment in (4, 8):
        process = workplace.start("train_teacher")
        while process.poll() is None and newest_step(workplace.cache) < moment:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()

    finished = workplace.run("train_teacher")

    assert finished.folder == uninterrupted.folder
    assert finished.manifest["counts"]["resumed_from_step"] > 0
    assert content_of(finished.folder, "*.safetensors") == expected


def newest_step(cache: Path) -> int:
    """Step of the newest checkpoint that has begun to be written."""
    return max((int(path.name.rpartition("-")[2]) for path in cache.glob("teachers/*.work/checkpoint-*")), default=0)


def test_what_cannot_be_trained_on_exits_with_2_and_one_message(
    workplace: Any, sample_folder: Path, save_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for split in ("train", "dev"):
        (shutil.copytree(sample_folder, tmp_path / split) / "qrels" / f"{split}.tsv").unlink()
    two_labels = save_tiny_model("BertForSequenceClassification", tmp_path / "two", num_labels=2)
    override_by_message = {
        "qrels/train.tsv: no such file": f"collection.path={tmp_path / 'train'}",
        "qrels/dev.tsv: no such file": f"collection.path={tmp_path / 'dev'}",
        "no dev query has judgements": "collection.max_passages=12",
        "have other shapes than with one label": f"train_teacher.model={two_labels}",
        "has 128 positions; lower it": "train_teacher.max_length=129",
        "num_negatives = 7, but the quotas of the miners add up to 6": "train_teacher.num_negatives=7",
    }

    cases = {message: ("train_teacher", override) for message, override in override_by_message.items()}
    cases["no cross-encoder was trained under that name"] = ("teacher_scores", BY_NAME)
    said = refusals(workplace, cases)

    assert [message for message in cases if message not in said[message]] == []
    assert not list(workplace.cache.glob("teachers/*/manifest.json"))
