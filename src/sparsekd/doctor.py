"""The score doctor: one page of facts on a score table, from the bank and the table, before a student is trained on it.

Published beside the tables as ``doctor/KEY/facts.json`` under a key of its own, so that a table's key and bytes never depend on it,
and said in a few log lines. Calls no teacher and imports no torch; costs a look-up of the table's pairs per teacher, then nothing.
P distinct pairs, R rows, N passages per row, positive first.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.artifact import Artifact, key_of, publish, verify, write_json_atomically
from sparsekd.bank.scores import ScoreBank
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.building import scored_teachers, teacher_weights
from sparsekd.labels.calibration import softmax_entropy
from sparsekd.labels.facts import agreement_facts, dropped_facts, teacher_facts
from sparsekd.labels.rows import GoldSim
from sparsekd.labels.score_table import ScoreTable
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe

logger = logging.getLogger(__name__)

KIND = "score-doctor"
DOCTOR_VERSION = 1
"""Raised when the same fields would give other facts."""
FACTS = "facts.json"


def examined(plan: Plan, table: ScoreTable, extra: Mapping[str, Any]) -> Artifact | None:
    """Find or make the facts of ``table``, log them short and return their artifact; None where no score labels, or where the
    cache is read-only.

    ``extra`` (command, versions) is recorded in the manifest.
    """
    if table.kind in ("none", "embedding"):
        return None
    run = _untrained_run(plan)
    fields = doctor_fields(plan.recipe, table.key, plan.teacher_identities, run.key if run else None)
    found = plan.hit("doctor", fields)
    if found is None:
        bank = ScoreBank(plan.cache / "bank")
        scores = {name: bank.open(plan.teacher_identities[name]) for name in scored_teachers(plan.recipe)}
        facts = table_facts(plan.recipe, table, BankedScores(plan.collection, scores), _spread(run) if run else None)
        folder = plan.folder("doctor", fields)
        try:
            with publish(folder, kind=KIND, fields=fields, extra=dict(extra)) as temporary:
                write_json_atomically(temporary / FACTS, facts)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            logger.warning("score doctor: %s is read-only, its facts are not kept", plan.cache)  # a table there still hits
            logger.info("score doctor\n  %s", "\n  ".join(described_facts(facts)))
            return None
        found = plan.hit("doctor", fields)
        assert found is not None, folder
    verify(found)
    facts = json.loads((found.folder / FACTS).read_text(encoding="utf-8"))
    logger.info("score doctor %s", "\n  ".join([str(found.folder / FACTS), *described_facts(facts)]))
    return found


def describe(table: ScoreTable, recipe: Recipe) -> None:
    """Log what the training's loss makes of the table where widths do not tell.

    How sharp a target KL's softmax makes of score lists, the range that similarities were moved from, how sparse the vectors are.
    """
    if "SparseDistillKLDivLoss" in recipe.training.losses and table.kind == "score_list":
        entropy, support = softmax_entropy(table.labels(), recipe.training.temperature)
        logger.info(
            "softmax at temperature %g: entropy %.3f nats, effective support %.2f of %d passages",
            recipe.training.temperature,
            entropy,
            support,
            table.num_passages,
        )
    if table.kind == "similarity":
        low, high = table.contract.label_range or (0.0, 0.0)
        mean = table.summary["similarity"]["mean"]
        logger.info("similarity: gold_sim %.4f at 0, %.4f at 1, mean similarity %.3f", low, high, mean)
    if table.kind == "embedding":
        active = table.summary["active_dims"]
        dimension = table.contract.dimension
        logger.info("vectors: %d dims, active %.1f query, %.1f passage", dimension, active["query"], active["passage"])


def doctor_fields(
    recipe: Recipe, table_key: str, teacher_identities: Mapping[str, Mapping[str, Any]], student_run_key: str | None
) -> dict[str, Any]:
    """Return everything that can change the facts, for ``artifact.key_of``; names enter, because the page says them."""
    return {
        "stage": KIND,
        "version": DOCTOR_VERSION,
        "table": table_key,
        "teachers": {name: key_of(teacher_identities[name]) for name in scored_teachers(recipe)},
        "temperature": _temperature(recipe),
        "student_run": student_run_key,
    }


def table_facts(recipe: Recipe, table: ScoreTable, gold_sim: GoldSim, student_std: float | None) -> dict[str, Any]:
    """Return the page: teachers' raw scores, their agreement, the labels, the softmax, what was dropped, a calibration.

    ``student_std`` is the standard deviation of the student's dot products, None where it is not known.
    """
    pairs, weights, temperature = _pairs_of(table), teacher_weights(recipe), _temperature(recipe)
    scores = {name: np.asarray(gold_sim(name, pairs.query_ids, pairs.passage_ids)) for name in scored_teachers(recipe)}
    facts: dict[str, Any] = {
        "table": table.key,
        "kind": table.kind,
        "rows": len(pairs.places_RN),
        "passages_per_row": int(pairs.places_RN.shape[1]),
        "queries": len(pairs.sizes),
        "teachers": {
            name: {"weight": weights.get(name, 0.0), **teacher_facts(scores_P, scores_P[pairs.places_RN])}
            for name, scores_P in scores.items()
        },
        "agreement": [
            {"teachers": [first, second], **agreement_facts(scores[first], scores[second], pairs.sizes)}
            for first, second in itertools.combinations(scores, 2)
        ],
        "labels": table.summary,
        "softmax": None,
        "dropped": dropped_facts(table.counts),
        "calibration": suggested_calibration(student_std, num_teachers=len(weights)),
    }
    if temperature is not None and table.kind == "score_list":
        entropy, support = softmax_entropy(table.labels(), temperature)
        facts["softmax"] = {
            "temperature": temperature,
            "entropy": entropy,
            "effective_support": support,
            "passages": table.num_passages,
        }
    return facts


def suggested_calibration(student_std: float | None, *, num_teachers: int) -> dict[str, Any]:
    """Return the zscore whose labels spread like the student's dot products, or how to learn what that is.

    zscore's scale is the labels' standard deviation over the table. Several teachers' mean spreads less than each of them, so there
    the combined scores are what to scale. A ranking holds a student's best passages only, which spread less than candidates of all
    ranks do: the suggestion is a lower bound (nfcorpus: 5.9, where a scale of 16 was chosen by hand).

    >>> suggested_calibration(12.96, num_teachers=1)["set"]
    '[labels.calibration] kind = "zscore", scale = 13 or above'
    """
    section = "labels.calibration" if num_teachers == 1 else "labels.rescale"
    if student_std is None:
        how = (
            f'[{section}] kind = "zscore" takes as scale the standard deviation of the student\'s dot products, which is not known '
            "yet: run pipeline/evaluate.py once, which ranks by the untrained student, and this page says it; or set [training] "
            'label_scale = "student"'
        )
        return {"student_std": None, "set": None, "how": how}
    how = (
        "labels then spread as the untrained student's dot products do over its best passages of the measured queries; over "
        'passages of all ranks these spread more. [training] label_scale = "student" measures that on the table itself'
    )
    return {"student_std": student_std, "set": f'[{section}] kind = "zscore", scale = {student_std:.3g} or above', "how": how}


def described_facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the page in lines, short."""
    yield f"{facts['rows']:,} rows of {facts['passages_per_row']} passages, {facts['queries']:,} queries"
    for name, each in facts["teachers"].items():
        yield f"teacher {name} (weight {each['weight']:.3g}): {_described_teacher(each, facts['rows'])}"
    for each in facts["agreement"]:
        names, tau = " and ".join(each["teachers"]), each["kendall_tau"]
        told = f"mean {tau['mean']:.2f}, p10 {tau['p10']:.2f}, p90 {tau['p90']:.2f}" if tau else "undefined"
        yield f"{names}: Kendall tau {told} over {each['queries']:,} queries, {each['queries_undefined']:,} undefined"
    margins = facts["labels"].get("margin_quantiles")
    if margins:
        below = facts["labels"]["share_positive_below_best_negative"]
        told = ", ".join(f"{level} {value:.3g}" for level, value in margins.items())
        yield f"margins of the labels: {told}; positive below its best negative in {below:.1%} of rows"
    dropped = {"filter by teacher": facts["dropped"]["filter_by_teacher"]}
    dropped |= {name.removeprefix("dropped_"): part for name, part in facts["dropped"]["mining"].items()}
    dropped |= {f"rows for {name}": part for name, part in facts["dropped"]["rows"].items()}
    told = ", ".join(f"{name} {_described_part(part)}" for name, part in dropped.items() if part["count"])
    yield f"dropped: {told or 'nothing'}"
    advice = facts["calibration"]
    yield f"{advice['set']}: {advice['how']}" if advice["set"] else advice["how"]


