"""What taught the student: candidates by miner, what was dropped on the way to the table, and the teachers' scores of it.

From the manifests, the score doctor's facts, and the bank for histograms. R rows, N passages per row, positive first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.artifact import Artifact
from sparsekd.doctor import FACTS, examined, lists_of
from sparsekd.experiment import Experiment
from sparsekd.labels.building import scored_teachers
from sparsekd.labels.score_table import ScoreTable
from sparsekd.mining.candidates import Candidates

_BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Shares of two groups of values in the same bins; ``edges`` has one more."""

    edges: list[float]
    groups: dict[str, list[float]]


@dataclass(frozen=True)
class TaughtBy:
    """One teacher's raw scores of the table."""

    name: str
    kind: str
    model: str
    facts: dict[str, Any]
    """The score doctor's, with the teacher's weight."""
    gold_sim: Histogram | None
    """Positives against negatives, None where nothing is scored."""
    margins: Histogram | None


@dataclass(frozen=True)
class Step:
    """A step of the waterfall from proposals to the table: what is left, or what a reason took away."""

    name: str
    count: int
    is_dropped: bool


@dataclass(frozen=True)
class Teaching:
    """Stage 1 as a page shows it."""

    kept_by_miner: dict[str, int]
    miner_facts: dict[str, Any]
    waterfall: list[Step]
    table: Artifact | None
    pairs: dict[str, int]
    """pairs, pairs_scored, pairs_reused, and pairs_missing where an import lacks some."""
    teachers: list[TaughtBy]
    doctor: dict[str, Any] | None
    """The whole page of facts, None where no score labels."""
    gates: dict[str, Any]


def read_teaching(experiment: Experiment) -> Teaching | None:
    """Return stage 1 as far as it has come; None before there are candidates."""
    plan = experiment.plan
    mined, made = plan.hit("candidates", plan.candidates_fields), plan.hit("tables", plan.table_fields)
    if mined is None and made is None:
        return None
    table = ScoreTable.open(made.folder) if made else None
    counts = table.counts if table else {}
    doctor = _doctor(experiment, table) if table else None
    return Teaching(
        kept_by_miner=Candidates.open(mined.folder).kept_by_miner() if mined else {},
        miner_facts=dict(mined.manifest.get("miners", {})) if mined else {},
        waterfall=waterfall(counts.get("mining") or (mined.manifest["counts"] if mined else {}), counts),
        table=made,
        pairs={name: int(value) for name, value in counts.items() if name.startswith("pairs")},
        teachers=_teachers(experiment, table, doctor) if table and doctor else [],
        doctor=doctor,
        gates=dict(made.manifest.get("gate", {})) if made else {},
    )


def waterfall(mining: dict[str, int], table: dict[str, Any]) -> list[Step]:
    """Return proposals, what each reason took, the candidates kept, what a teacher's filter took, and the rows.

    >>> [(step.name, step.count) for step in waterfall({"proposed": 5, "dropped_filter": 2, "dropped_positive": 0, "kept": 3}, {})]
    [('proposed', 5), ('filter', 2), ('candidates kept', 3)]
    """
    if not mining:
        return []
    dropped = {
        name.removeprefix("dropped_").replace("_", " "): count for name, count in mining.items() if name.startswith("dropped_")
    }
    steps = [Step("proposed", mining["proposed"], is_dropped=False)]
    steps += [Step(name, count, is_dropped=True) for name, count in sorted(dropped.items(), key=lambda item: -item[1]) if count]
    steps.append(Step("candidates kept", mining["kept"], is_dropped=False))
    by_teacher = int(table.get("candidates_dropped_filter", 0))
    if by_teacher:
        steps.append(Step("filter by a teacher", by_teacher, is_dropped=True))
        steps.append(Step("candidates left", mining["kept"] - by_teacher, is_dropped=False))
    return steps


def _doctor(experiment: Experiment, table: ScoreTable) -> dict[str, Any] | None:
    found = examined(experiment.plan, table, experiment.provenance())
    facts: dict[str, Any] | None = json.loads((found.folder / FACTS).read_text(encoding="utf-8")) if found else None
    return facts


def _teachers(experiment: Experiment, table: ScoreTable, doctor: dict[str, Any]) -> list[TaughtBy]:
    lists = list(lists_of(table))
    query_ids = [query_id for query_id, passage_ids in lists for _ in passage_ids]
    passage_ids = [passage_id for _, row in lists for passage_id in row]
    found = []
    for name in scored_teachers(experiment.recipe):
        teacher = experiment.teacher(name)
        gold_sim_RN = experiment.banked(teacher)(name, query_ids, passage_ids).reshape(len(lists), -1).astype(np.float64)
        groups = {"positives": gold_sim_RN[:, 0], "negatives": gold_sim_RN[:, 1:].ravel()}
        margins = {"margins": (gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]).ravel()}
        facts = doctor["teachers"][name]
        found.append(TaughtBy(name, teacher.kind, teacher.reference, facts, histogram(groups), histogram(margins)))
    return found


def histogram(groups: dict[str, NDArray[np.float64]], bins: int = _BINS) -> Histogram | None:
    """Return each group's share of values per bin between the lowest and highest of all; NaN is left out. None without a value.

    >>> histogram({"a": np.array([0.0, 1.0, 1.0, 4.0])}, bins=2)
    Histogram(edges=[0.0, 2.0, 4.0], groups={'a': [0.75, 0.25]})
    """
    known = {name: values[np.isfinite(values)] for name, values in groups.items()}
    everything = np.concatenate(list(known.values()))
    if not everything.size:
        return None
    edges = np.histogram_bin_edges(everything, bins)
    shares = {name: np.histogram(values, edges)[0] / max(1, values.size) for name, values in known.items()}
    return Histogram(edges.tolist(), {name: share.tolist() for name, share in shares.items()})
