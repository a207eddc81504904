"""Calibration: views over one teacher's raw scores, as pure functions of float arrays.

``raw``, ``zscore`` and ``affine`` keep how confident a teacher is between queries; ``minmax`` throws it away and invents
contrast on easy and hopeless queries alike. Computes in float64; nothing here reads or writes the bank.
R rows, N passages per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.recipe import Calibration

Floats = NDArray[np.float64]


def calibrate(gold_sim_RN: NDArray[Any], calibration: Calibration) -> Floats:
    """Return float64 [R, N], one teacher's scores under ``calibration``.

    Statistics of zscore and affine are the mean and the population standard deviation over all R x N scores given.
    Raises ValueError where a formula divides by zero.
    """
    scores = np.asarray(gold_sim_RN, dtype=np.float64)
    if calibration.kind == "zscore":
        return zscore(scores, calibration.scale)
    if calibration.kind == "minmax":
        return minmax(scores, calibration.scale)
    if calibration.kind == "affine":
        return affine(scores, calibration.mean, calibration.std)
    return scores


def zscore(gold_sim_RN: Floats, scale: float) -> Floats:
    """Return scale · (x − mean) / std over all scores given.

    >>> zscore(np.array([[1.0, 3.0]]), 2.0).tolist()
    [[-2.0, 2.0]]
    """
    std = gold_sim_RN.std()
    if not std > 0:
        raise ValueError(
            f"all {gold_sim_RN.size} scores of the teacher equal {gold_sim_RN.flat[0]:g}, so their standard deviation is 0; "
            "check the teacher, its prompts and its max_length"
        )
    centred: Floats = gold_sim_RN - gold_sim_RN.mean()
    return centred * float(scale / std)


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
    low: Floats = gold_sim_RN.min(axis=1, keepdims=True)
    high: Floats = gold_sim_RN.max(axis=1, keepdims=True)
    return scale * ((gold_sim_RN - low) / (high - low))


def constant_rows(gold_sim_RN: NDArray[Any]) -> NDArray[np.bool_]:
    """Return bool [R]: rows whose scores are all equal, which minmax cannot place; the caller drops and counts them."""
    constant: NDArray[np.bool_] = gold_sim_RN.max(axis=1) == gold_sim_RN.min(axis=1)
    return constant


def weighted_mean(scores: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Return the ensemble's float64 [R, N]: sum of weight · scores, divided by the sum of the weights."""
    total = sum(weights)
    mean = np.zeros_like(scores[0])
    for part, weight in zip(scores, weights, strict=True):
        mean += weight / total * part
    return mean


def effective_calibration(calibration: Calibration) -> dict[str, Any]:
    """Return the settings that act: a scale under ``raw`` changes no score and so no key.

    >>> effective_calibration(Calibration(kind="minmax", scale=30.0))
    {'kind': 'minmax', 'scale': 30.0}
    """
    acting = {"raw": (), "zscore": ("scale",), "minmax": ("scale",), "affine": ("mean", "std")}[calibration.kind]
    return {"kind": calibration.kind, **{name: getattr(calibration, name) for name in acting}}


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
