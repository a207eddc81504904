"""Builds the score table: looks scores up, calibrates each teacher, combines them, and publishes rows with labels.

Costs seconds and no teacher call. Memory: one float32 matrix [R, N] per teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsekd.artifact import key_of, publish
from sparsekd.labels.calibration import calibrate, constant_rows, effective_calibration, weighted_mean
from sparsekd.labels.rows import GoldSim, Rows, filtering_teacher, require_scores
from sparsekd.labels.score_table import KIND, TABLE_VERSION, ScoreTable, table_schema
from sparsekd.mining.shards import ROWS_PER_SHARD, write_shards
from sparsekd.recipe import Calibration, Recipe

log = logging.getLogger(__name__)

Scores = NDArray[np.float32]


def teacher_weights(recipe: Recipe) -> dict[str, float]:
    """Return each asked teacher's share of the mean, in recipe order; teachers of weight 0 are not asked and not listed."""
    given = recipe.labels.weights or {teacher.name: 1.0 for teacher in recipe.teachers}
    total = sum(given.values())
    return {teacher.name: given[teacher.name] / total for teacher in recipe.teachers if given.get(teacher.name, 0) > 0}


def table_folder(cache: Path, fields: Mapping[str, Any]) -> Path:
    """Return where the table made from ``fields`` is, or will be."""
    return cache / "tables" / key_of(fields)


