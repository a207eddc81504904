"""The last look at scores before they are banked: each finite, or all refused. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def require_finite(name: str, pairs: Sequence[tuple[str, str]], gold_sim_N: NDArray[np.float32], expected: str) -> None:
    """Raise ValueError unless every score is finite, naming how many are not and the first pair; ``expected`` ends the message."""
    bad = np.flatnonzero(~np.isfinite(gold_sim_N))
    if len(bad):
        query, passage = pairs[bad[0]]
        raise ValueError(
            f"teacher {name!r}: {len(bad)} of {len(pairs)} scores are not finite (first: pair {bad[0]}, {query[:80]!r} with "
            f"{passage[:80]!r}, {gold_sim_N[bad[0]]}); expected {expected}"
        )
