"""From banked scores of rows to one score per passage: each teacher calibrated, combined by weight, the whole rescaled.

R rows, N passages per row, positive first; NaN is a pair that a teacher has not scored. Memory: one float32 matrix [R, N] per
teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.labels.calibration import Floats, Moments, calibrate, moments, undefined_rows, weighted_mean
from sparsekd.labels.contract import Kind
from sparsekd.labels.facts import margin_facts
from sparsekd.labels.rows import GoldSim, Rows, require_known_scores, require_scores
from sparsekd.mining.shards import ROWS_PER_SHARD
from sparsekd.recipe import Calibration, Labels

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Combined:
    """One score per passage, and what it was made of."""

    gold_sim: Scores
    """float32 [kept R, N]."""
    is_kept: NDArray[np.bool_]
    """bool [R]: rows that every calibration is defined for."""
    raw: dict[str, Scores]
    """float32 [kept R, N] by teacher that labels, as scored."""


def combined_scores(rows: Rows, weights: Mapping[str, float], labels: Labels, gold_sim: GoldSim) -> Combined:
    """Combine the scores of the teachers in ``weights`` as ``labels`` says; rows that a calibration is undefined for are left out.

    Raises ValueError if the bank lacks a score that the rule for missing ones requires, no row is left, a calibration is
    undefined, or the combined scores leave the range of float32.
    """
    rule = labels.missing if len(weights) > 1 else "require"
    raw = {name: _look_up(rows, name, gold_sim, rule) for name in weights}
    if rule == "renormalize":
        _require_any_score(rows, raw)
    references = {name: _look_up(rows, name, gold_sim, rule) for name in references_of(labels, weights) if name not in raw}
    is_kept_R = _usable_rows(raw, labels)
    raw = {name: scores[is_kept_R] for name, scores in raw.items()}
    references = {name: scores[is_kept_R] for name, scores in references.items()}
    return Combined(_combined(raw, weights, labels, {**raw, **references}), is_kept_R, raw)


def calibration_of(labels: Labels, name: str) -> Calibration:
    """Return a teacher's calibration: its own, or the one of all."""
    return labels.calibrations.get(name, labels.calibration)


def references_of(labels: Labels, weights: Mapping[str, float]) -> list[str]:
    """Return the names of the teachers whose raw scores give the labelling ones, or the combined scores, mean and std."""
    acting = [*(calibration_of(labels, name) for name in weights), labels.rescale]
    return list(dict.fromkeys(each.reference for each in acting if each.reference is not None))


def summarize(gold_sim_RN: Scores, kind: Kind) -> dict[str, Any]:
    """Return the lines that catch a broken teacher: label range, margin quantiles, share of rows ranked wrongly."""
    margins_RM = gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]
    column, labels = ("margin", margins_RM) if kind == "margin" else ("gold_sim", gold_sim_RN)
    figures: dict[str, Any] = {column: score_range(labels)}
    return figures | margin_facts(gold_sim_RN) if margins_RM.size else figures


def score_range(values: Scores) -> dict[str, float]:
    """Return min, mean and max."""
    return {"min": float(values.min()), "mean": float(values.mean(dtype=np.float64)), "max": float(values.max())}


def known_range(values: Scores) -> dict[str, float]:
    """Return the same over the pairs that are scored."""
    return score_range(values[~np.isnan(values)]) if np.isnan(values).any() else score_range(values)


def _look_up(rows: Rows, teacher: str, gold_sim: GoldSim, rule: str) -> Scores:
    """float32 [R, N]: one teacher's raw scores, asked for shard by shard; NaN only where the rule allows it."""
    check = require_scores if rule == "require" else require_known_scores
    scores_RN = np.empty((len(rows.query_ids), len(rows.passage_ids[0])), dtype=np.float32)
    for start in range(0, len(scores_RN), ROWS_PER_SHARD):
        part = slice(start, start + ROWS_PER_SHARD)
        query_ids = [query_id for query_id in rows.query_ids[part] for _ in range(scores_RN.shape[1])]
        passage_ids = [passage_id for passages in rows.passage_ids[part] for passage_id in passages]
        scores = np.asarray(gold_sim(teacher, query_ids, passage_ids), dtype=np.float32)
        check(scores, teacher, query_ids, passage_ids)
        scores_RN[part] = scores.reshape(-1, scores_RN.shape[1])
    return scores_RN


def _require_any_score(rows: Rows, raw: Mapping[str, Scores]) -> None:
    """Raise ValueError unless each pair has a score by some teacher."""
    unscored_RN = np.logical_and.reduce([np.isnan(scores) for scores in raw.values()])
    if unscored_RN.any():
        row, column = (int(place) for place in np.argwhere(unscored_RN)[0])
        raise ValueError(
            f'[labels] missing = "renormalize": {int(unscored_RN.sum()):,} of {unscored_RN.size:,} pairs have no score by any of '
            f"{list(raw)} (first: query {rows.query_ids[row]!r}, passage {rows.passage_ids[row][column]!r}); score them first: "
            "make teacher-scores RECIPE=..."
        )


def _usable_rows(raw: Mapping[str, Scores], labels: Labels) -> NDArray[np.bool_]:
    """bool [R] of the rows that every teacher's calibration is defined for."""
    num_rows = len(next(iter(raw.values())))
    is_kept_R = np.ones(num_rows, dtype=bool)
    kinds = []
    for name, scores in raw.items():
        calibration = calibration_of(labels, name)
        undefined_R = undefined_rows(scores, calibration)
        if undefined_R.any():
            kinds.append(calibration.kind)
            is_kept_R &= ~undefined_R
    if not is_kept_R.any():
        shown = " and ".join(f"{kind!r}" for kind in dict.fromkeys(kinds))
        raise ValueError(f"[labels.calibration] kind = {shown}: all {num_rows} rows have equal scores; check the teachers")
    return is_kept_R


def _combined(raw: Mapping[str, Scores], weights: Mapping[str, float], labels: Labels, known: Mapping[str, Scores]) -> Scores:
    """float32 [R, N]: each teacher calibrated, the weighted mean or sum, rescaled; ``known`` holds the references too."""
    calibrated = []
    for name, scores in raw.items():
        section = f"labels.calibrations.{name}" if name in labels.calibrations else "labels.calibration"
        calibrated.append(_calibrated(scores, calibration_of(labels, name), known, section, f"teacher {name!r}"))
    combined_RN = weighted_mean(calibrated, list(weights.values()))
    if labels.combine == "sum":
        combined_RN = combined_RN * sum(weights.values())
    combined_RN = _calibrated(combined_RN, labels.rescale, known, "labels.rescale", "combined gold_sim")
    if np.abs(combined_RN).max() > np.finfo(np.float32).max / 2:  # half: the difference of two must fit as well
        raise ValueError("[labels] combined gold_sim leave the range of float32; lower the calibration's scale or std")
    return combined_RN.astype(np.float32)


def _calibrated(scores_RN: NDArray[Any], calibration: Calibration, known: Mapping[str, Scores], section: str, what: str) -> Floats:
    """float64 [R, N]; ValueError that says whose scores under which section are undefined."""
    try:
        return calibrate(scores_RN, calibration, _reference_moments(calibration, known))
    except ValueError as error:
        raise ValueError(f"[{section}] kind = {calibration.kind!r}, {what}: {error}") from error


def _reference_moments(calibration: Calibration, known: Mapping[str, Scores]) -> Moments | None:
    if calibration.reference is None:
        return None
    try:
        return moments(np.asarray(known[calibration.reference], dtype=np.float64))
    except ValueError as error:
        raise ValueError(f"reference {calibration.reference!r}: {error}") from error
