"""Calibration: views over one teacher's raw scores, as pure functions of float arrays.

``raw``, ``zscore``, ``affine`` and ``percentile`` keep how confident a teacher is between queries; ``minmax`` and ``rank`` throw
it away and invent contrast on easy and hopeless queries alike. Computes in float64; nothing here reads or writes the bank.
NaN is a pair that the teacher has not scored: it stays NaN and enters no statistic. R rows, N passages per row, positive first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.recipe import Calibration

Floats = NDArray[np.float64]
Moments = tuple[float, float]
"""Mean and population standard deviation."""


def calibrate(gold_sim_RN: NDArray[Any], calibration: Calibration, reference: Moments | None = None) -> Floats:
    """Return float64 [R, N], one teacher's scores under ``calibration``.

    Statistics of zscore and affine are the mean and the population standard deviation over all R x N scores given, those of
    percentile over the R positives. ``reference``, where given, takes the place of affine's stated mean and std.
    Raises ValueError where a formula divides by zero.
    """
    scores = np.asarray(gold_sim_RN, dtype=np.float64)
    if calibration.kind == "zscore":
        return zscore(scores, calibration.scale)
    if calibration.kind == "minmax":
        return minmax(scores, calibration.scale)
    if calibration.kind == "affine":
        return affine(scores, *(reference or (calibration.mean, calibration.std)))
    if calibration.kind == "rank":
        return rank(scores, calibration.scale)
    if calibration.kind == "percentile":
        return percentile(scores, calibration.scale)
    return scores


def moments(gold_sim_RN: Floats) -> Moments:
    """Return mean and population standard deviation over all scores given; ValueError where all are equal.

    >>> moments(np.array([[1.0, 3.0, np.nan]]))
    (2.0, 1.0)
    """
    known = _known(gold_sim_RN)
    if not known.size:
        raise ValueError(f"the teacher has scored none of {gold_sim_RN.size} pairs; score them first")
    if known.min() == known.max():  # not std > 0: rounding gives equal scores a spread of 1e-17
        raise ValueError(
            f"all {known.size} scores of the teacher equal {known.flat[0]:g}, so their standard deviation is 0; "
            "check the teacher, its prompts and its max_length"
        )
    return float(known.mean()), float(known.std())


def zscore(gold_sim_RN: Floats, scale: float) -> Floats:
    """Return scale · (x − mean) / std over all scores given; ValueError where all are equal.

    >>> zscore(np.array([[1.0, 3.0]]), 2.0).tolist()
    [[-2.0, 2.0]]
    """
    mean, std = moments(gold_sim_RN)
    scores: Floats = (gold_sim_RN - mean) * (scale / std)
    return scores


def affine(gold_sim_RN: Floats, mean: float, std: float) -> Floats:
    """Return the scores moved to the reference ``mean`` and ``std`` (SPLADE-v3, arXiv 2403.06789, rescores so).

    >>> affine(np.array([[1.0, 3.0]]), 10.0, 5.0).tolist()
    [[5.0, 15.0]]
    """
    return mean + zscore(gold_sim_RN, std)


def minmax(gold_sim_RN: Floats, scale: float) -> Floats:
    """Return scale · (x − row minimum) / (row maximum − row minimum); ValueError for a row without a range.

    OpenSearch (arXiv 2411.04403) takes scale 30: at scale 1 and temperature 1 a softmax spans e : 1 at most.

    >>> minmax(np.array([[4.0, 0.0, 1.0]]), 30.0).tolist()
    [[30.0, 0.0, 7.5]]
    """
    constant = constant_rows(gold_sim_RN)
    if constant.any():
        raise ValueError(f"{constant.sum()} of {len(gold_sim_RN)} rows have equal scores, for which minmax is undefined")
    low_R, high_R = _row_range(gold_sim_RN)
    shares_RN: Floats = (gold_sim_RN - low_R[:, None]) / (high_R - low_R)[:, None]
    return scale * shares_RN


def rank(gold_sim_RN: Floats, scale: float) -> Floats:
    """Return scale · (passages of the row below + half of the others that tie) / (passages − 1); ValueError for a lone score.

    The row's best gets ``scale``, its worst 0, equal scores the mean of their places, so a row of equal scores is scale / 2
    throughout. That is (average rank − 1) / (n − 1) over the n passages of the row that the teacher has scored.

    >>> rank(np.array([[7.0, 9.0, 1.0, 7.0]]), 3.0).tolist()
    [[1.5, 3.0, 0.0, 1.5]]
    """
    from scipy.stats import rankdata

    lone = lone_rows(gold_sim_RN)
    if lone.any():
        raise ValueError(f"{lone.sum()} of {len(gold_sim_RN)} rows have one score only, for which rank is undefined")
    is_known_RN = ~np.isnan(gold_sim_RN)
    ranks_RN = rankdata(np.where(is_known_RN, gold_sim_RN, np.inf), axis=1)  # unscored behind all that are scored
    others_R1 = is_known_RN.sum(axis=1, keepdims=True) - 1
    shares_RN: Floats = np.where(is_known_RN, scale * ((ranks_RN - 1) / others_R1), np.nan)
    return shares_RN


def percentile(gold_sim_RN: Floats, scale: float) -> Floats:
    """Return scale · F(x), F the empirical distribution of the R positives' scores: the share of positives with a score ≤ x.

    Takes at most R + 1 values: below the weakest positive everything is 0, from the best on ``scale``.

    >>> percentile(np.array([[2.0, 1.0], [4.0, 3.0]]), 10.0).tolist()
    [[5.0, 0.0], [10.0, 5.0]]
    """
    positives = np.sort(_known(gold_sim_RN[:, 0]))
    if not positives.size:
        raise ValueError(f"the teacher has scored none of {len(gold_sim_RN)} positives, for which percentile is undefined")
    counts_RN = np.searchsorted(positives, gold_sim_RN, side="right")
    shares_RN: Floats = np.where(np.isnan(gold_sim_RN), np.nan, scale * (counts_RN / positives.size))
    return shares_RN


def constant_rows(gold_sim_RN: NDArray[Any]) -> NDArray[np.bool_]:
    """Return bool [R]: rows whose scores are all equal, which minmax cannot place; the caller drops and counts them."""
    low_R, high_R = _row_range(gold_sim_RN)
    constant: NDArray[np.bool_] = low_R == high_R
    return constant


def lone_rows(gold_sim_RN: NDArray[Any]) -> NDArray[np.bool_]:
    """Return bool [R]: rows of one score only, which rank cannot place; the caller drops and counts them."""
    lone: NDArray[np.bool_] = (~np.isnan(gold_sim_RN)).sum(axis=1) == 1
    return lone


def undefined_rows(gold_sim_RN: NDArray[Any], calibration: Calibration) -> NDArray[np.bool_]:
    """Return bool [R]: rows that ``calibration`` cannot place. A row without any score is none of them: it stays NaN."""
    if calibration.kind == "minmax":
        return constant_rows(gold_sim_RN)
    if calibration.kind == "rank":
        return lone_rows(gold_sim_RN)
    return np.zeros(len(gold_sim_RN), dtype=bool)


def weighted_mean(scores: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Return the ensemble's float64 [R, N]: sum of weight · scores, divided by the sum of the weights.

    Where a teacher has no score, both sums run over those that have: the others' weights are renormalized. ValueError where
    none has. Equal weights on raw logits of three cross-encoders are the teacher "T2" of Hofstätter et al. 2020 (arXiv 2010.02666).

    >>> weighted_mean([np.array([[2.0, 4.0]]), np.array([[10.0, np.nan]])], [3.0, 1.0]).tolist()
    [[4.0, 4.0]]
    """
    total = sum(weights)
    is_known = [~np.isnan(part) for part in scores]
    if all(known.all() for known in is_known):
        mean = np.zeros_like(scores[0])
        for part, weight in zip(scores, weights, strict=True):
            mean += weight / total * part
        return mean
    shares, sums = np.zeros_like(scores[0]), np.zeros_like(scores[0])
    for part, known, weight in zip(scores, is_known, weights, strict=True):
        shares += np.where(known, weight / total, 0.0)
        sums += np.where(known, weight / total * part, 0.0)
    if not shares.all():
        raise ValueError(f"{(shares == 0).sum()} of {shares.size} pairs have no score by any teacher; score them first")
    return sums / shares


