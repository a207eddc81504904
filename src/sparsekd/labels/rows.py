"""Which rows a table has: one per (query, positive), with the negatives that filter and selection leave.

Rows are chosen before any label is looked up, so that the pairs a teacher must have scored are known (``Rows.pairs``) and no
others are asked for; only a filter by a teacher looks at that teacher's scores of every candidate (``filter_pairs``).
The rows of a query depend on that query alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.candidates import CandidateRow
from sparsekd.mining.selection import ceiling_of, has_margin
from sparsekd.recipe import Labels, NegativeFilter, Recipe

GoldSim = Callable[[str, Sequence[str], Sequence[str]], NDArray[np.float32]]
"""(teacher name, query_ids, passage_ids) -> float32 [n]: raw scores of aligned pairs, NaN where the bank has none."""

_QUERY_BLOCK = 4096


@dataclass(frozen=True)
class Rows:
    """The rows of a table before labels: query_ids [R], passage_ids [R][N] positive first, and what was left out."""

    query_ids: list[str]
    passage_ids: list[list[str]]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    candidates_dropped_filter: int
    """Candidates the filter by a teacher took out."""

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return aligned query_ids and passage_ids, each pair once: what every weighted teacher must have scored."""
        pairs = chain.from_iterable(
            ((query_id, passage_id) for passage_id in passages)
            for query_id, passages in zip(self.query_ids, self.passage_ids, strict=True)
        )
        return _aligned(dict.fromkeys(pairs))


def filtering_teacher(recipe: Recipe) -> str | None:
    """Return the name of the teacher whose scores filter candidates, None if miners filter or nothing does."""
    negative_filter = recipe.mining.filter
    return negative_filter.by if negative_filter.by != "miner" and has_margin(negative_filter) else None


def filter_pairs(candidates: Iterable[CandidateRow]) -> tuple[list[str], list[str]]:
    """Return aligned query_ids and passage_ids of every positive and candidate: what a filtering teacher must have scored."""
    return _aligned(_pairs_of(candidates))


def choose_rows(recipe: Recipe, candidates: Iterable[CandidateRow], gold_sim: GoldSim | None = None) -> Rows:
    """Return the table's rows, in the order of ``candidates`` and their positives.

    With ``filtering_teacher``, ``gold_sim`` must know its scores of ``filter_pairs``; a candidate scoring above the ceiling set
    by the query's weakest scored positive is left out. A row with fewer than ``num_negatives`` is dropped and counted.
    Raises ValueError if a score is missing or no row is left.
    """
    labels, teacher = recipe.labels, filtering_teacher(recipe)
    query_ids: list[str] = []
    passage_ids: list[list[str]] = []
    dropped: Counter[str] = Counter(too_few_negatives=0)
    num_filtered = 0
    for block in _blocks(candidates):
        scores = _scores_by_pair(block, teacher, gold_sim) if teacher else None
        for row in block:
            kept = list(range(len(row.passage_ids)))
            if scores is not None:
                kept = _kept_by_teacher(row, scores, recipe.mining.filter)
                num_filtered += len(row.passage_ids) - len(kept)
            negatives = _negatives(row, kept, labels)
            if len(negatives) < labels.num_negatives:
                dropped["too_few_negatives"] += len(row.positive_ids)
                continue
            for positive_id in row.positive_ids:
                query_ids.append(row.query_id)
                passage_ids.append([positive_id, *negatives])
    if not query_ids:
        raise ValueError(
            f"[labels] num_negatives = {labels.num_negatives}: none of {dropped.total()} rows has as many candidates left "
            f"({num_filtered} candidates filtered); lower num_negatives, raise the miners' quota or loosen [mining.filter]"
        )
    return Rows(query_ids, passage_ids, dict(dropped), num_filtered)


def require_scores(scores: NDArray[np.float32], teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> None:
    """Raise ValueError, naming how many and the first, unless every score is a finite number."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        first = int(bad[0])
        raise ValueError(
            f"score bank: {bad.size:,} of {len(scores):,} pairs have no finite gold_sim by teacher {teacher!r} (first: query "
            f"{query_ids[first]!r}, passage {passage_ids[first]!r}); score them first: make teacher-scores RECIPE=..."
        )


def require_known_scores(
    scores: NDArray[np.float32], teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]
) -> None:
    """Raise ValueError, naming how many and the first, if a score is infinite; NaN is a pair not scored."""
    bad = np.flatnonzero(np.isinf(scores))
    if bad.size:
        first = int(bad[0])
        raise ValueError(
            f"score bank: {bad.size:,} of {len(scores):,} gold_sim by teacher {teacher!r} are infinite (first: query "
            f"{query_ids[first]!r}, passage {passage_ids[first]!r}); expected finite numbers, or none; check the teacher"
        )


def _blocks(candidates: Iterable[CandidateRow]) -> Iterator[list[CandidateRow]]:
    rows = iter(candidates)
    while block := list(islice(rows, _QUERY_BLOCK)):
        yield block


def _pairs_of(rows: Iterable[CandidateRow]) -> Iterator[tuple[str, str]]:
    for row in rows:
        for passage_id in chain(row.positive_ids, row.passage_ids):
            yield row.query_id, passage_id


def _aligned(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    query_ids, passage_ids = [], []
    for query_id, passage_id in pairs:
        query_ids.append(query_id)
        passage_ids.append(passage_id)
    return query_ids, passage_ids


def _scores_by_pair(block: Sequence[CandidateRow], teacher: str, gold_sim: GoldSim | None) -> dict[tuple[str, str], float]:
    if gold_sim is None:
        raise ValueError(f"[mining.filter] by = {teacher!r} needs that teacher's scores; none were given")
    query_ids, passage_ids = filter_pairs(block)
    scores = gold_sim(teacher, query_ids, passage_ids)
    require_scores(scores, teacher, query_ids, passage_ids)
    return dict(zip(zip(query_ids, passage_ids, strict=True), scores.tolist(), strict=True))


def _kept_by_teacher(row: CandidateRow, scores: dict[tuple[str, str], float], negative_filter: NegativeFilter) -> list[int]:
    """Places of the candidates at or below the ceiling; the weakest positive sets it, as in mining."""
    weakest = min(scores[row.query_id, passage_id] for passage_id in row.positive_ids)
    ceiling = ceiling_of(weakest, negative_filter)
    return [place for place, passage_id in enumerate(row.passage_ids) if scores[row.query_id, passage_id] <= ceiling]


def _negatives(row: CandidateRow, kept: Sequence[int], labels: Labels) -> list[str]:
    """At most ``num_negatives`` passage_ids; all positives of a query share them."""
    if labels.selection == "random":
        seed = hashlib.sha256(f"{labels.seed}\0{row.query_id}".encode()).digest()
        draws = np.random.default_rng(int.from_bytes(seed[:16], "little")).random(len(kept))
        order = [kept[place] for place in np.argsort(draws, kind="stable").tolist()]
    else:
        by_miner: dict[str, list[int]] = {}
        for place in kept:  # candidates lie miner by miner, in recipe order, each in rank order
            by_miner.setdefault(row.miner[place], []).append(place)
        rounds = zip_longest(*by_miner.values())
        order = [place for places in rounds for place in places if place is not None]
    return [row.passage_ids[place] for place in order[: labels.num_negatives]]
