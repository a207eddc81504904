"""F16 a recipe's settings, F20 scores and vectors that are no numbers, as the bank's writers and a table's reader see them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse

from sparsekd.artifact import IntegrityError, key_of, publish
from sparsekd.bank import EmbeddingBank, ScoreBank, text_keys
from sparsekd.labels.contract import Contract, table_schema
from sparsekd.labels.score_table import KIND, ScoreTable
from sparsekd.mining.shards import write_shards
from sparsekd.plan import Plan
from sparsekd.recipe import load_recipe

pytestmark = pytest.mark.slow

Count = Callable[[int], None]
BAD = [np.nan, np.inf, -np.inf]
RECIPE = """
[collection]
path = "collection"
[[mining.miners]]
kind = "bm25"
quota = 4
[[teachers]]
name = "judge"
kind = "cross-encoder"
model = "judge"
[student]
model = "encoder"
"""
KINDS = ["candidates", "tables", "students", "evaluations"]
CHANGES: dict[str, str] = {
    "mining.miners.bm25.quota=5": "candidates",
    "mining.miners.bm25.depth=90": "candidates",
    "mining.miners.bm25.skip=1": "candidates",
    "mining.miners.bm25.k1=1.2": "candidates",
    "mining.filter.absolute_margin=0.1": "candidates",
    "mining.max_positives=1": "candidates",
    "collection.max_passages=20": "candidates",
    "collection.max_train_queries=5": "candidates",
    "teachers.judge.max_length=64": "tables",
    "teachers.judge.query_prompt='q: '": "tables",
    "teachers.judge.dtype=bfloat16": "tables",
    "labels.num_negatives=3": "tables",
    "labels.calibration.kind=zscore": "tables",
    "labels.selection=random": "tables",
    "student.max_length=64": "students",
    "student.lambda_query=0.3": "students",
    "student.query_prompt='q: '": "students",
    "training.seed=1": "students",
    "training.batch_size=8": "students",
    "training.learning_rate=1e-3": "students",
    "training.temperature=1.0": "students",
    "evaluation.split=dev": "evaluations",
    "evaluation.rerank_depth=50": "evaluations",
    "evaluation.k1=1.2": "evaluations",
    "run.cache=elsewhere": "",
    "run.threads=2": "",
    "run.device=cuda": "",
    "run.search_device=cpu": "",
    "run.batch_tokens=64": "",
    "run.shard_pairs=10": "",
    "run.shard=1/2": "",
    "run.save_steps=5": "",
    "run.packed=false": "",
    "teachers.judge.gate=false": "",
    "labels.seed=1": "",
}
"""The first artifact that a change makes anew, with all that follow; none where it decides no byte."""


@pytest.fixture
def place(
    tmp_path: Path,
    sample_folder: Path,
    tiny_encoder_folder: Path,
    tiny_cross_encoder_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working directory: a recipe, its collection, its models."""
    shutil.copytree(sample_folder, tmp_path / "collection")
    shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    shutil.copytree(tiny_cross_encoder_folder, tmp_path / "judge")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys(*overrides: str) -> dict[str, str]:
    plan = Plan(load_recipe(Path("recipe.toml"), list(overrides)))
    return {kind: key_of(fields) for kind, fields in plan.artifacts(KINDS)}


@pytest.mark.fault("F16")
@pytest.mark.parametrize("stage", ["candidates", "tables", "students", "evaluations", ""], ids=lambda stage: stage or "none")
def test_a_setting_changes_the_keys_of_what_it_decides_and_of_what_follows(stage: str, place: Path, count: Count) -> None:
    before = keys()
    expected = set(KINDS[KINDS.index(stage) :]) if stage else set()
    changes = [change for change, first in CHANGES.items() if first == stage]
    for change in changes:
        after = keys(change)
        assert {kind for kind in KINDS if before[kind] != after[kind]} == expected, change
    count(len(changes))


@pytest.mark.fault("F20", "score")
def test_a_score_that_is_no_number_is_refused_and_nothing_of_its_append_is_stored(tmp_path: Path, count: Count) -> None:
    scores = ScoreBank(tmp_path / "bank").open({"a": 1})
    queries, passages = text_keys(["q"] * 3), text_keys(["x", "y", "z"])
    for bad in BAD:
        with pytest.raises(ValueError, match=r"1 of 3 scores are NaN or infinite.*nothing was stored \(first: row 1: "):
            scores.append(queries, passages, np.array([1, bad, 3], dtype=np.float32))
        assert np.isnan(scores.lookup(queries, passages)).all()
    count(len(BAD))


@pytest.mark.fault("F20", "embed")
def test_a_vector_that_is_no_number_is_refused_and_nothing_of_its_append_is_stored(tmp_path: Path, count: Count) -> None:
    bank = EmbeddingBank(tmp_path / "bank")
    keys_3, dense, sparse = text_keys(["x", "y", "z"]), bank.open({"a": 1}), bank.sparse.open({"a": 1})
    for bad in BAD:
        vectors = np.array([[1, 2], [3, bad], [5, 6]], dtype=np.float32)
        with pytest.raises(ValueError, match=r"1 of 3 vectors are NaN or infinite.*first rows: 1\)"):
            dense.append(keys_3, vectors)
        with pytest.raises(ValueError, match=r"1 of 3 .*NaN or infinite"):
            sparse.append(keys_3, scipy.sparse.csr_matrix(vectors))
        assert not dense.known(keys_3).any()
        assert not sparse.known(keys_3).any()
    count(2 * len(BAD))


@pytest.mark.fault("F20", "table")
def test_a_label_that_is_no_number_is_refused_though_its_checksum_is_right(tmp_path: Path, count: Count) -> None:
    schema = table_schema("score_list", Contract(2, ({"identity": "a", "weight": 1.0},), {"kind": "raw"}))
    for bad in BAD:
        row = {"query_id": "q", "passage_ids": ["x", "y"], "gold_sim": [1.0, bad]}
        extra: dict[str, Any] = {"counts": {}, "summary": {}}
        with publish(tmp_path / f"{bad}", kind=KIND, fields={"a": 1}, extra=extra) as folder:
            extra["shards"] = write_shards(folder, KIND, [pa.Table.from_pylist([row], schema=schema)], 1)
        with pytest.raises(IntegrityError, match="1 labels of gold_sim are not finite"):
            ScoreTable.open(tmp_path / f"{bad}")
    count(len(BAD))
