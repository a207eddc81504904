"""From banked scores of rows to one score per passage: each teacher calibrated, then the weighted mean.

R rows, N passages per row, positive first. Memory: one float32 matrix [R, N] per teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.labels.calibration import calibrate, constant_rows, weighted_mean
from sparsekd.labels.contract import Kind
from sparsekd.labels.rows import GoldSim, Rows, require_scores
from sparsekd.mining.shards import ROWS_PER_SHARD
from sparsekd.recipe import Calibration

Scores = NDArray[np.float32]


def combined_scores(
    rows: Rows, weights: Mapping[str, float], calibration: Calibration, gold_sim: GoldSim
) -> tuple[Scores, NDArray[np.bool_], dict[str, Scores]]:
    """Return the combined float32 [kept R, N], bool [R] of the rows kept, and each teacher's raw scores of those.

    Rows that the calibration is undefined for are left out. Raises ValueError if the bank lacks a score, no row is left, or
    the combined scores leave the range of float32.
    """
    raw = {name: _look_up(rows, name, gold_sim) for name in weights}
    is_kept_R = _usable_rows(raw, calibration)
    raw = {name: scores[is_kept_R] for name, scores in raw.items()}
    return _combined(raw, weights, calibration), is_kept_R, raw


def summarize(gold_sim_RN: Scores, kind: Kind) -> dict[str, Any]:
    """Return the lines that catch a broken teacher: label range, margin quantiles, share of rows ranked wrongly."""
    margins_RM = gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]
    column, labels = ("margin", margins_RM) if kind == "margin" else ("gold_sim", gold_sim_RN)
    figures: dict[str, Any] = {column: score_range(labels)}
    if margins_RM.size:
        quantiles = np.quantile(margins_RM.astype(np.float64), [0.01, 0.10, 0.50, 0.90, 0.99])
        figures["margin_quantiles"] = dict(zip(("p1", "p10", "p50", "p90", "p99"), quantiles.tolist(), strict=True))
        figures["share_positive_below_best_negative"] = float((margins_RM < 0).any(axis=1).mean())
    return figures


def score_range(values: Scores) -> dict[str, float]:
    """Return min, mean and max."""
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


def _usable_rows(raw: Mapping[str, Scores], calibration: Calibration) -> NDArray[np.bool_]:
    """bool [R] of the rows the calibration is defined for."""
    first = next(iter(raw.values()))
    is_kept_R = np.ones(len(first), dtype=bool)
    if calibration.kind == "minmax":
        for scores in raw.values():
            is_kept_R &= ~constant_rows(scores)
    if not is_kept_R.any():
        raise ValueError(f"[labels.calibration] kind = 'minmax': all {len(first)} rows have equal scores; check the teachers")
    return is_kept_R


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
