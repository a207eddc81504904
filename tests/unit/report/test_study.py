"""A study carried out with tiny models, one member of which cannot finish, and the page that compares them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sparsekd.experiment import Experiment, score_table
from sparsekd.plan import Plan
from sparsekd.report.page import write_report
from sparsekd.report.study import pareto_front, read_study, write_study
from sparsekd.study import member_plans, run_study, teacher_calls

FAILING = "training.min_active_dims=1e6"
STUDY = {
    "grid": [["student.lambda_passage=0.1", "student.lambda_passage=5.0"]],
    "members": [["labels.num_negatives=1"], [FAILING, "training.collapse_patience=1"]],
}
FEW_STEPS = {"loss": "SparseMarginMSELoss", "max_steps": 3, "batch_size": 4}


def test_the_front_is_what_no_other_beats() -> None:
    points = np.random.default_rng(0).integers(0, 6, size=(300, 2)).astype(float).tolist()

    for size in range(1, 9):
        for start in range(0, 300 - size, 13):
            part = [(cost, quality) for cost, quality in points[start : start + size]]
            front = {part[at] for at in pareto_front(part)}
            beaten = {
                one
                for one, other in itertools.product(part, part)
                if other[0] <= one[0] and other[1] >= one[1] and other != one
            }
            assert front == set(part) - beaten


def test_the_page_of_a_study_that_has_not_begun_says_so(make_plan: Callable[..., Plan], tmp_path: Path, elements_of: Any) -> None:
    plan = make_plan(tmp_path / "cache", study=STUDY, training=FEW_STEPS)
    members = member_plans(plan)
    score_table(Experiment(members[0][1]))

    path = write_study(plan, members)

    text = elements_of(path.read_text(encoding="utf-8")).text
    assert "0 of 4 members are finished" in text
    assert text.count("not finished; make study goes on") == 4
    assert "No member is finished yet." in text
    calls = teacher_calls(members)
    assert calls.asked > 0
    assert f"needed {calls.asked:,} teacher calls" in text


class Carried(NamedTuple):
    plan: Plan
    members: Any
    failures: dict[str, str]
    again: dict[str, str]
    calls: list[Any]
    path: Path

    @property
    def page(self) -> str:
        return self.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def carried(make_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Carried:
    plan = make_plan(tmp_path_factory.mktemp("study") / "cache", study=STUDY, training=FEW_STEPS)
    members = member_plans(plan)
    failures = run_study(members, done=write_report)
    done: list[Any] = []
    again = run_study(members, done=lambda experiment: done.append(experiment.plan))
    return Carried(plan, members, failures, again, done, write_study(plan, members, failures))


@pytest.mark.slow
def test_a_failed_member_ends_no_other(carried: Carried) -> None:
    [name] = carried.failures

    assert FAILING in name
    assert "active dims" in carried.failures[name]
    facts = read_study(carried.plan, carried.members, carried.failures)
    assert [member.student is not None for member in facts.members] == [True, True, True, False]


@pytest.mark.slow
def test_a_study_run_again_makes_nothing_anew_and_tries_what_failed(carried: Carried) -> None:
    assert set(carried.again) == set(carried.failures)
    assert len(carried.calls) == 3
    folders = [plan.folder("students", plan.student_fields) for _, plan in carried.members[:3]]
    manifests = [(folder / "manifest.json").stat().st_mtime_ns for folder in folders]
    assert max(manifests) < carried.path.stat().st_mtime_ns
    runs = carried.plan.cache / "runs"
    assert len(list(runs.glob("*/manifest.json"))) == 3 + 3  # students, and what they share: bm25, the teacher, untrained


@pytest.mark.slow
def test_one_bank_serves_all_members(carried: Carried) -> None:
    calls = teacher_calls(carried.members)

    assert calls.without_bank == 4 * calls.asked  # every member's candidates are the same
    assert f"{calls.asked:,} teacher calls" in carried.page
    assert f"{calls.without_bank:,}" in carried.page


@pytest.mark.slow
def test_the_page_has_a_row_and_a_point_for_every_finished_member(carried: Carried, elements_of: Any) -> None:
    elements = elements_of(carried.page)

    assert {"curve", "members", "provenance", "missing", "figures", "systems", "calls"} <= set(elements.values_of("id"))
    facts = read_study(carried.plan, carried.members, carried.failures)
    for member in facts.members:
        assert member.name in elements.text
    for member in facts.finished:
        assert member.student is not None
        assert f"{member.student.figures['nDCG@10']:.4f}" in elements.text
        assert f"{member.number}: nDCG@10 {member.student.figures['nDCG@10']:.4f} at" in carried.page
        assert f'href="{member.page}"' in carried.page
        assert (carried.path.parent / str(member.page)).is_file()
    assert "failed: " in elements.text
    assert facts.finished[0].student is not None
    told = f"1: nDCG@10 {facts.finished[0].student.figures['nDCG@10']:.4f} at"
    assert told in carried.path.with_suffix(".svg").read_text(encoding="utf-8")
    assert elements.tags() & {"script", "img", "iframe"} == set()
    assert str(carried.plan.cache.parent) not in carried.page


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_a_study_fits_a_phone_and_asks_for_nothing(carried: Carried, browser: Any, width: int) -> None:
    browser.open(carried.path, width=width)

    assert browser.value_of("document.documentElement.scrollWidth") == width
    assert [event for event in browser.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")] == []
    asked = [event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [carried.path.as_uri()]
