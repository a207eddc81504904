"""The three stages on the sample collection with tiny models: what each leaves behind, and what a second run costs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from sparsekd.cli import app
from sparsekd.experiment import Experiment, candidates
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.rows import filter_pairs
from sparsekd.labels.score_table import ScoreTable
from sparsekd.plan import Plan
from sparsekd.recipe import load_recipe

FIGURES = {"nDCG@10", "RR@10", "R@100"}
SPARSITY = {"query_active_dims", "passage_active_dims", "FLOPS"}
SECONDS_OF_A_HIT = 5.0  # of CPU: the contract; it is below 1


class Made(NamedTuple):
    workplace: Any
    table: Any
    student: Any
    evaluation: Any


def make_all(workplace: Any, run: Callable[[str], Any]) -> Made:
    """One command makes everything; the other two then tell where it is."""
    evaluation = run("evaluate")
    return Made(workplace, run("teacher_scores"), run("train_student"), evaluation)


@pytest.fixture(scope="module")
def dense(make_workplace: Callable[..., Any]) -> Made:
    """All of it by the commands that a user types, each in an interpreter of its own."""
    workplace = make_workplace("dense")
    return make_all(workplace, workplace.run_afresh)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_contract(made: Made, *, pairs_of_the_teacher: int) -> None:
    counts = made.table.manifest["counts"]
    assert counts["pairs"] == counts["pairs_scored"] == pairs_of_the_teacher
    assert counts["pairs_reused"] == 0
    assert counts["rows"] == 15
    assert set(counts["rows_dropped"]) == {"too_few_negatives", "constant_scores"}
    systems = read_json(made.evaluation.folder / "metrics.json")["systems"]
    assert set(systems) == {"bm25", "teacher:tiny", "student:untrained", "student"}
    for name, figures in systems.items():
        assert set(figures) == (FIGURES | SPARSITY if name.startswith("student") else FIGURES)
        assert all(math.isfinite(figure) for figure in figures.values())
        assert all(0 <= figures[figure] <= 1 for figure in FIGURES)
        assert (made.evaluation.folder / f"{name.replace(':', '-')}.trec").is_file()
    assert systems["bm25"]["R@100"] == 1.0  # every judged passage shares a word with its query


def test_the_contract_holds_with_a_dense_teacher(dense: Made) -> None:
    assert_contract(dense, pairs_of_the_teacher=94)


@pytest.mark.slow
def test_the_contract_holds_with_a_cross_encoder(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace("cross-encoder")

    made = make_all(workplace, workplace.run)

    assert_contract(made, pairs_of_the_teacher=94)
    # The logit, not its sigmoid: somewhere outside of 0..1.
    scores = made.table.manifest["summary"]["raw_gold_sim"]["tiny"]
    assert scores["min"] < 0 or scores["max"] > 1


def test_the_last_line_is_the_folder_and_logs_go_to_stderr(dense: Made) -> None:
    for made, kind in ((dense.table, "tables"), (dense.student, "students"), (dense.evaluation, "evaluations")):
        assert made.folder.parent == dense.workplace.cache / kind
    assert dense.table.stdout == f"{dense.table.folder}\n"
    assert dense.student.stdout == f"{dense.student.folder}\n"
    assert dense.evaluation.stdout.splitlines()[0].startswith("system")  # the table of figures
    assert "scored 94, reused 0" in dense.evaluation.log
    assert "step 30 of 30: loss " in dense.evaluation.log


def test_the_table_loads_with_datasets_alone(dense: Made) -> None:
    from datasets import Dataset

    [shard] = dense.table.folder.glob("*.arrow")
    rows = Dataset.from_file(str(shard))

    assert rows.column_names == ["query_id", "passage_ids", "gold_sim"]
    assert len(rows) == 15
    assert all(len(row["passage_ids"]) == len(row["gold_sim"]) == 4 for row in rows)


def test_the_student_learned_and_became_sparser(dense: Made) -> None:
    losses = [entry["base_loss"] for entry in read_json(dense.student.folder / "training.json") if "base_loss" in entry]
    systems = read_json(dense.evaluation.folder / "metrics.json")["systems"]

    assert losses[-1] < losses[0]
    assert systems["student:untrained"]["passage_active_dims"] == pytest.approx(60, rel=0.1)
    assert systems["student"]["passage_active_dims"] < systems["student:untrained"]["passage_active_dims"]


def test_the_card_says_what_made_the_student(dense: Made) -> None:
    card = (dense.student.folder / "README.md").read_text(encoding="utf-8")

    for said in ("`tiny`: dense", "Collection `sample`, 15 rows", dense.table.folder.name, "30 steps of 4 rows", "in SpladeLoss:"):
        assert said in card
    assert "python pipeline/evaluate.py recipe.toml" in card
    assert str(dense.workplace.folder) not in card
    assert not list(dense.workplace.cache.rglob("*.work"))


@pytest.mark.slow
def test_bm25_teaches_beside_a_model_and_is_ranked_once(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace("dense")
    with (workplace.folder / "recipe.toml").open("a", encoding="utf-8") as stream:
        stream.write('[[teachers]]\nname = "lexical"\nkind = "bm25"\n')

    evaluation = workplace.run("evaluate", "labels.calibration.kind=zscore")
    table = workplace.run("teacher_scores", "labels.calibration.kind=minmax", "labels.weights={tiny = 1, lexical = 2}")
    student = workplace.run("train_student", "labels.calibration.kind=zscore")

    systems = read_json(evaluation.folder / "metrics.json")["systems"]
    assert list(systems) == ["bm25", "student", "student:untrained", "teacher:lexical", "teacher:tiny"]
    assert systems["teacher:lexical"] == systems["bm25"]
    assert re.search(r"evaluation of teacher:lexical \w{16}: hit", evaluation.log)
    assert (table.manifest["counts"]["pairs_scored"], table.manifest["counts"]["pairs_reused"]) == (0, 188)
    assert "- `lexical`: bm25, `k1=0.9 b=0.4`" in (student.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_three_kinds_of_teachers_two_miners_and_stratified_negatives_make_one_student(
    make_workplace: Callable[..., Any], tiny_cross_encoder_folder: Path
) -> None:
    workplace = make_workplace("dense")
    recipe = workplace.folder / "recipe.toml"
    more = (
        f'[[teachers]]\nname = "judge"\nkind = "cross-encoder"\nmodel = "{tiny_cross_encoder_folder}"\n'
        '[[teachers]]\nname = "lexical"\nkind = "bm25"\n[labels]\nselection = "stratified"\nselection_teacher = "lexical"\n'
    )
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("[labels]\n", more), encoding="utf-8")

    evaluation = workplace.run("evaluate", "labels.calibration.kind=minmax", "labels.calibration.scale=10")
    first = workplace.run("teacher_scores", "labels.calibration.kind=minmax", "labels.calibration.scale=10")
    another = [
        "labels.calibrations={lexical = {kind = 'percentile'}, judge = {kind = 'affine', reference = 'tiny'}}",
        "labels.weights={tiny = 1, judge = 2, lexical = 0.5}",
        "labels.combine=sum",
        "labels.rescale={kind = 'zscore', scale = 8}",
    ]
    again = workplace.run("teacher_scores", *another)
    student = workplace.run("train_student", *another)

    assert {row["kind"] for row in first.manifest["recipe"]["mining"]["miners"]} == {"bm25", "dense"}
    pairs = first.manifest["counts"]["pairs"]
    assert pairs == 3 * 94
    assert first.manifest["counts"]["pairs_scored"] == pairs
    assert (again.manifest["counts"]["pairs_scored"], again.manifest["counts"]["pairs_reused"]) == (0, pairs)
    assert again.folder != first.folder
    assert ScoreTable.open(again.folder).labels().std() == pytest.approx(8, rel=1e-5)
    assert "score doctor" in again.log
    assert f"table {again.folder.name}: hit" in student.log
    systems = read_json(evaluation.folder / "metrics.json")["systems"]
    assert list(systems) == ["bm25", "student", "student:untrained", "teacher:judge", "teacher:lexical", "teacher:tiny"]
    card = (student.folder / "README.md").read_text(encoding="utf-8")
    assert "Calibration `raw`, `percentile` for lexical, `affine` for judge, combined scores by `zscore`" in card


@pytest.mark.slow
def test_imported_scores_teach_what_their_model_taught(make_workplace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace("dense")
    table = workplace.run("teacher_scores")
    monkeypatch.chdir(workplace.folder)
    experiment = Experiment(Plan(load_recipe(Path("recipe.toml"))))
    query_ids, passage_ids = filter_pairs(candidates(experiment))
    gold_sim = BankedScores(experiment.collection, {"tiny": experiment.scores_of(experiment.teacher("tiny"))})
    scores = gold_sim("tiny", query_ids, passage_ids)
    lines = [f"{pair[0]} Q0 {pair[1]} 1 {score} tiny\n" for *pair, score in zip(query_ids, passage_ids, scores, strict=True)]
    Path("tiny.run").write_text("".join(lines), encoding="utf-8")
    places = ["--collection", experiment.recipe.collection.path, "--cache", "cache"]
    done = CliRunner().invoke(app, ["import", "trec-run", "tiny.run", "--name", "tiny-dense", *places])
    recipe = Path("recipe.toml").read_text(encoding="utf-8")
    head, _, rest = recipe.partition('kind = "dense"\nmodel = ' + json.dumps(experiment.teacher("tiny").reference) + "\n[labels]")
    Path("recipe.toml").write_text(f'{head}kind = "file"\nimported = "tiny-dense"\n[labels]{rest}', encoding="utf-8")

    evaluation = workplace.run("evaluate")

    assert done.exit_code == 0, done.stderr
    again = Experiment(Plan(load_recipe(Path("recipe.toml")))).plan
    taught = ScoreTable.open(again.folder("tables", again.table_fields))
    assert taught.key != table.folder.name
    assert list(taught.rows()) == list(ScoreTable.open(table.folder).rows())
    assert list(read_json(evaluation.folder / "metrics.json")["systems"]) == ["bm25", "student", "student:untrained"]
    assert "teacher:tiny is not measured: imported scores rank only what they hold" in evaluation.log


def seconds_of_children() -> float:
    """Return the CPU time of processes that have ended; other processes' work does not count, as it would by the clock."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_second_run_is_a_hit_and_fast(dense: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in dense.workplace.cache.rglob("*")}
    for script, made in (("teacher_scores", dense.table), ("train_student", dense.student), ("evaluate", dense.evaluation)):
        began = seconds_of_children()

        again = dense.workplace.run_afresh(script)

        assert seconds_of_children() - began < SECONDS_OF_A_HIT
        assert again.folder == made.folder
        assert ": hit" in again.log
    assert {path: path.stat().st_mtime_ns for path in dense.workplace.cache.rglob("*")} == before


