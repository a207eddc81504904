"""A published table of BM25's scores over the sample collection, and the command line. Loads no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from sparsekd.bank.scores import ScoreBank
from sparsekd.bank.text_key import text_keys
from sparsekd.cli import app
from sparsekd.collection.beir import read_texts
from sparsekd.experiment import Experiment, score_table
from sparsekd.labels.score_table import ScoreTable
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe
from sparsekd.teachers.identity import file_identity

Rows = list[tuple[str, list[str], list[float]]]


@pytest.fixture(scope="session")
def make_table(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Callable[..., ScoreTable]:
    """Return ``make(loss, teachers, **labels)``: the table of those labels, one positive and 2 negatives a row."""
    cache = tmp_path_factory.mktemp("tables")

    def make(loss: str = "SparseMarginMSELoss", teachers: Sequence[dict[str, Any]] = (), **labels: Any) -> ScoreTable:
        document = {
            "collection": {"path": str(sample_folder)},
            "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
            "teachers": [{"name": "lexical", "kind": "bm25"}, *teachers],
            "labels": {"num_negatives": 2, **labels},
            "student": {"model": "some/student"},
            "training": {"loss": loss},
            "run": {"cache": str(cache)},
        }
        return score_table(Experiment(Plan(Recipe.model_validate(document))))

    return make


@pytest.fixture(scope="session")
def table(make_table: Callable[..., ScoreTable]) -> ScoreTable:
    """Score lists; q06 has two positives, which share negatives."""
    return make_table()


@pytest.fixture
def run() -> Callable[..., Result]:
    """Return ``run(*arguments)``: the command line's result."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def banked(sample_folder: Path) -> Callable[..., Any]:
    """Return ``banked(cache, query_ids, passage_ids, name="them", **fields)``: gold_sim of pairs imported under an identity."""
    queries, passages = read_texts(sample_folder)

    def look_up(cache: Path, query_ids: list[str], passage_ids: list[str], name: str = "them", **fields: str) -> Any:
        scores = ScoreBank(cache / "bank").open(file_identity(name, fields))
        keys = (text_keys(texts[each] for each in ids) for texts, ids in ((queries, query_ids), (passages, passage_ids)))
        return scores.lookup(*keys)

    return look_up


def pairs_of(table: ScoreTable) -> dict[tuple[str, str], float]:
    """Label by (query_id, passage_id)."""
    return {
        (query_id, passage_id): label
        for query_id, passage_ids, labels in table.rows()
        for passage_id, label in zip(passage_ids, labels, strict=True)
    }


@pytest.fixture(scope="session")
def pairs(table: ScoreTable) -> dict[tuple[str, str], float]:
    """The table's scores by pair."""
    found = pairs_of(table)
    assert len({np.float32(score) for score in found.values()}) > 20
    return found


@pytest.fixture
def export(run: Callable[..., Result], table: ScoreTable, tmp_path: Path) -> Callable[[str], Path]:
    """Return ``export(layout)``: the folder made."""

    def make(layout: str) -> Path:
        result = run("export", "table", layout, table.artifact.folder, tmp_path / layout)
        assert result.exit_code == 0, result.stderr
        return tmp_path / layout

    return make


@pytest.fixture
def expected(table: ScoreTable, sample_folder: Path) -> Rows:
    """The table's rows as texts."""
    queries, passages = read_texts(sample_folder)
    return [(queries[query_id], [passages[each] for each in ids], scores) for query_id, ids, scores in table.rows()]
