"""Imported scores as a teacher, beside all that a recipe may ask of one: gate, doctor, filter, selection, calibration, gaps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sparsekd.bank.sharing import CLAIMS
from sparsekd.cli import app
from sparsekd.experiment import Experiment, candidates, score_table
from sparsekd.labels.rows import filter_pairs

Make = Callable[..., Experiment]
LEXICAL = {"name": "lexical", "kind": "bm25"}
IMPORTED = {"name": "them", "kind": "file", "imported": "ensemble"}


def run_of(make_experiment: Make, device: str) -> dict[str, Any]:
    """A [run] section over the same cache, with a device that this machine may not have."""
    return {"cache": make_experiment({}).recipe.run.cache, "threads": 1, "device": device}


def files(experiment: Experiment) -> set[str]:
    """What the bank holds, by kind."""
    return {path.name for path in (experiment.plan.cache / "bank").glob("*")} - {CLAIMS}


@pytest.fixture
def dense(tiny_encoder_folder: Path) -> dict[str, Any]:
    """A teacher with a model."""
    return {"name": "dense", "kind": "dense", "model": str(tiny_encoder_folder)}


def import_run(experiment: Experiment, keep: slice, sign: float = 1.0) -> None:
    """Import scores of the candidates' pairs under the name ``ensemble``, by the command line: the place of each pair, signed."""
    pairs = list(zip(*filter_pairs(candidates(experiment)), strict=True))
    run = experiment.plan.cache.parent / "ensemble.run"
    lines = [f"{query} Q0 {passage} 1 {sign * place} them\n" for place, (query, passage) in enumerate(pairs)]
    run.write_text("".join(lines[keep]), encoding="utf-8")
    places = ["--collection", experiment.recipe.collection.path, "--cache", str(experiment.plan.cache)]
    done = CliRunner().invoke(app, ["import", "trec-run", str(run), "--name", "ensemble", *places])
    assert done.exit_code == 0, done.stderr


def test_imported_scores_label_and_no_model_is_asked(make_experiment: Make) -> None:
    experiment = make_experiment({}, teachers=[IMPORTED], run=run_of(make_experiment, "cuda:99"))
    import_run(experiment, slice(None))

    table = score_table(experiment)

    place_of = {pair: place for place, pair in enumerate(zip(*filter_pairs(candidates(experiment)), strict=True))}
    assert [table.counts[name] for name in ("pairs", "pairs_scored", "pairs_reused")] == [len(place_of), 0, len(place_of)]
    for query_id, passage_ids, gold_sim in table.rows():
        assert gold_sim == [place_of[query_id, passage_id] for passage_id in passage_ids]
    assert files(experiment) == {"scores"}


def test_imported_scores_that_lack_a_pair_stop_the_run_before_a_model_is_asked(
    make_experiment: Make, dense: dict[str, Any]
) -> None:
    experiment = make_experiment({}, teachers=[dense, IMPORTED])
    import_run(experiment, slice(2, None))
    query_ids, passage_ids = filter_pairs(candidates(experiment))

    with pytest.raises(ValueError, match="have no score among those imported as --name ensemble") as caught:
        score_table(experiment)

    first = "; ".join(f"query {query_ids[row]!r}, passage {passage_ids[row]!r}" for row in (0, 1))
    assert str(caught.value).startswith(f"teacher 'them': 2 of {len(query_ids)} pairs have no score among those imported")
    assert f"first: {first})" in str(caught.value)
    assert files(experiment) == {"scores"}
    assert not (experiment.plan.cache / "tables").exists()


def test_imported_scores_and_a_model_label_together(make_experiment: Make, dense: dict[str, Any]) -> None:
    weights = {"weights": {"dense": 0.0, "them": 1.0}}
    experiment = make_experiment(weights, teachers=[dense, IMPORTED])
    import_run(experiment, slice(None), sign=-1.0)

    table = score_table(experiment)

    num_pairs = len(filter_pairs(candidates(experiment))[0])
    assert (table.counts["pairs_scored"], table.counts["pairs_reused"]) == (num_pairs, num_pairs)
    assert table.labels().max() <= 0


# Gate and doctor


