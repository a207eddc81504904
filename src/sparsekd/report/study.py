"""The facts of a study's page: every member's figures, which of them nothing else beats, and what the bank saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekd.artifact import key_of, write_file_atomically
from sparsekd.evaluation.measures import MEASURES
from sparsekd.plan import Plan
from sparsekd.recipe import Member
from sparsekd.report.experiment import settings
from sparsekd.report.page import COLOURS, NAMES, environment, experiment_path, quality_levels
from sparsekd.report.plots import Plots, Point, file_of
from sparsekd.report.results import STUDENT, Results, Runs, System, read_results
from sparsekd.study import TeacherCalls, teacher_calls

COSTS = {"FLOPS": "FLOPS (expected multiplications)", "passage_active_dims": "active dims of a passage"}


@dataclass(frozen=True)
class MemberFacts:
    """One member: what it reached, or why it did not."""

    number: int
    name: str
    key: str
    """Of its evaluation."""
    results: Results
    page: str | None
    """Name of its own page, beside the study's; None where it has none."""
    failure: str | None
    """Why the run that wrote this page failed."""

    @property
    def student(self) -> System | None:
        """The measured student, None where the member is not finished."""
        return self.results.systems.get(STUDENT)


@dataclass(frozen=True)
class StudyFacts:
    """Everything on a study's page."""

    collection: str
    counts: dict[str, int]
    has_texts: bool
    """Whether the members' pages may show the collection's texts."""
    members: list[MemberFacts]
    calls: TeacherCalls
    fronts: dict[str, list[int]]
    """Cost -> numbers of the members that no other beats at that cost or less, cheapest first."""
    recipe: list[tuple[str, Any]]
    overrides: list[str]
    commands: list[str]

    @property
    def finished(self) -> list[MemberFacts]:
        """Members with a measured student."""
        return [member for member in self.members if member.student]

    @property
    def most_measured(self) -> Results:
        """The results of the member with the most systems: baseline and teachers are everybody's."""
        return max((member.results for member in self.members), key=lambda results: len(results.systems))


def write_study(plan: Plan, members: Sequence[tuple[Member, Plan]], failures: Mapping[str, str] | None = None) -> Path:
    """Write the page of a study as far as it has come; return its path, which is the same for the same study.

    The curve of quality against FLOPS stands beside it as an SVG file, once it has a point.
    """
    facts = read_study(plan, members, failures or {})
    plots = study_plots(facts)
    page = environment().get_template("study.html").render(facts=facts, plots=plots, **NAMES)
    path = study_path(plan, members)
    write_file_atomically(path, page.encode("utf-8"))
    if curve := plots.get("FLOPS"):
        write_file_atomically(path.with_suffix(".svg"), file_of(curve, COLOURS.read_text(encoding="utf-8")))
    return path


def study_path(plan: Plan, members: Sequence[tuple[Member, Plan]]) -> Path:
    """Return where the page of a study is: named by the members' keys, finished or not."""
    return plan.cache / "reports" / f"study-{key_of({'members': [key_of(each.evaluation_fields()) for _, each in members]})}.html"


def read_study(plan: Plan, members: Sequence[tuple[Member, Plan]], failures: Mapping[str, str]) -> StudyFacts:
    """Read what there is; loads no model. Runs that members share are read once."""
    runs: Runs = {}
    found = []
    for number, (member, each) in enumerate(members, start=1):
        page, key = experiment_path(each), key_of(each.evaluation_fields())
        results, name = read_results(each, runs=runs), page.name if page.is_file() else None
        found.append(MemberFacts(number, member.name, key, results, name, failures.get(member.name)))
    commands = {member.student.run.manifest.get("command", "") for member in found if member.student}
    return StudyFacts(
        collection=plan.collection_folder.name,
        counts=plan.collection.counts,
        has_texts=plan.recipe.collection.publish_texts,
        members=found,
        calls=teacher_calls(members),
        fronts={cost: _front(found, cost) for cost in COSTS},
        recipe=list(settings(plan)),
        overrides=list(plan.overrides),
        commands=sorted(commands - {""}),
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the (cost, quality) that no other beats, cheapest first: none has at most the cost and more quality.

    Of equal points the first stays.

    >>> pareto_front([(2, 0.5), (1, 0.4), (3, 0.5), (1, 0.3)])
    [1, 0]
    """
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1], at)):
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def _front(members: Sequence[MemberFacts], cost: str) -> list[int]:
    able = [(member.number, *_place(member, cost)) for member in members if member.student and cost in member.student.figures]
    return [able[at][0] for at in pareto_front([(price, quality) for _, price, quality in able])]


def _place(member: MemberFacts, cost: str) -> tuple[float, float]:
    assert member.student is not None, member.name
    return member.student.figures[cost], member.student.figures[MEASURES[0]]


def study_plots(facts: StudyFacts) -> dict[str, Any]:
    """Draw quality over each cost, one point per finished member."""
    plots, drawn = Plots(), {}
    levels = quality_levels(facts.most_measured)
    by_number = {member.number: member for member in facts.finished}
    for cost, label in COSTS.items():
        able = [member for member in facts.finished if member.student and cost in member.student.figures]
        points = [Point(str(member.number), *_place(member, cost)) for member in able]
        if points:
            front = [_place(by_number[number], cost) for number in facts.fronts[cost]]
            title = f"{MEASURES[0]} against {label}"
            drawn[cost] = plots.trade_off(title, points, x_label=label, y_label=MEASURES[0], levels=levels, front=front)
    return drawn
