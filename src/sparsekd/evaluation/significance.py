"""How sure a mean over queries is: bootstrap intervals, and a paired test of two systems on the same queries.

Q queries, K columns (a system's values, or two systems' differences), B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
"""The standard error of a p-value near .05 is then .002."""
LEVEL = 0.95
_BLOCK = 1 << 22  # resampled queries at once: 34 MB of float64


@dataclass(frozen=True)
class Estimate:
    """A mean over queries, its 95 % interval, and the p-value of a true mean of 0."""

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether the p-value is below .05."""
        return self.p_value < 1 - LEVEL


def bootstrap(values_QK: NDArray[np.float64], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> list[Estimate]:
    """Return the mean of each column with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    For the paired comparison of two systems a column holds the differences of their values query by query: queries are drawn with
    replacement, all columns' values together. The p-value is two-sided for a mean of 0: the share of resampled means that lie at
    least as far from the observed mean as that lies from 0 (Sakai 2006, SIGIR, "Evaluating evaluation metrics based on the
    bootstrap", with the difference itself as the statistic). It is not corrected for the number of comparisons. Raises ValueError
    without a query.

    >>> bootstrap(np.array([[0.5], [0.5], [0.5]]))
    [Estimate(mean=0.5, low=0.5, high=0.5, p_value=0.0)]
    """
    num_queries, num_columns = values_QK.shape
    if not num_queries:
        raise ValueError("bootstrap: no query; expected at least one")
    rng, step = np.random.default_rng(seed), max(1, _BLOCK // num_queries)
    means_BK = np.concatenate(
        [_resampled_means(values_QK, min(step, num_resamples - start), rng) for start in range(0, num_resamples, step)]
    )
    return [_estimate(values_QK[:, column], means_BK[:, column]) for column in range(num_columns)]


def _resampled_means(values_QK: NDArray[np.float64], rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
    num_queries = len(values_QK)
    drawn = rng.integers(num_queries, size=(rows, num_queries)) + np.arange(rows)[:, None] * num_queries
    times_drawn = np.bincount(drawn.ravel(), minlength=rows * num_queries).reshape(rows, num_queries)
    means: NDArray[np.float64] = times_drawn.astype(np.float64) @ values_QK / num_queries
    return means


def _estimate(values_Q: NDArray[np.float64], means_B: NDArray[np.float64]) -> Estimate:
    mean = float(np.mean(values_Q))
    if np.ptp(values_Q) == 0:
        return Estimate(mean, mean, mean, 0.0 if mean else 1.0)
    low, high = np.quantile(means_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    # A sum of the same floats in another order may differ in its last bits; a tie counts as reached.
    is_as_far = np.abs(means_B - mean) >= abs(mean) * (1 - 1e-9)
    return Estimate(mean, low, high, float(np.mean(is_as_far)))
