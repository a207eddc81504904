"""Mining policy on ranked lists, free of search, texts on disk and artifacts: which proposals become candidates.

Miners are asked in order. From each ranked list are taken out, in this order: the leading ``skip`` ranks, judged positives,
passages whose text equals a positive's or nearly does, passages an earlier miner contributed or filtered, passages whose text
equals a kept candidate's, and likely false negatives; the rest fills the quota in rank order. Every proposal ends as kept or
under exactly one reason of ``REASONS``. The rows of a query depend on that query alone, and on ceilings that come from outside.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.near_duplicates import NearDuplicates
from sparsekd.recipe import NegativeFilter

REASONS = (
    "dropped_skipped_rank",
    "dropped_positive",
    "dropped_positive_text",
    "dropped_near_duplicate",
    "dropped_duplicate_candidate",
    "dropped_duplicate_text",
    "dropped_filter",
    "dropped_over_quota",
)


@dataclass(frozen=True)
class Proposal:
    """What one miner returned for one query, best first."""

    miner: str
    quota: int
    skip: int
    passage_ids: Sequence[str]
    scores: Sequence[float]
    ceiling: float
    """Candidates scoring above it are likely false negatives; infinity keeps all."""
    is_fallback: bool = False
    """Contributes only what the quotas of the proposals before it left unfilled."""


@dataclass(frozen=True)
class Candidate:
    """A kept proposal; rank 1 is the miner's best."""

    passage_id: str
    miner: str
    score: float
    rank: int


def ceiling_of(weakest_positive: float, negative_filter: NegativeFilter, limit: float = float("inf")) -> float:
    """Return the score above which a candidate is dropped, given the score of the query's weakest positive.

    The lowest of positive − absolute_margin, positive − relative_margin · |positive| and ``limit``, the score at the filter's
    percentile (``percentile_limit``); infinity where none is set.

    >>> ceiling_of(-4.0, NegativeFilter(relative_margin=0.5))
    -6.0
    """
    ceilings = [limit]
    if negative_filter.absolute_margin is not None:
        ceilings.append(weakest_positive - negative_filter.absolute_margin)
    if negative_filter.relative_margin is not None:
        ceilings.append(weakest_positive - negative_filter.relative_margin * abs(weakest_positive))
    return min(ceilings)


def percentile_limit(positive_scores: NDArray[np.float32], negative_filter: NegativeFilter) -> float:
    """Return the score at the filter's percentile of all positives' scores [n], linear between ranks; infinity without any."""
    if negative_filter.percentile is None or not len(positive_scores):
        return float("inf")
    return float(np.percentile(positive_scores.astype(np.float64), negative_filter.percentile))


def filter_fields(negative_filter: NegativeFilter) -> dict[str, Any]:
    """Return what of the filter acts on scores, for keys; margins always, as they have always been, the rest where it is set."""
    margins = ("absolute_margin", "relative_margin")
    return {
        name: value for name, value in _score_settings(negative_filter).items() if name in margins or value is not None
    }


def query_generator(seed: int, query_id: str) -> np.random.Generator:
    """Return the generator of one query's draws: another query, more of them or their order change nothing in it."""
    digest = hashlib.sha256(f"{seed}\0{query_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def select_candidates(
    proposals: Sequence[Proposal], positive_ids: Collection[str], texts: Mapping[str, str], *, near_duplicate: float | None = None
) -> tuple[list[Candidate], Counter[str]]:
    """Return one query's candidates, miner by miner in rank order, and counts: proposed, kept, every reason, and
    of the kept ones those that the fallback filled in.

    ``positive_ids`` are all judged positives, also those not scored; ``texts`` maps every proposed passage_id and positive;
    ``near_duplicate`` is the filter's.
    """
    positives = frozenset(positive_ids)
    positive_texts = {texts[passage_id] for passage_id in positives}
    near = None if near_duplicate is None else NearDuplicates(positive_texts, near_duplicate)
    kept: list[Candidate] = []
    seen_ids: set[str] = set()
    kept_texts: set[str] = set()
    counts: Counter[str] = Counter()
    wanted = sum(proposal.quota for proposal in proposals if not proposal.is_fallback)
    for proposal in proposals:
        room = min(proposal.quota, wanted - len(kept)) if proposal.is_fallback else proposal.quota
        num_before = len(kept)
        counts["dropped_skipped_rank"] += min(proposal.skip, len(proposal.passage_ids))
        for position in range(proposal.skip, len(proposal.passage_ids)):
            passage_id = proposal.passage_ids[position]
            text = texts[passage_id]
            if passage_id in positives:
                counts["dropped_positive"] += 1
            elif text in positive_texts:
                counts["dropped_positive_text"] += 1
            elif near is not None and near.matches(text):
                counts["dropped_near_duplicate"] += 1
            elif passage_id in seen_ids:
                counts["dropped_duplicate_candidate"] += 1
            elif text in kept_texts:
                counts["dropped_duplicate_text"] += 1
            elif proposal.scores[position] > proposal.ceiling:
                seen_ids.add(passage_id)  # the first miner to propose it decides: a later one cannot bring it back
                counts["dropped_filter"] += 1
            elif room == 0:
                counts["dropped_over_quota"] += 1
            else:
                kept.append(Candidate(passage_id, proposal.miner, float(proposal.scores[position]), position + 1))
                seen_ids.add(passage_id)
                kept_texts.add(text)
                room -= 1
        counts["kept"] += len(kept) - num_before
        counts["proposed"] += len(proposal.passage_ids)
        if proposal.is_fallback:
            counts["filled_by_fallback"] += len(kept) - num_before
    return kept, counts


def _score_settings(negative_filter: NegativeFilter) -> dict[str, float | None]:
    return negative_filter.model_dump(include={"absolute_margin", "relative_margin", "percentile", "min_positive"})
