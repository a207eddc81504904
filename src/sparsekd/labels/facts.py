"""The score doctor's facts, as pure functions of arrays and counts: what would show a broken teacher or a wrong scale.

Every fact is over the pairs that are scored; NaN is a pair that the teacher has not scored, and is counted.
P distinct pairs, R rows, N passages per row, positive first, M = N−1 negatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.labels.agreement import kendall_tau
from sparsekd.labels.calibration import constant_rows

_LEVELS = {"p1": 0.01, "p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99}


def quantiles(values: NDArray[Any]) -> dict[str, float] | None:
    """Return p1, p10, p50, p90 and p99, linear between neighbours; None without a value.

    >>> quantiles(np.array([0.0, 10.0]))
    {'p1': 0.1, 'p10': 1.0, 'p50': 5.0, 'p90': 9.0, 'p99': 9.9}
    """
    known = np.asarray(values, dtype=np.float64).reshape(-1)
    known = known[~np.isnan(known)]
    if not known.size:
        return None
    return dict(zip(_LEVELS, np.quantile(known, list(_LEVELS.values())).tolist(), strict=True))


def margin_facts(gold_sim_RN: NDArray[Any]) -> dict[str, Any]:
    """Return quantiles of gold_sim(positive) − gold_sim(negative) and the share of rows whose positive is below a negative.

    >>> margin_facts(np.array([[3.0, 1.0], [2.0, 4.0]]))["share_positive_below_best_negative"]
    0.5
    """
    margins_RM = gold_sim_RN[:, :1] - gold_sim_RN[:, 1:]
    has_margin_R = (~np.isnan(margins_RM)).any(axis=1)
    below_R = (margins_RM[has_margin_R] < 0).any(axis=1)
    return {
        "margin_quantiles": quantiles(margins_RM),
        "share_positive_below_best_negative": float(below_R.mean()) if below_R.size else None,
    }


def teacher_facts(gold_sim_P: NDArray[Any], gold_sim_RN: NDArray[Any]) -> dict[str, Any]:
    """Return range, quantiles and saturation over pairs, constant rows and margins over rows, of one teacher's raw scores.

    Saturation is the share of pairs at the lowest and at the highest score, and how many values there are: a sigmoid in float16
    is exactly 1 from logit 8 on, a clipped teacher piles up at one end, a broken one has a single value.
    """
    known = np.asarray(gold_sim_P, dtype=np.float64)
    known = known[~np.isnan(known)]
    facts: dict[str, Any] = {"pairs": int(known.size), "unscored": int(gold_sim_P.size - known.size)}
    if not known.size:
        return facts
    low, high = float(known.min()), float(known.max())
    return {
        **facts,
        "range": {"min": low, "mean": float(known.mean()), "max": high, "std": float(known.std())},
        "quantiles": quantiles(known),
        "saturation": {
            "share_at_min": float((known == low).mean()),
            "share_at_max": float((known == high).mean()),
            "distinct_values": len(np.unique(known)),
        },
        "constant_rows": int(constant_rows(gold_sim_RN).sum()),
        **margin_facts(gold_sim_RN),
    }


def agreement_facts(first_P: NDArray[Any], second_P: NDArray[Any], sizes: Sequence[int]) -> dict[str, Any]:
    """Return mean and quantiles over queries of Kendall's tau-b between two teachers; pairs lie query by query, ``sizes`` each.

    Queries of which either teacher ties all passages have no tau and are counted as undefined.
    """
    size_Q = np.asarray(sizes, dtype=np.int64)
    start_Q = np.concatenate(([0], np.cumsum(size_Q)))[:-1]
    tau_Q = np.full(len(size_Q), np.nan)
    for size in np.unique(size_Q).tolist():
        at = np.flatnonzero(size_Q == size)
        places_QN = start_Q[at][:, None] + np.arange(size)
        tau_Q[at] = kendall_tau(np.asarray(first_P)[places_QN], np.asarray(second_P)[places_QN])
    known = tau_Q[~np.isnan(tau_Q)]
    return {
        "queries": int(known.size),
        "queries_undefined": int(tau_Q.size - known.size),
        "kendall_tau": {"mean": float(known.mean()), **(quantiles(known) or {})} if known.size else None,
    }


def dropped_facts(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mining, the filter by a teacher and the making of rows have left out, each as a count and a share.

    Shares are of the miners' proposals, of the candidates they left, and of the rows there might have been; None of nothing.
    """
    mining, rows_dropped = dict(counts.get("mining", {})), dict(counts.get("rows_dropped", {}))
    by_teacher, rows = int(counts.get("candidates_dropped_filter", 0)), int(counts.get("rows", 0))
    proposed = mining.get("proposed", 0)
    return {
        "mining": {name: _part(value, proposed) for name, value in mining.items() if name.startswith("dropped_")},
        "filter_by_teacher": _part(by_teacher, mining.get("kept", 0)),
        "rows": {name: _part(value, rows + sum(rows_dropped.values())) for name, value in rows_dropped.items()},
    }


def _part(count: int, whole: int) -> dict[str, Any]:
    return {"count": int(count), "share": count / whole if whole else None}