def table_fields(recipe: Recipe, candidates_key: str, teacher_identities: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything that can change the table, for ``artifact.key_of``.

    ``teacher_identities`` by name; those of weight 0 that filter nothing do not enter, nor do names, settings that do not act
    (a seed under ``top``), or anything of training.
    """
    labels, filtering = recipe.labels, filtering_teacher(recipe)
    return {
        "stage": KIND,
        "version": TABLE_VERSION,
        "candidates": candidates_key,
        "kind": labels.kind,
        "num_negatives": labels.num_negatives,
        "selection": {"kind": labels.selection} | ({"seed": labels.seed} if labels.selection == "random" else {}),
        "calibration": effective_calibration(labels.calibration),
        "teachers": [
            {"identity": dict(teacher_identities[name]), "weight": weight} for name, weight in teacher_weights(recipe).items()
        ],
        "filter": None
        if filtering is None
        else {**recipe.mining.filter.model_dump(exclude={"by"}), "identity": dict(teacher_identities[filtering])},
    }


def build_table(
    recipe: Recipe,
    rows: Rows,
    *,
    cache: Path,
    fields: Mapping[str, Any],
    gold_sim: GoldSim,
    counts: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ScoreTable:
    """Label ``rows`` and publish them under the key of ``fields`` (``table_fields``).

    ``counts`` (pairs, pairs_scored, pairs_reused, the mining counts) and ``extra`` (command, versions) are recorded.
    Raises ValueError if the bank lacks a score, a calibration is undefined, or no row is left.
    """
    weights = teacher_weights(recipe)
    raw = {name: _look_up(rows, name, gold_sim) for name in weights}
    kept_R, dropped = _usable_rows(raw, recipe.labels.calibration, rows.dropped)
    raw = {name: scores[kept_R] for name, scores in raw.items()}
    gold_sim_RN = _combined(raw, weights, recipe.labels.calibration)
    summary = {**summarize(gold_sim_RN, recipe), "raw_gold_sim": {name: _range(scores) for name, scores in raw.items()}}
    published: dict[str, Any] = {
        **(extra or {}),
        "counts": {
            **(counts or {}),
            "rows": len(gold_sim_RN),
            "rows_dropped": dropped,
            "candidates_dropped_filter": rows.candidates_dropped_filter,
        },
        "summary": summary,
        "teachers": weights,
    }
    folder = table_folder(cache, fields)
    with publish(folder, kind=KIND, fields=fields, extra=published) as temporary:
        tables = _tables(rows, np.flatnonzero(kept_R), gold_sim_RN, recipe, _schema(fields, recipe))
        published["shards"] = write_shards(temporary, KIND, tables, -(-len(gold_sim_RN) // ROWS_PER_SHARD))
    log.info("table %s: %d rows of %d passages, dropped %s, %s", folder.name, *gold_sim_RN.shape, dropped, summary)
    return ScoreTable.open(folder)


def summarize(gold_sim_RN: Scores, recipe: Recipe) -> dict[str, Any]:
    """Return the lines that catch a broken teacher: label range, margin quantiles, share of rows ranked wrongly."""
    margins_RM = gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]
    quantiles = np.quantile(margins_RM.astype(np.float64), [0.01, 0.10, 0.50, 0.90, 0.99])
    column, labels = ("gold_sim", gold_sim_RN) if recipe.labels.kind == "score_list" else ("margin", margins_RM)
    return {
        column: _range(labels),
        "margin_quantiles": dict(zip(("p1", "p10", "p50", "p90", "p99"), quantiles.tolist(), strict=True)),
        "share_positive_below_best_negative": float((margins_RM < 0).any(axis=1).mean()),
    }


def _range(values: Scores) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean(dtype=np.float64)), "max": float(values.max())}


def _look_up(rows: Rows, teacher: str, gold_sim: GoldSim) -> Scores:
    """float32 [R, N]: one teacher's raw scores, asked for shard by shard."""
    scores_RN = np.empty((len(rows.query_ids), len(rows.passage_ids[0])), dtype=np.float32)
    for start in range(0, len(scores_RN), ROWS_PER_SHARD):
        part = slice(start, start + ROWS_PER_SHARD)
        query_ids = [query_id for query_id in rows.query_ids[part] for _ in range(scores_RN.shape[1])]
        passage_ids = [passage_id for passages in rows.passage_ids[part] for passage_id in passages]
        scores = np.asarray(gold_sim(teacher, query_ids, passage_ids), dtype=np.float32)
        require_scores(scores, teacher, query_ids, passage_ids)
        scores_RN[part] = scores.reshape(-1, scores_RN.shape[1])
    return scores_RN


def _usable_rows(
    raw: Mapping[str, Scores], calibration: Calibration, dropped: Mapping[str, int]
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """bool [R] of the rows the calibration is defined for, and rows dropped by reason, these included."""
    first = next(iter(raw.values()))
    kept_R = np.ones(len(first), dtype=bool)
    if calibration.kind == "minmax":
        for scores in raw.values():
            kept_R &= ~constant_rows(scores)
    if not kept_R.any():
        raise ValueError(f"[labels.calibration] kind = 'minmax': all {len(first)} rows have equal scores; check the teachers")
    return kept_R, {**dropped, "constant_scores": int((~kept_R).sum())}


def _combined(raw: Mapping[str, Scores], weights: Mapping[str, float], calibration: Calibration) -> Scores:
    """float32 [R, N]: each teacher calibrated, then the weighted mean."""
    calibrated = []
    for name, scores in raw.items():
        try:
            calibrated.append(calibrate(scores, calibration))
        except ValueError as error:
            raise ValueError(f"[labels.calibration] kind = {calibration.kind!r}, teacher {name!r}: {error}") from error
    mean_RN = weighted_mean(calibrated, list(weights.values()))
    if np.abs(mean_RN).max() > np.finfo(np.float32).max / 2:  # half: the difference of two must fit as well
        raise ValueError("[labels] combined gold_sim leave the range of float32; lower the calibration's scale or std")
    return mean_RN.astype(np.float32)


def _schema(fields: Mapping[str, Any], recipe: Recipe) -> Any:
    return table_schema(
        recipe.labels.kind,
        recipe.labels.num_negatives + 1,
        teachers=[{"identity": key_of(teacher["identity"]), "weight": teacher["weight"]} for teacher in fields["teachers"]],
        calibration=fields["calibration"],
    )


def _tables(rows: Rows, kept: NDArray[Any], gold_sim_RN: Scores, recipe: Recipe, schema: Any) -> Iterator[Any]:
    """Yield one Arrow table per shard."""
    labels_RW = gold_sim_RN if recipe.labels.kind == "score_list" else gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]
    for start in range(0, len(kept), ROWS_PER_SHARD):
        part = kept[start : start + ROWS_PER_SHARD].tolist()
        passage_ids = [passage_id for row in part for passage_id in rows.passage_ids[row]]
        labels = np.ascontiguousarray(labels_RW[start : start + ROWS_PER_SHARD]).reshape(-1)
        columns = [
            pa.array([rows.query_ids[row] for row in part], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(passage_ids, pa.string()), gold_sim_RN.shape[1]),
            pa.FixedSizeListArray.from_arrays(pa.array(labels, pa.float32()), labels_RW.shape[1]),
        ]
        yield pa.Table.from_arrays(columns, schema=schema)
