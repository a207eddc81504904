"""A recipe over the sample collection that trains a tiny cross-encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe, TrainTeacher

MakeOwn = Callable[..., Experiment]


@pytest.fixture
def make_section(tiny_headless_folder: Path) -> Callable[..., TrainTeacher]:
    """Return ``make(**settings)``: the section over a tiny body without a head."""

    def make(**settings: Any) -> TrainTeacher:
        return TrainTeacher(**{"name": "own", "model": str(tiny_headless_folder), "max_length": 48, **settings})

    return make


@pytest.fixture
def make_own(tmp_path: Path, sample_folder: Path, tiny_headless_folder: Path, tiny_masked_lm_folder: Path) -> MakeOwn:
    """Return ``make(collection, **settings)``: an experiment whose teacher is its own cross-encoder."""

    def make(collection: dict[str, Any] | None = None, **settings: Any) -> Experiment:
        section = {"name": "own", "model": str(tiny_headless_folder), "max_length": 48, "num_negatives": 2, "batch_size": 4}
        section |= {"learning_rate": 1e-3, "max_steps": 4, "dev_steps": 2, "dev_depth": 10, **settings}
        document: dict[str, Any] = {
            "collection": {"path": str(sample_folder), **(collection or {})},
            "mining": {"miners": [{"kind": "bm25", "quota": 3}]},
            "train_teacher": section,
            "teachers": [{"name": "own", "kind": "cross-encoder", "model": "trained:own"}],
            "labels": {"num_negatives": 2},
            "student": {"model": str(tiny_masked_lm_folder), "max_length": 32},
            "run": {"cache": str(tmp_path / "cache"), "threads": 1},
        }
        return Experiment(Plan(Recipe.model_validate(document)))

    return make