def _described_teacher(facts: Mapping[str, Any], num_rows: int) -> str:
    if not facts["pairs"]:
        return f"none of {facts['unscored']:,} pairs scored"
    reach, saturation = facts["range"], facts["saturation"]
    below = facts["share_positive_below_best_negative"]
    parts = [
        f"{facts['pairs']:,} pairs" + (f", {facts['unscored']:,} unscored" if facts["unscored"] else ""),
        f"gold_sim {reach['min']:.3g}..{reach['max']:.3g}, mean {reach['mean']:.3g}, std {reach['std']:.3g}",
        f"{saturation['share_at_min']:.1%} at the lowest, {saturation['share_at_max']:.1%} at the highest of "
        f"{saturation['distinct_values']:,} values",
        f"{facts['constant_rows']:,} of {num_rows:,} rows constant",
    ]
    if below is not None:
        parts.append(f"positive below its best negative in {below:.1%} of rows")
    return "; ".join(parts)


def _described_part(part: Mapping[str, Any]) -> str:
    return f"{part['count']:,}" + (f" ({part['share']:.1%})" if part["share"] is not None else "")


@dataclass(frozen=True)
class _Pairs:
    """Every (query, passage) of a table once, query by query, and where each row's passages are among them."""

    query_ids: list[str]
    passage_ids: list[str]
    sizes: list[int]
    """Passages per query."""
    places_RN: NDArray[np.int64]