def effective_calibration(calibration: Calibration, identity_keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the settings that act: a scale under ``raw`` changes no score and so no key.

    A reference is named by its key in ``identity_keys``, by teacher name.

    >>> effective_calibration(Calibration(kind="minmax", scale=30.0))
    {'kind': 'minmax', 'scale': 30.0}
    """
    if calibration.kind == "affine" and calibration.reference is not None:
        return {"kind": "affine", "reference": (identity_keys or {})[calibration.reference]}
    acting = {"raw": (), "affine": ("mean", "std")}.get(calibration.kind, ("scale",))
    return {"kind": calibration.kind, **{name: getattr(calibration, name) for name in acting}}


def _known(scores: Floats) -> Floats:
    """The scores without NaN; the array itself where there is none, so that sums keep their order and so their rounding."""
    is_known = ~np.isnan(scores)
    return scores if is_known.all() else scores[is_known]


def _row_range(gold_sim_RN: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lowest and highest score [R] of each row; infinity and its negative where there is none."""
    is_unknown_RN = np.isnan(gold_sim_RN)
    low_R = np.where(is_unknown_RN, np.inf, gold_sim_RN).min(axis=1)
    high_R = np.where(is_unknown_RN, -np.inf, gold_sim_RN).max(axis=1)
    return low_R, high_R


def softmax_entropy(gold_sim_BN: NDArray[Any], temperature: float) -> tuple[float, float]:
    """Return how flat KL's targets are: the mean over rows of the entropy H in nats, and of the support exp(H) in 1..N.

    Near log N the teacher teaches nothing, near 0 only its first choice. softmax over the row of x / temperature.

    >>> round(softmax_entropy(np.zeros((1, 4)), 1.0)[1], 6)
    4.0
    """
    logits = np.asarray(gold_sim_BN, dtype=np.float64) / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = np.exp(logits) / total
    entropy = np.log(total[:, 0]) - (probabilities * logits).sum(axis=1)
    return float(entropy.mean()), float(np.exp(entropy).mean())
