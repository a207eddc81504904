"""The figures of a page: what each system reaches on the measured split, and what the student wins and loses.

Reads the systems' run files and manifests; a system that has not been measured is absent. Q queries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.artifact import Artifact
from sparsekd.collection.beir import Qrels
from sparsekd.evaluation.evaluate import METRICS
from sparsekd.evaluation.measures import MEASURES, measure_queries
from sparsekd.evaluation.runs import Ranking, read_trec_run
from sparsekd.evaluation.significance import Estimate, bootstrap
from sparsekd.evaluation.systems import judgements
from sparsekd.evaluation.vocabulary import VOCABULARY
from sparsekd.plan import Plan
from sparsekd.recipe import BM25Teacher, FileTeacher

BYTES_PER_POSTING = 8
"""A 4-byte passage number and a 4-byte weight, uncompressed: what any engine's quantisation and compression start from."""
STUDENT, UNTRAINED, BM25 = "student", "student:untrained", "bm25"


@dataclass(frozen=True)
class System:
    """One measured system."""

    name: str
    role: str
    run: Artifact
    rankings: dict[str, Ranking]
    values: dict[str, dict[str, float]]
    """measure -> query_id -> value."""
    figures: dict[str, float]
    """What ``metrics.json`` says: means of the measures, active dims, FLOPS."""
    vocabulary: dict[str, Any] | None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    """measure -> mean over queries and its interval."""

    @property
    def index_bytes(self) -> int | None:
        """Bytes of its postings, None where they were not counted."""
        return self.vocabulary["postings"] * BYTES_PER_POSTING if self.vocabulary else None

    @property
    def rates(self) -> dict[str, float]:
        """Queries and passages encoded a second, and milliseconds of search a query; those that were measured."""
        told = self.run.manifest.get("measured", {})
        rates = {
            f"{side}_per_second": told[side] / told[f"encode_{side}_seconds"]
            for side in ("queries", "passages")
            if told.get(f"encode_{side}_seconds")
        }
        return rates | ({"search_ms": 1000 * told["search_seconds"] / told["queries"]} if told.get("search_seconds") else {})


@dataclass(frozen=True)
class Comparison:
    """The student's value less another system's, query by query."""

    other: str
    measure: str
    difference: Estimate
    wins: int
    ties: int
    losses: int
    share: float | None
    """The student's mean divided by the other's; None where that is 0."""


@dataclass(frozen=True)
class Results:
    """Every measured system on one split, the student first, and the student against each of them."""

    split: str
    qrels: Qrels
    systems: dict[str, System]
    comparisons: list[Comparison]
    missing: list[str]
    """Systems of the recipe that are not measured yet."""
    unmeasurable: list[str]
    """Teachers of imported scores, which rank only what they hold."""

    @property
    def teachers(self) -> list[System]:
        """Measured teachers, in the recipe's order."""
        return [system for name, system in self.systems.items() if name.startswith("teacher:")]

    @property
    def best_teacher(self) -> System | None:
        """The measured teacher of highest nDCG@10, one that is the baseline itself only without another; None without one."""
        baseline = self.systems[BM25].run.key if BM25 in self.systems else None
        return max(self.teachers, key=lambda system: (system.run.key != baseline, system.figures[MEASURES[0]]), default=None)

    def compared(self, measure: str) -> list[Comparison]:
        """Return the comparisons in one measure."""
        return [comparison for comparison in self.comparisons if comparison.measure == measure]


Runs = dict[str, tuple[dict[str, Ranking], dict[str, dict[str, float]]]]
"""Run key -> rankings and values by measure: of a study's members, read once."""


def read_results(plan: Plan, *, runs: Runs | None = None) -> Results:
    """Return the results of what has been measured. ``runs`` keeps what was read, for the next member of a study."""
    split = plan.recipe.evaluation.split
    qrels = judgements(plan.recipe, plan.collection, split)
    runs = {} if runs is None else runs
    found, missing = {}, []
    for name, fields in plan.system_fields().items():
        run = plan.hit("runs", fields)
        if run is None:
            missing.append(name)
        else:
            found[name] = _system(plan, name, run, qrels, runs)
    systems = {name: found[name] for name in sorted(found, key=_place)}
    comparisons = _estimated(systems, list(qrels))
    unmeasurable = [teacher.name for teacher in plan.recipe.teachers if isinstance(teacher, FileTeacher)]
    return Results(split, qrels, systems, comparisons, missing, unmeasurable)


def _system(plan: Plan, name: str, run: Artifact, qrels: Qrels, runs: Runs) -> System:
    if run.key not in runs:
        rankings = read_trec_run(run.folder / "run.trec")
        runs[run.key] = rankings, measure_queries(rankings, qrels)
    rankings, values = runs[run.key]
    figures = json.loads((run.folder / METRICS).read_text(encoding="utf-8"))
    path = run.folder / VOCABULARY
    vocabulary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return System(name, _role(plan, name), run, rankings, values, figures, vocabulary)


def _role(plan: Plan, name: str) -> str:
    if name == BM25:
        return "baseline, searches all passages"
    if name == UNTRAINED:
        return "before training, searches all passages"
    if name == STUDENT:
        return "searches all passages"
    teacher = next(teacher for teacher in plan.recipe.teachers if f"teacher:{teacher.name}" == name)
    if isinstance(teacher, BM25Teacher):
        return "BM25 as a teacher, as retriever"
    if teacher.kind == "cross-encoder":
        return f"cross-encoder, as reranker of BM25's best {plan.recipe.evaluation.rerank_depth}"
    return f"{teacher.kind} encoder, as retriever"


def _place(name: str) -> int:
    return {STUDENT: 0, UNTRAINED: 1, BM25: 2}.get(name, 3)


def _estimated(systems: Mapping[str, System], query_ids: list[str]) -> list[Comparison]:
    """Fill in the systems' estimates and return the student's comparisons, all over the same resampled queries."""
    values = {
        (name, measure): np.array([system.values[measure][query_id] for query_id in query_ids])
        for name, system in systems.items()
        for measure in MEASURES
    }
    pairs = list(_pairs(systems))
    columns = [*values.values(), *(values[STUDENT, measure] - values[other, measure] for other, measure in pairs)]
    if not columns:
        return []
    estimates = bootstrap(np.stack(columns, axis=1))
    for (name, measure), estimate in zip(values, estimates, strict=False):
        systems[name].estimates[measure] = estimate
    differences = zip(pairs, estimates[len(values) :], strict=True)
    return [_comparison(other, measure, estimate, values) for (other, measure), estimate in differences]


def _pairs(systems: Mapping[str, System]) -> Iterator[tuple[str, str]]:
    if STUDENT in systems:
        yield from ((other, measure) for other in systems if other != STUDENT for measure in MEASURES)


def _comparison(
    other: str, measure: str, difference: Estimate, values: Mapping[tuple[str, str], NDArray[np.float64]]
) -> Comparison:
    ours, theirs = values[STUDENT, measure], values[other, measure]
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    mean = float(theirs.mean())
    share = float(ours.mean()) / mean if mean else None
    return Comparison(other, measure, difference, wins, len(ours) - wins - losses, losses, share)
