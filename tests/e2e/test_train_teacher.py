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


def refused(workplace: Any, script: str, *overrides: str) -> str:
    """Return the one line that a stage which exits with 2 says."""
    process = workplace.start(script, *overrides)
    stdout, log = process.communicate(timeout=240)
    assert (process.returncode, stdout) == (2, "")
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, log
    return str(errors[0])


def test_a_trained_teacher_teaches_by_name_and_is_evaluated_as_a_reranker(workplace: Any) -> None:
    assert "no cross-encoder was trained under that name" in refused(workplace, "teacher_scores", BY_NAME)

    teacher = workplace.run("train_teacher", BY_NAME)
    again = workplace.run("train_teacher", BY_NAME)
    evaluation = workplace.run("evaluate", BY_NAME, "training.max_steps=2")

    assert teacher.folder == again.folder
    assert "hit" in again.log
    figures = json.loads((evaluation.folder / "metrics.json").read_text(encoding="utf-8"))["systems"]
    assert {"bm25", "teacher:tiny", "student"} <= {*figures}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_training_ended_at_random_moments_ends_with_the_same_weights(
    workplace: Any, content_of: Content, number: signal.Signals
) -> None:
    uninterrupted = workplace.run("train_teacher")
    expected = content_of(uninterrupted.folder, "*.safetensors")
    shutil.rmtree(workplace.cache / "teachers")
    generator = random.Random(int(number))
    for moment in (4, 8):
        process = workplace.start("train_teacher")
        while process.poll() is None and newest_step(workplace.cache) < moment:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(number)
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

    messages = {
        "qrels/train.tsv: no such file": f"collection.path={tmp_path / 'train'}",
        "qrels/dev.tsv: no such file": f"collection.path={tmp_path / 'dev'}",
        "no dev query has judgements": "collection.max_passages=12",
        "have other shapes than with one label": f"train_teacher.model={two_labels}",
        "has 128 positions; lower it": "train_teacher.max_length=129",
        "num_negatives = 7, but the quotas of the miners add up to 6": "train_teacher.num_negatives=7",
    }

    assert [message for message, override in messages.items() if message not in refused(workplace, "train_teacher", override)] == []
    assert not list(workplace.cache.glob("teachers/*/manifest.json"))