def _pairs_of(table: ScoreTable) -> _Pairs:
    place_by_pair: dict[tuple[str, str], int] = {}
    size_by_query: dict[str, int] = {}
    places = []
    for query_id, passage_ids in lists_of(table):
        before = len(place_by_pair)
        places.append([place_by_pair.setdefault((query_id, passage_id), len(place_by_pair)) for passage_id in passage_ids])
        size_by_query[query_id] = size_by_query.get(query_id, 0) + len(place_by_pair) - before
    query_ids, passage_ids = ([pair[side] for pair in place_by_pair] for side in (0, 1))
    return _Pairs(query_ids, passage_ids, list(size_by_query.values()), np.array(places, dtype=np.int64))


def lists_of(table: ScoreTable) -> Iterator[tuple[str, list[str]]]:
    """Yield (query_id, passage_ids positive first) of each row as it was chosen, whatever the layout made of it.

    Triplets follow each other list by list. Pairs of a query begin with a positive and the negatives that all its positives
    share, then come the other positives alone.
    """
    num_negatives = int(table.artifact.manifest["fields"]["num_negatives"])
    rows = ((query_id, passage_ids) for query_id, passage_ids, _ in table.rows())
    if table.kind == "similarity":
        for query_id, group in itertools.groupby(rows, key=lambda row: row[0]):
            passage_ids = [passage_id for _, [passage_id] in group]
            negatives = passage_ids[1 : 1 + num_negatives]
            yield from ((query_id, [positive, *negatives]) for positive in passage_ids[:1] + passage_ids[1 + num_negatives :])
    elif table.num_passages == 1 + num_negatives:
        yield from rows
    else:
        while triplets := list(itertools.islice(rows, num_negatives)):
            query_id, [positive, _] = triplets[0]
            yield query_id, [positive, *(negative for _, [_, negative] in triplets)]


def _temperature(recipe: Recipe) -> float | None:
    """KL's softmax temperature; None where no KL trains."""
    return recipe.training.temperature if "SparseDistillKLDivLoss" in recipe.training.losses else None


def _untrained_run(plan: Plan) -> Artifact | None:
    """The measured ranking by the untrained student; None where this cache has none, or the student is not here yet."""
    if not any((plan.cache / "runs").glob("*/manifest.json")):
        return None
    try:
        fields = plan.system_fields().get("student:untrained")
    except (FileNotFoundError, ValueError):  # no such split or student: for the stage that needs them to refuse
        return None
    return None if fields is None else plan.hit("runs", fields)


def _spread(run: Artifact) -> float | None:
    """Standard deviation of the scores of a TREC run; None for a run without any."""
    lines = (run.folder / "run.trec").read_text(encoding="utf-8").splitlines()
    return float(np.std([float(line.split()[4]) for line in lines])) if lines else None
