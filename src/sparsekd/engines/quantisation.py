"""What an engine keeps of a weight, and what that loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.engines.vectors import Weights

IMPACT_SCALE = 100
"""Integer impact per unit of weight, as SPLADE's own export to Anserini has it."""
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_SMALLEST_NORMAL = np.finfo(np.float32).tiny


@dataclass
class QuantisationLoss:
    """Relative errors |stored − weight| / weight over passages' weights; a weight stored as 0 is lost, its error 1."""

    num_passages: int = 0
    num_empty: int = 0
    num_weights: int = 0
    num_lost: int = 0
    _sum: float = 0.0
    _max: float = 0.0

    def add(self, weights: Weights, stored: NDArray[np.floating]) -> None:
        """Count a passage's weights, above 0, and what the engine keeps of them."""
        self.num_passages += 1
        self.num_empty += int(not stored.any())
        if not weights.size:
            return
        exact = weights.astype(np.float64)
        errors = np.abs(stored - exact) / exact
        self.num_weights += weights.size
        self.num_lost += int((stored == 0).sum())
        self._sum += float(errors.sum())
        self._max = max(self._max, float(errors.max()))

    def summary(self) -> dict[str, float | int]:
        """Return counts, the share of weights lost to 0, and mean and largest relative error, which are 0 without weights.

        An empty passage has no weight, or none that the engine keeps: nothing finds it.
        """
        count = max(1, self.num_weights)
        return {
            "passages": self.num_passages,
            "empty_passages": self.num_empty,
            "weights": self.num_weights,
            "lost_to_zero": self.num_lost / count,
            "mean_relative_error": self._sum / count,
            "max_relative_error": self._max,
        }


def as_float16(weights: Weights) -> NDArray[np.float16]:
    """Round to half precision; ValueError for a weight that it cannot hold."""
    if weights.size and weights.max() > _FLOAT16_MAX:
        raise ValueError(f"weight {weights.max():g}: the engine holds half-precision weights, at most {_FLOAT16_MAX:g}")
    return weights.astype(np.float16)


def as_impacts(weights: Weights) -> NDArray[np.int64]:
    """Return the nearest integers to 100 times the weights, halves to even; small weights become 0.

    >>> as_impacts(np.array([1.234, 0.004], dtype=np.float32)).tolist()
    [123, 0]
    """
    return np.rint(weights.astype(np.float64) * IMPACT_SCALE).astype(np.int64)


def as_feature_values(weights: Weights) -> Weights:
    """Return what Lucene's FeatureField keeps: sign, exponent and the first 8 bits of the mantissa, the others cut off.

    Its term frequency is ``floatToIntBits(value) >>> 15``. Weights below the smallest normal float32 are refused there: 0 here.

    >>> as_feature_values(np.array([1.0, 1.003, 1.0039063], dtype=np.float32)).tolist()
    [1.0, 1.0, 1.00390625]
    """
    cut = (np.ascontiguousarray(weights).view(np.uint32) >> np.uint32(15) << np.uint32(15)).view(np.float32)
    return np.where(weights < _SMALLEST_NORMAL, np.float32(0), cut)
