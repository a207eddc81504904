"""Every kind of teacher that scores pairs, from the recipe to the score table and the reranking; and what stops a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.evaluation.evaluate import _rank
from sparsekd.evaluation.systems import bm25_rankings
from sparsekd.experiment import Experiment, score_table
from sparsekd.recipe import Run
from sparsekd.teachers.scorers import make_scorer

Make = Callable[..., Experiment]
SOURCE = """
def overlap(pairs):
    return [len(set(query.lower().split()) & set(passage.lower().split())) / len(passage) for query, passage in pairs]
def constant(pairs):
    return [0.5] * len(pairs)
def broken(pairs):
    return [float("nan")] * len(pairs)
"""
KINDS = ["late-interaction", "causal-lm", "seq2seq-lm", "callable", "cross-encoder"]


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module kinds_teacher in the working directory."""
    (tmp_path / "kinds_teacher.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "kinds_teacher", raising=False)


@pytest.fixture
def section(
    tiny_multi_vector_folder: Path,
    tiny_decoder_folder: Path,
    tiny_t5_folder: Path,
    tiny_cross_encoder_folder: Path,
    functions: None,
) -> Callable[[str], dict[str, Any]]:
    """Return ``section(kind)``: the teacher's section of a recipe."""
    by_kind: dict[str, dict[str, Any]] = {
        "late-interaction": {"model": str(tiny_multi_vector_folder)},
        "causal-lm": {"model": str(tiny_decoder_folder), "max_length": 1024},
        "seq2seq-lm": {"model": str(tiny_t5_folder)},
        "cross-encoder": {"model": str(tiny_cross_encoder_folder)},
        "callable": {"function": "kinds_teacher:overlap", "identity": {"version": "1"}},
    }
    return lambda kind: {"name": "it", "kind": kind, **by_kind[kind]}


def elsewhere(make_experiment: Make) -> dict[str, Any]:
    """The run section on a device that does not exist: then loading any model is refused."""
    return {"cache": make_experiment({}).recipe.run.cache, "threads": 1, "device": "cuda:99"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_labels_and_reranks_from_one_bank(
    make_experiment: Make, section: Callable[[str], dict[str, Any]], kind: str
) -> None:
    experiment = make_experiment({}, teachers=[section(kind)])

    table = score_table(experiment)

    assert table.counts["pairs"] == table.counts["pairs_scored"] > 0
    texts = experiment.collection
    rows = [(query_id, passage_ids, scores) for query_id, passage_ids, scores in table.rows()]
    pairs = [(texts.queries[query_id], texts.passages[each]) for query_id, passage_ids, _ in rows for each in passage_ids]
    expected = make_scorer(experiment.teacher("it"), Run(batch_tokens=16)).score(pairs)
    np.testing.assert_allclose([score for _, _, scores in rows for score in scores], expected, atol=1e-4)

    again = make_experiment({"num_negatives": 1}, teachers=[section(kind)], run=elsewhere(make_experiment))
    assert score_table(again).counts["pairs_scored"] == 0

    rankings = _rank(experiment, "teacher:it").rankings
    bm25 = bm25_rankings(experiment.recipe, texts, "test")
    assert {query_id: sorted(hits.passage_ids) for query_id, hits in rankings.items()} == {
        query_id: sorted(hits.passage_ids) for query_id, hits in bm25.items()
    }
    assert any(rankings[query_id].passage_ids != bm25[query_id].passage_ids for query_id in bm25)
    assert experiment.plan.system_fields()["teacher:it"]["rerank_depth"] == experiment.recipe.evaluation.rerank_depth


def test_a_teacher_that_gives_every_pair_one_score_is_refused_before_a_table_is_made(
    make_experiment: Make, section: Callable[[str], dict[str, Any]]
) -> None:
    constant = {**section("callable"), "function": "kinds_teacher:constant"}
    experiment = make_experiment({}, teachers=[constant])

    message = r"\[\[teachers\]\] 'it': all \d+ pairs have the score 0.5 \(callable, kinds_teacher:constant version=1\)"
    with pytest.raises(ValueError, match=message):
        score_table(experiment)

    assert not (experiment.plan.cache / "tables").exists()


def test_a_teacher_that_gives_no_number_is_refused_and_nothing_is_banked(
    make_experiment: Make, section: Callable[[str], dict[str, Any]]
) -> None:
    experiment = make_experiment({}, teachers=[{**section("callable"), "function": "kinds_teacher:broken"}])

    with pytest.raises(ValueError, match="scores are not finite"):
        score_table(experiment)

    assert experiment.scores_of(experiment.teacher("it")).num_pairs == 0
    assert not (experiment.plan.cache / "tables").exists()


def test_a_function_passes_the_gate_like_a_model(
    make_experiment: Make, section: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.gate.LONG_RUN_PAIRS", 1)
    monkeypatch.setattr("sparsekd.gate.GateFigures.is_passed", False)

    with pytest.raises(ValueError, match=r"\[\[teachers\]\] 'it' ranks worse than BM25"):
        score_table(make_experiment({}, teachers=[section("callable")]))
    assert len(score_table(make_experiment({}, teachers=[{**section("callable"), "gate": False}]))) > 0
