"""Which of a query's kept candidates become its negatives: the top of each miner, a random draw, or a draw over the score range.

Every draw is seeded per query id, so that the negatives of a query depend on that query alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.candidates import CandidateRow
from sparsekd.mining.selection import query_generator
from sparsekd.recipe import Labels


def choose_negatives(row: CandidateRow, kept: Sequence[int], labels: Labels, gold_sim: Sequence[float] | None = None) -> list[str]:
    """Return ``num_negatives`` passage_ids of the candidates at places ``kept``, or all of them where there are fewer.

    ``gold_sim`` aligns with ``kept``: the raw scores that ``stratified`` spreads over. All positives of a query share the result.
    """
    number = min(labels.num_negatives, len(kept))
    if labels.selection == "top":
        order = _interleaved(row, kept)
    else:
        draws = query_generator(labels.seed, row.query_id).random(len(kept))
        if labels.selection == "random":
            places = np.argsort(draws, kind="stable").tolist()
        else:
            assert gold_sim is not None
            places = stratified(np.asarray(gold_sim, dtype=np.float64), draws, number)
        order = [kept[place] for place in places]
    return [row.passage_ids[place] for place in order[:number]]


def stratified(gold_sim_K: NDArray[np.float64], draws_K: NDArray[np.float64], number: int) -> list[int]:
    """Return ``number`` places of ``gold_sim_K`` that cover its range evenly, highest band first; each place once.

    The range is cut into ``number`` bands of equal width, and each gives the member of smallest draw. A band without members
    takes what is nearest to its centre of all that is left, so that a skewed distribution still gives ``number``. Without a
    range the draws decide. After arXiv 2604.04734, which covers the teacher's whole score range instead of its top.

    >>> stratified(np.array([9.0, 8.8, 8.6, 5.0, 1.0]), np.array([0.2, 0.1, 0.3, 0.4, 0.5]), 3)
    [1, 3, 4]
    """
    by_draw = np.argsort(draws_K, kind="stable")
    high, low = (float(gold_sim_K.max()), float(gold_sim_K.min())) if len(gold_sim_K) else (0.0, 0.0)
    if number == 0 or not high > low:
        return list(by_draw[:number].tolist())
    width = (high - low) / number
    band_K = np.minimum(((high - gold_sim_K) / width).astype(np.int64), number - 1)
    place_by_band: dict[int, int] = {}
    for place in by_draw.tolist():
        place_by_band.setdefault(int(band_K[place]), place)
    is_left_K = np.ones(len(gold_sim_K), dtype=np.bool_)
    is_left_K[list(place_by_band.values())] = False
    for band in range(number):
        if band not in place_by_band:
            distance_K = np.where(is_left_K, np.abs(gold_sim_K - (high - (band + 0.5) * width)), np.inf)
            nearest = int(by_draw[np.argmin(distance_K[by_draw])])  # of equally near ones, that of smallest draw
            place_by_band[band] = nearest
            is_left_K[nearest] = False
    return [place_by_band[band] for band in range(number)]


def _interleaved(row: CandidateRow, kept: Sequence[int]) -> list[int]:
    """Places by rank, the miners taking turns."""
    by_miner: dict[str, list[int]] = {}
    for place in kept:  # candidates lie miner by miner, in recipe order, each in rank order
        by_miner.setdefault(row.miner[place], []).append(place)
    return [place for places in zip_longest(*by_miner.values()) for place in places if place is not None]
