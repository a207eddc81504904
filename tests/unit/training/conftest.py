"""Score tables over the sample collection, labelled by word overlap, and students small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection, read_collection
from sparsekd.labels.building import build_table
from sparsekd.labels.rows import Rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe


@pytest.fixture(scope="session")
def collection(sample_folder: Path) -> Collection:
    return read_collection(sample_folder)


@pytest.fixture(scope="session")
def make_recipe(tiny_headless_folder: Path) -> Callable[..., Recipe]:
    """Return ``make(labels, student, run, **training)``: 3 passages a row, a tiny student without dropout, 4 rows a step."""

    def make(
        labels: dict[str, Any] | None = None,
        student: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        **training: Any,
    ) -> Recipe:
        return Recipe.model_validate(
            {
                "collection": {"path": "sample"},
                "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
                "teachers": [{"name": "overlap", "kind": "cross-encoder", "model": "somewhere"}],
                "labels": {"num_negatives": 2, **(labels or {})},
                "student": {"model": str(tiny_headless_folder), "max_length": 32, "dropout": 0.0, **(student or {})},
                "training": {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "warmup_ratio": 0.0, **training},
                "run": run or {},
            }
        )

    return make


@pytest.fixture
def make_table(tmp_path: Path, make_table_in: Callable[..., ScoreTable]) -> Callable[..., ScoreTable]:
    """Return ``make(recipe)``: ``make_table_in`` the test's own cache."""
    return lambda recipe: make_table_in(tmp_path / "cache", recipe)


@pytest.fixture(scope="session")
def make_table_in(collection: Collection) -> Callable[..., ScoreTable]:
    """Return ``make(cache, recipe)``: a published table with a row per training query; negatives are the passages that follow."""

    def overlap(teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        words = [{*collection.queries[query_id].split()} for query_id in query_ids]
        passages = [{*collection.passages[passage_id].lower().split()} for passage_id in passage_ids]
        return np.array([len(left & right) for left, right in zip(words, passages, strict=True)], dtype=np.float32)

    def make(cache: Path, recipe: Recipe) -> ScoreTable:
        order, query_ids, passage_ids = list(collection.passages), [], []
        for query_id, grades in collection.qrels["train"].items():
            first = next(order.index(passage_id) for passage_id, grade in grades.items() if grade >= 1)
            query_ids.append(query_id)
            passage_ids.append([order[(first + step * 5) % len(order)] for step in range(recipe.labels.num_negatives + 1)])
        fields = {
            "stage": "score-table",
            "kind": recipe.labels.kind,
            "num_negatives": recipe.labels.num_negatives,
            "calibration": {"kind": "raw"},
            "teachers": [{"identity": {"kind": "overlap"}, "weight": 1.0}],
        }
        return build_table(recipe, Rows(query_ids, passage_ids, {}, 0), cache=cache, fields=fields, gold_sim=overlap)

    return make