def test_a_change_of_labels_scores_no_pair(dense: Made) -> None:
    table = dense.workplace.run("teacher_scores", "labels.num_negatives=2", "labels.calibration.kind=zscore")

    counts = table.manifest["counts"]
    assert table.folder != dense.table.folder
    assert (counts["pairs"], counts["pairs_scored"], counts["pairs_reused"]) == (94, 0, 94)
    assert "candidates" in table.log
    assert table.log.count(": hit") == 1


@pytest.mark.slow
def test_a_change_of_training_makes_a_student_and_nothing_of_stage_1(dense: Made) -> None:
    student = dense.workplace.run("train_student", "training.max_steps=4", "training.loss=SparseMarginMSELoss")

    assert student.folder != dense.student.folder
    assert f"table {dense.table.folder.name}: hit" in student.log
    assert "candidates" not in student.log


@pytest.mark.slow
def test_a_change_of_evaluation_trains_nothing_and_measures_again(dense: Made) -> None:
    evaluation = dense.workplace.run("evaluate", "evaluation.split=dev")

    assert f"student {dense.student.folder.name}: hit" in evaluation.log
    assert read_json(evaluation.folder / "metrics.json")["split"] == "dev"


@pytest.mark.slow
def test_stage_by_stage_gives_the_bytes_of_one_command(
    dense: Made, make_workplace: Callable[..., Any], content_of: Callable[[Path, str], dict[str, bytes]]
) -> None:
    workplace = make_workplace("dense")

    table, student, evaluation = (workplace.run(script) for script in ("teacher_scores", "train_student", "evaluate"))

    assert f"table {table.folder.name}: hit" in student.log
    assert f"student {student.folder.name}: hit" in evaluation.log
    for made, before, pattern in (
        (table, dense.table, "*.arrow"),
        (student, dense.student, "model.safetensors"),
        (evaluation, dense.evaluation, "*.trec"),
        (evaluation, dense.evaluation, "metrics.json"),
    ):
        assert made.folder.name == before.folder.name
        assert content_of(made.folder, pattern) == content_of(before.folder, pattern)
        assert content_of(made.folder, pattern)
