"""Which rows a table has: one per (query, positive), with the negatives that filter and selection leave.

Rows are chosen before any label is looked up, so that the pairs a teacher must have scored are known (``Rows.pairs``) and no
others are asked for; only a filter by a teacher looks at that teacher's scores of every candidate (``filter_pairs``).
The rows of a query depend on that query alone, unless a percentile of all positives filters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from sparsekd.labels.negatives import choose_negatives
from sparsekd.mining.candidates import CandidateRow
from sparsekd.mining.selection import ceiling_of, percentile_limit
from sparsekd.recipe import NegativeFilter, Recipe

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
    promoted: list[tuple[str, str, float]] = field(default_factory=list)
    """Positives of rows that were mined and not judged: query_id, passage_id, raw gold_sim."""

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
    return negative_filter.by if negative_filter.by != "miner" and negative_filter.reads_scores else None


def selecting_teacher(recipe: Recipe) -> str | None:
    """Return the name of the teacher over whose scores rows are chosen, None where they are chosen without."""
    if recipe.labels.selection != "stratified" and recipe.labels.promote_above is None:
        return None
    return recipe.labels.selection_teacher or recipe.teachers[0].name


def reading_teachers(recipe: Recipe) -> list[str]:
    """Return the names of the teachers whose scores of every candidate decide which rows there are, each once."""
    return [name for name in dict.fromkeys([filtering_teacher(recipe), selecting_teacher(recipe)]) if name is not None]


def filter_pairs(candidates: Iterable[CandidateRow]) -> tuple[list[str], list[str]]:
    """Return aligned query_ids and passage_ids of every positive and candidate: what a reading teacher must have scored."""
    return _aligned(_pairs_of(candidates))


def choose_rows(recipe: Recipe, candidates: Iterable[CandidateRow], gold_sim: GoldSim | None = None) -> Rows:
    """Return the table's rows, in the order of ``candidates`` and their positives.

    ``gold_sim`` must know the ``reading_teachers``' scores of ``filter_pairs``. A candidate that the filtering teacher scores above
    the ceiling set by the query's weakest scored positive is left out. A row whose positive that teacher scores below
    ``min_positive``, or with fewer than ``num_negatives``, is dropped and counted. Candidates at or above ``promote_above`` become
    positives after the judged ones, best first; a query none of whose judged positives is left is dropped all the same. With a
    percentile ``candidates`` are read twice.
    Raises ValueError if a score is missing or no row is left.
    """
    labels, filtering, selecting = recipe.labels, filtering_teacher(recipe), selecting_teacher(recipe)
    query_ids: list[str] = []
    passage_ids: list[list[str]] = []
    dropped: Counter[str] = Counter(too_few_negatives=0)
    all_promoted: list[tuple[str, str, float]] = []
    num_filtered, limit = 0, _limit(recipe, candidates, gold_sim)
    for block in _blocks(candidates):
        scores = {teacher: _scores_by_pair(recipe, block, teacher, gold_sim) for teacher in reading_teachers(recipe)}
        for row in block:
            positive_ids, places = row.positive_ids, list(range(len(row.passage_ids)))
            promoted = _promoted(row, scores[selecting], labels.promote_above) if selecting else []
            kept = [place for place in places if place not in {found for found, _ in promoted}] if promoted else places
            if filtering is not None:
                positive_ids = _shared_positives(row, scores[filtering], recipe.mining.filter)
                if recipe.mining.filter.min_positive is not None:
                    dropped["positive_below_minimum"] += len(row.positive_ids) - len(positive_ids)
                if not positive_ids:
                    continue
                num_before = len(kept)
                kept = _kept_by_teacher(row, kept, positive_ids, scores[filtering], recipe.mining.filter, limit)
                num_filtered += num_before - len(kept)
            spread = [scores[selecting][row.query_id, row.passage_ids[place]] for place in kept] if selecting else None
            new_ids = [row.passage_ids[place] for place, _ in promoted]
            negatives = choose_negatives(row, kept, labels, spread)
            if len(negatives) < labels.num_negatives:
                dropped["too_few_negatives"] += len(positive_ids) + len(new_ids)
                continue
            all_promoted += [(row.query_id, row.passage_ids[place], score) for place, score in promoted]
            for positive_id in [*positive_ids, *new_ids]:
                query_ids.append(row.query_id)
                passage_ids.append([positive_id, *negatives])
    if not query_ids:
        raise ValueError(
            f"[labels] num_negatives = {labels.num_negatives}: none of {dropped.total()} rows has as many candidates left "
            f"({num_filtered} candidates filtered{_below_minimum(dropped)}); lower num_negatives, raise the miners' quota or loosen"
            " [mining.filter]"
        )
    return Rows(query_ids, passage_ids, dict(dropped), num_filtered, all_promoted)


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


def _scores_by_pair(
    recipe: Recipe, block: Sequence[CandidateRow], teacher: str, gold_sim: GoldSim | None
) -> dict[tuple[str, str], float]:
    if gold_sim is None:
        is_filter = teacher == filtering_teacher(recipe)
        name = "selection" if recipe.labels.selection == "stratified" else "promote_above"
        where = f"[mining.filter] by = {teacher!r}" if is_filter else f"[labels] {name} = {getattr(recipe.labels, name)!r}"
        raise ValueError(f"{where} needs that teacher's scores; none were given" + ("" if is_filter else f" (teacher {teacher!r})"))
    query_ids, passage_ids = filter_pairs(block)
    scores = gold_sim(teacher, query_ids, passage_ids)
    require_scores(scores, teacher, query_ids, passage_ids)
    return dict(zip(zip(query_ids, passage_ids, strict=True), scores.tolist(), strict=True))


def _limit(recipe: Recipe, candidates: Iterable[CandidateRow], gold_sim: GoldSim | None) -> float:
    """The score at the filtering teacher's percentile of the positives that make rows; infinity without one."""
    filtering, negative_filter = filtering_teacher(recipe), recipe.mining.filter
    if filtering is None or negative_filter.percentile is None:
        return float("inf")
    found = []
    for block in _blocks(candidates):
        scores = _scores_by_pair(recipe, block, filtering, gold_sim)
        found += [scores[row.query_id, each] for row in block for each in _shared_positives(row, scores, negative_filter)]
    return percentile_limit(np.array(found, dtype=np.float32), negative_filter)


