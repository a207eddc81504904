"""An experiment over the sample collection with real tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe

Make = Callable[..., Experiment]


@pytest.fixture
def make_experiment(
    tmp_path: Path, sample_folder: Path, tiny_splade_folder: Path, tiny_encoder_folder: Path, tiny_masked_lm_folder: Path
) -> Make:
    """Return ``make(labels, loss, ...)`` over the sample collection, a sparse teacher and a dense one."""

    def make(labels: dict[str, Any], loss: str = "SparseMarginMSELoss", **sections: Any) -> Experiment:
        document: dict[str, Any] = {
            "collection": {"path": str(sample_folder)},
            "mining": {"miners": [{"kind": "bm25", "quota": 3}]},
            "teachers": [
                {"name": "splade", "kind": "sparse", "model": str(tiny_splade_folder)},
                {"name": "dense", "kind": "dense", "model": str(tiny_encoder_folder)},
            ],
            "labels": {"num_negatives": 2, **labels},
            "student": {"model": str(tiny_masked_lm_folder), "max_length": 32},
            "training": {"loss": loss},
            "run": {"cache": str(tmp_path / "cache"), "threads": 1},
        }
        return Experiment(Plan(Recipe.model_validate({**document, **sections})))

    return make
