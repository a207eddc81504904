"""Rounds: the student of one mines in the next, joins the miners, and only what it brings anew is scored. Real tiny models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.evaluation.evaluate import evaluate
from sparsekd.experiment import Experiment, candidates, score_table, student
from sparsekd.labels.rows import filter_pairs
from sparsekd.mining.candidates import Candidates

BM25 = {"kind": "bm25", "quota": 3}
TRAINING = {"loss": "SparseMarginMSELoss", "max_steps": 2, "batch_size": 4}

MakeRounds = Callable[..., Experiment]


@pytest.fixture
def make_rounds(make_experiment: Callable[..., Experiment], tiny_encoder_folder: Path) -> MakeRounds:
    """Return ``make(rounds, ...)``: BM25 mines, a dense teacher labels, two steps train; all of one test in one cache."""

    def make(rounds: int = 2, *, mining: dict[str, Any] | None = None, **sections: Any) -> Experiment:
        again = {"rounds": rounds, "student_miner": {"quota": 2}} if rounds > 1 else {}
        document = {
            "mining": {"miners": [BM25], **again, **(mining or {})},
            "teachers": [{"name": "dense", "kind": "dense", "model": str(tiny_encoder_folder)}],
            "training": TRAINING,
        }
        return make_experiment({}, **{**document, **sections})

    return make


def pairs_of(experiment: Experiment) -> set[tuple[str, str]]:
    """Every (query, positive or candidate) of mined candidates."""
    return set(zip(*filter_pairs(candidates(experiment)), strict=True))


def test_round_2_keeps_all_candidates_of_round_1_and_scores_only_new_pairs(make_rounds: MakeRounds) -> None:
    first, second = make_rounds(1), make_rounds(2)
    assert score_table(first).counts["pairs_scored"] == len(pairs_of(first))

    table = score_table(second)

    before, after = pairs_of(first), pairs_of(second)
    assert before < after
    assert table.counts["pairs"] == len(after)
    assert table.counts["pairs_scored"] == len(after - before)
    assert table.counts["pairs_reused"] == len(before)


def test_the_student_of_round_1_mines_as_a_sparse_miner_named_by_its_folder_does(make_rounds: MakeRounds) -> None:
    prompts = {"query_prompt": "what is ", "passage_prompt": "the "}
    experiment = make_rounds(2)
    section = {**experiment.recipe.student.model_dump(include={"model", "max_length"}), **prompts}
    trained = student(make_rounds(1, student=section))
    by_hand = {"kind": "sparse", "model": str(trained.folder), "quota": 2, **prompts}

    in_rounds = candidates(make_rounds(2, student=section))
    explicit = candidates(make_rounds(1, student=section, mining={"miners": [BM25, by_hand]}))

    assert list(in_rounds) == list(explicit)
    assert {name for row in in_rounds for name in row.miner} == {"bm25", "sparse"}


def test_a_recipe_of_two_rounds_finds_what_a_recipe_of_one_has_made(
    make_rounds: MakeRounds, caplog: pytest.LogCaptureFixture
) -> None:
    trained = student(make_rounds(1))
    students = trained.folder.parent
    before = trained.folder.stat().st_mtime_ns
    caplog.set_level(logging.INFO)

    final = student(make_rounds(2))

    assert f"student {trained.key}: hit" in caplog.text
    assert trained.folder.stat().st_mtime_ns == before
    assert {path.name for path in students.iterdir() if not path.name.startswith(".")} == {trained.key, final.key}


def test_once_the_candidates_of_round_2_are_there_the_student_of_round_1_is_not_asked_for(make_rounds: MakeRounds) -> None:
    mined = candidates(make_rounds(2))
    folder = make_rounds(1).plan.folder("students", make_rounds(1).plan.student_fields)
    folder.rename(folder.with_name("elsewhere"))

    table = score_table(make_rounds(2))

    assert table.artifact.manifest["fields"]["candidates"] == mined.key
    assert not folder.exists()


def test_the_evaluation_shows_the_student_of_round_1_with_its_own_figures(make_rounds: MakeRounds) -> None:
    alone = json.loads((evaluate(make_rounds(1)).folder / "metrics.json").read_text(encoding="utf-8"))["systems"]

    folder = evaluate(make_rounds(2)).folder

    systems = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["systems"]
    assert set(systems) == {"bm25", "teacher:dense", "student:untrained", "student:round-1", "student"}
    assert systems["student:round-1"] == alone["student"]
    assert systems["student"] != alone["student"]
    assert (folder / "student-round-1.trec").is_file()


def test_the_students_of_two_rounds_start_from_the_same_weights(make_rounds: MakeRounds) -> None:
    first, second = student(make_rounds(1)).manifest["fields"], student(make_rounds(2)).manifest["fields"]

    assert first["student"] == second["student"]
    assert {name for name in first if first[name] != second[name]} == {"table"}


@pytest.mark.parametrize("section", [{"kind": "csr", "k": 8, "k_aux": 16}, {"expansion": "passage"}], ids=["csr", "inference-free"])
def test_every_kind_of_student_mines(make_rounds: MakeRounds, tiny_encoder_folder: Path, section: dict[str, Any]) -> None:
    experiment = make_rounds(2, student={"model": str(tiny_encoder_folder), "max_length": 32, **section})

    mined: Candidates = candidates(experiment)

    assert any("sparse" in row.miner for row in mined)