def _shared_positives(row: CandidateRow, scores: dict[tuple[str, str], float], negative_filter: NegativeFilter) -> list[str]:
    """The positives that the teacher does not score below the filter's minimum."""
    minimum = negative_filter.min_positive
    if minimum is None:
        return row.positive_ids
    return [passage_id for passage_id in row.positive_ids if scores[row.query_id, passage_id] >= minimum]


def _promoted(row: CandidateRow, scores: dict[tuple[str, str], float], threshold: float | None) -> list[tuple[int, float]]:
    """Places and scores of the candidates that become positives, best first, ties in the order of the candidates."""
    if threshold is None:
        return []
    found = [(place, scores[row.query_id, passage_id]) for place, passage_id in enumerate(row.passage_ids)]
    return sorted(((place, score) for place, score in found if score >= threshold), key=lambda each: -each[1])


def _kept_by_teacher(
    row: CandidateRow,
    places: Sequence[int],
    positive_ids: Sequence[str],
    scores: dict[tuple[str, str], float],
    negative_filter: NegativeFilter,
    limit: float,
) -> list[int]:
    """Those of ``places`` whose candidates are at or below the ceiling; the weakest positive sets it, as in mining."""
    weakest = min(scores[row.query_id, passage_id] for passage_id in positive_ids)
    ceiling = ceiling_of(weakest, negative_filter, limit)
    return [place for place in places if scores[row.query_id, row.passage_ids[place]] <= ceiling]


def _below_minimum(dropped: Counter[str]) -> str:
    number = dropped["positive_below_minimum"]
    return f", {number} positives below min_positive" if number else ""