def test_the_gate_asks_models_alone(
    make_experiment: Make, dense: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.gate.LONG_RUN_PAIRS", 1)
    monkeypatch.setattr("sparsekd.gate.GateFigures.is_passed", False)
    experiment = make_experiment({}, teachers=[LEXICAL, IMPORTED])
    import_run(experiment, slice(None))
    caplog.set_level(logging.INFO)

    table = score_table(experiment)

    assert "teacher gate" not in caplog.text
    assert "gate" not in table.artifact.manifest
    with pytest.raises(ValueError, match=r"\[\[teachers\]\] 'dense' ranks worse than BM25"):
        score_table(make_experiment({}, teachers=[LEXICAL, IMPORTED, dense]))


def test_imported_scores_that_lack_a_pair_are_refused_before_the_gate(
    make_experiment: Make, dense: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.gate.LONG_RUN_PAIRS", 1)
    experiment = make_experiment({}, teachers=[dense, IMPORTED])
    import_run(experiment, slice(1, None))

    with pytest.raises(ValueError, match="teacher 'them': 1 of "):
        score_table(experiment)

    assert files(experiment) == {"scores"}


def facts_of(experiment: Experiment) -> dict[str, Any]:
    """The newest page of the doctor."""
    pages = (experiment.plan.cache / "doctor").glob("*/facts.json")
    return dict(json.loads(max(pages, key=lambda path: path.stat().st_mtime_ns).read_text(encoding="utf-8")))


def test_the_doctor_examines_imported_scores_beside_those_of_bm25(make_experiment: Make) -> None:
    experiment = make_experiment({"weights": {"lexical": 0.0, "them": 1.0}}, teachers=[LEXICAL, IMPORTED])
    import_run(experiment, slice(None))

    table = score_table(experiment)

    facts = facts_of(experiment)
    labels = np.array([label for _, _, row in table.rows() for label in row])
    assert facts["table"] == table.key
    assert facts["teachers"]["them"]["unscored"] == facts["teachers"]["lexical"]["unscored"] == 0
    assert facts["teachers"]["them"]["range"]["max"] == labels.max()
    [agreement] = facts["agreement"]
    assert agreement["teachers"] == ["lexical", "them"]


# Choosing rows, calibrating


def test_bm25_filters_and_selects_while_imported_scores_label(make_experiment: Make) -> None:
    mining = {"miners": [{"kind": "bm25", "quota": 5}], "filter": {"by": "lexical", "relative_margin": 0.05}}
    labels = {"selection": "stratified", "selection_teacher": "lexical", "weights": {"lexical": 0.0, "them": 1.0}}
    experiment = make_experiment(labels, teachers=[IMPORTED, LEXICAL], mining=mining)
    import_run(experiment, slice(None))

    table = score_table(experiment)

    assert table.counts["candidates_dropped_filter"] > 0
    gold_sim = experiment.banked(experiment.teacher("lexical"))
    for query_id, passage_ids, _ in table.rows():
        positive, *negatives = gold_sim("lexical", [query_id] * 3, passage_ids).tolist()
        assert negatives == sorted(negatives, reverse=True)  # best band first
        assert max(negatives) <= 0.95 * positive
    assert files(experiment) == {"scores"}


def test_a_calibration_of_its_own_acts_on_imported_scores_and_scores_no_pair(make_experiment: Make, dense: dict[str, Any]) -> None:
    weights = {"weights": {"dense": 0.0, "them": 1.0}}
    experiment = make_experiment(weights, teachers=[dense, IMPORTED])
    import_run(experiment, slice(None))
    raw = score_table(experiment)

    ranks = {**weights, "calibrations": {"them": {"kind": "rank", "scale": 2.0}, "dense": {"kind": "zscore"}}}
    table = score_table(make_experiment(ranks, teachers=[dense, IMPORTED], run=run_of(make_experiment, "cuda:99")))

    assert table.counts["pairs_scored"] == 0
    assert table.labels().tolist() == np.argsort(np.argsort(raw.labels(), axis=1), axis=1).astype(float).tolist()


# Gaps that other teachers fill


def labels_by_pair(experiment: Experiment) -> dict[tuple[str, str], float]:
    rows = score_table(experiment).rows()
    return {(query_id, each): label for query_id, passages, labels in rows for each, label in zip(passages, labels, strict=True)}


def test_pairs_that_an_import_lacks_are_left_to_the_other_teachers(
    make_experiment: Make, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = make_experiment({"missing": "renormalize"}, teachers=[LEXICAL, IMPORTED])
    import_run(experiment, slice(2, None))
    caplog.set_level(logging.INFO)

    labels = labels_by_pair(experiment)

    pairs = list(zip(*filter_pairs(candidates(experiment)), strict=True))
    lexical = experiment.banked(experiment.teacher("lexical"))("lexical", *map(list, zip(*pairs, strict=True)))
    for place, (pair, score) in enumerate(zip(pairs, lexical.tolist(), strict=True)):
        if pair in labels:
            assert labels[pair] == pytest.approx(score if place < 2 else (score + place) / 2)
    table = score_table(experiment)
    assert f"teacher them: 2 of {len(pairs)} pairs not imported; other teachers take their weight" in caplog.text
    assert (table.counts["pairs"], table.counts["pairs_missing"]) == (2 * len(pairs) - 2, 2)
    assert table.artifact.manifest["summary"]["unscored"]["them"] == facts_of(experiment)["teachers"]["them"]["unscored"] > 0


def test_importing_what_was_missing_makes_another_table(make_experiment: Make) -> None:
    def make() -> Experiment:
        return make_experiment({"missing": "renormalize"}, teachers=[LEXICAL, IMPORTED])

    import_run(make(), slice(2, None))
    before = score_table(make())
    again = make().plan.table_fields
    import_run(make(), slice(0, 2))
    after = score_table(make())

    assert before.artifact.manifest["fields"] == again
    assert after.key != before.key
    assert "pairs_missing" not in after.counts
    assert "imported" not in make_experiment({}, teachers=[LEXICAL, IMPORTED]).plan.table_fields


@pytest.mark.parametrize(
    ("labels", "sections", "keep"),
    [
        ({"selection": "stratified", "selection_teacher": "them"}, {}, slice(2, None)),
        ({}, {"mining": {"miners": [{"kind": "bm25", "quota": 3}], "filter": {"by": "them", "percentile": 50}}}, slice(2, None)),
        ({"weights": {"lexical": 0.0, "them": 1.0}}, {}, slice(2, None)),
        ({}, {"teachers": [LEXICAL, {**IMPORTED, "imported": "nobody"}]}, slice(2, None)),
    ],
    ids=["selects", "filters", "labels alone", "has none of them"],
)
def test_gaps_are_refused_where_no_other_teacher_can_fill_them(
    make_experiment: Make, labels: dict[str, Any], sections: dict[str, Any], keep: slice
) -> None:
    experiment = make_experiment({"missing": "renormalize", **labels}, **{"teachers": [LEXICAL, IMPORTED], **sections})
    import_run(experiment, keep)

    with pytest.raises(ValueError, match=r"teacher 'them': [\d,]+ of [\d,]+ pairs have no score among those imported"):
        score_table(experiment)
