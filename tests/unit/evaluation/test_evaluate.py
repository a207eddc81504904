"""Which systems an evaluation measures, and what it makes for it."""

from __future__ import annotations

import json
from pathlib import Path

from sparsekd.evaluation.evaluate import METRICS, evaluate
from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.recipe import recipe_of


def test_teachers_are_measured_before_there_is_a_student(tmp_path: Path, sample_folder: Path, tiny_encoder_folder: Path) -> None:
    document = {
        "collection": {"path": str(sample_folder)},
        "mining": {"miners": [{"kind": "bm25", "quota": 4}]},
        "teachers": [{"name": "judge", "kind": "dense", "model": str(tiny_encoder_folder)}],
        "student": {"model": str(tiny_encoder_folder)},
        "evaluation": {"students": False},
        "run": {"cache": str(tmp_path), "threads": 1},
    }

    evaluation = evaluate(Experiment(Plan(recipe_of(document, "recipe"))))

    figures = json.loads((evaluation.folder / METRICS).read_text(encoding="utf-8"))["systems"]
    assert list(figures) == ["bm25", "teacher:judge"]
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "runs", "evaluations"}
