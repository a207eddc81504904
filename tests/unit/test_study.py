"""Members of a study: what they are made of, what is refused, and what the bank saved. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import publish
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe, load_recipe, study_members
from sparsekd.resources import require
from sparsekd.stage import run_stage
from sparsekd.study import FailedMembersError, describe_study, member_plans, require_members, teacher_calls

ONE = """
[collection]
path = "{collection}"
[[mining.miners]]
kind = "bm25"
quota = 4
[[teachers]]
name = "lexical"
kind = "bm25"
[student]
model = "{model}"
[training]
max_steps = 5
[run]
cache = "{cache}"
[study]
"""


@pytest.fixture
def load(tmp_path: Path, sample_folder: Path, tiny_masked_lm_folder: Path) -> Any:
    """Return ``load(study, *overrides)``: the recipe with that [study]."""

    def read(study: str, *overrides: str) -> Recipe:
        names = {"collection": sample_folder, "model": tiny_masked_lm_folder, "cache": tmp_path / "cache"}
        path = tmp_path / "study.toml"
        path.write_text(ONE.format(**names) + study, encoding="utf-8")
        return load_recipe(path, overrides)

    return read


def test_a_grid_has_every_combination_and_members_follow(load: Any) -> None:
    recipe = load(
        'grid = [["labels.num_negatives=2", "labels.num_negatives=3"], ["", "student.lambda_query=0.5"]]\n'
        'members = [["training.max_steps=9", "training.seed=1"]]'
    )

    members = study_members(recipe)

    assert [member.overrides for member in members] == [
        ("labels.num_negatives=2",),
        ("labels.num_negatives=2", "student.lambda_query=0.5"),
        ("labels.num_negatives=3",),
        ("labels.num_negatives=3", "student.lambda_query=0.5"),
        ("training.max_steps=9", "training.seed=1"),
    ]
    assert [member.recipe.student.lambda_query for member in members] == [0.1, 0.5, 0.1, 0.5, 0.1]
    assert [member.recipe.training.max_steps for member in members] == [5, 5, 5, 5, 9]
    assert all(member.recipe.study is None for member in members)


def test_the_study_changes_no_key(load: Any) -> None:
    with_study, without = load("members = [[]]"), load("members = [[]]").model_copy(update={"study": None})

    assert Plan(with_study).evaluation_fields() == Plan(without).evaluation_fields()


def test_a_member_is_the_recipe_with_its_overrides(load: Any) -> None:
    [(_, plan)] = member_plans(Plan(load('members = [["labels.num_negatives=2"]]', "training.seed=7"), ("training.seed=7",)))

    assert plan.overrides == ("training.seed=7", "labels.num_negatives=2")
    alone = Plan(load("", "training.seed=7", "labels.num_negatives=2"))
    assert plan.evaluation_fields() == alone.evaluation_fields()


def test_what_cannot_fit_is_refused_by_member_and_not_by_the_recipe_alone(load: Any, tmp_path: Path) -> None:
    kinds, settings = ["students"], ("run.memory_gb=4", "training.batch_size=4096", "student.max_length=128")
    fits = load('members = [["training.batch_size=8"]]', *settings)

    with pytest.raises(ValueError, match=r"^\[run\] students: it needs up to"):
        require(Plan(fits, settings), kinds)
    require_members(Plan(fits, settings), kinds)
    with pytest.raises(ValueError, match=r"^\[study\] member .*max_steps=9.*: \[run\] students: it needs up to"):
        require_members(Plan(load('members = [["training.batch_size=8"], ["training.max_steps=9"]]', *settings), settings), kinds)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            'members = [["labels.num_negatvies=2"]]',
            r"member 1 \(labels.num_negatvies=2\): \[labels\] num_negatvies is not a known key; did you mean num_negatives\?",
        ),
        (
            'members = [[], ["labels.num_negatives=many"]]',
            r"\[study\] member 2 \(labels.num_negatives=many\): \[labels\] num_negatives = 'many'",
        ),
        (
            'members = [["labels.num_negatives=2"], [], ["labels.num_negatives=2"]]',
            r"member 3 \(labels.num_negatives=2\) is the same experiment as member 1 \(labels.num_negatives=2\); remove one",
        ),
        (
            'members = [[], ["training.max_steps=5"]]',  # what the recipe says anyhow
            r"member 2 \(training.max_steps=5\) is the same experiment as member 1 \(the recipe as it stands\)",
        ),
        (
            'members = [["collection.max_passages=5"]]',
            r"members may differ in mining, teachers, labels, student, training, not in 'collection'; set it for the whole study",
        ),
        ('members = [["study.grid=[]"]]', r"not in 'study'"),
        ('members = [["labels"]]', r"member 1 \(labels\): --set labels: expected section.key=value"),
        ("", r"\[study\] has no member; expected grid or members"),
        ('grid = [["labels.num_negatives=2"], []]', r"\[study\] has no member"),
    ],
)
def test_what_is_no_study_is_refused_with_the_member_named(load: Any, study: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_members(load(study))


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ('member = [["a.b=1"]]', r"\[study\] member is not a known key; did you mean members\?"),
        ('members = ["labels.num_negatives=2"]', r"\[study.members\] 0 = 'labels.num_negatives=2': expected a list of overrides"),
    ],
)
def test_a_study_that_cannot_be_read_is_refused_with_the_recipe(load: Any, study: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(study)


def test_a_dry_run_tells_every_members_plan(load: Any) -> None:
    told = describe_study(Plan(load('grid = [["training.seed=1", "training.seed=2"]]')), ["candidates", "students"])

    assert told.startswith("study of 2 members\n\nmember 1: training.seed=1\n")
    assert told.count("order of work: candidates -> students") == 2


def test_teacher_calls_count_a_shared_table_once_and_every_member_without_the_bank(load: Any) -> None:
    plans = member_plans(
        Plan(load('members = [["training.seed=1"], ["training.seed=2"], ["labels.num_negatives=2"], ["labels.num_negatives=1"]]'))
    )
    for (_, plan), counts in zip(plans[1:3], ({"pairs": 100, "pairs_scored": 100}, {"pairs": 90, "pairs_scored": 7}), strict=True):
        with publish(
            plan.folder("tables", plan.table_fields), kind="score-table", fields=plan.table_fields, extra={"counts": counts}
        ):
            pass

    calls = teacher_calls(plans)

    assert (calls.asked, calls.without_bank) == (107, 290)  # the first two share a table; the last has none yet
    assert str(calls) == "teacher calls: 107 pairs scored; without the bank 290"


def test_failed_members_are_named_with_what_happened() -> None:
    assert str(FailedMembersError({"a.b=1": "out of memory"}, 3)) == (
        "1 of 3 members of the study failed; the same command tries them again\n  a.b=1: out of memory"
    )


def test_a_study_with_a_failed_member_exits_1_and_says_which(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("members = [[]]")

    def stage(plan: Plan) -> Path:
        raise FailedMembersError({"a.b=1": "out of memory"}, 2)

    assert run_stage("A study.", stage, ["students"], [str(tmp_path / "study.toml")]) == 1
    assert "error: 1 of 2 members of the study failed" in capsys.readouterr().err
