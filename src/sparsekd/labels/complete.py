"""Candidates whose pairs every teacher has scored: what is in quarantine is left out, pair by pair, never filled in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparsekd.labels.rows import GoldSim, filter_pairs
from sparsekd.mining.candidates import CandidateRow


@dataclass(frozen=True)
class Complete:
    """Rows of candidates without the (query_id, passage_id) that are ``missing``; can be read again and again."""

    rows: Iterable[CandidateRow]
    missing: frozenset[tuple[str, str]]

    def __iter__(self) -> Iterator[CandidateRow]:
        """Yield each row with the passages that have scores; a row none of whose positives has is left out."""
        if not self.missing:
            yield from self.rows
            return
        for row in self.rows:
            left = self._left(row)
            if left.positive_ids:
                yield left

    def _left(self, row: CandidateRow) -> CandidateRow:
        positive_ids = [each for each in row.positive_ids if (row.query_id, each) not in self.missing]
        places = [place for place, each in enumerate(row.passage_ids) if (row.query_id, each) not in self.missing]
        if len(positive_ids) == len(row.positive_ids) and len(places) == len(row.passage_ids):
            return row
        return replace(
            row,
            positive_ids=positive_ids,
            passage_ids=[row.passage_ids[place] for place in places],
            miner=[row.miner[place] for place in places],
            miner_score=[row.miner_score[place] for place in places],
            rank=[row.rank[place] for place in places],
        )


def complete(rows: Iterable[CandidateRow], gold_sim: GoldSim, teachers: Sequence[str]) -> Complete:
    """Return the rows without the pairs of which one of the teachers has no score."""
    query_ids, passage_ids = filter_pairs(rows)
    missing: set[tuple[str, str]] = set()
    for teacher in teachers:
        unknown = np.flatnonzero(np.isnan(gold_sim(teacher, query_ids, passage_ids))).tolist()
        missing.update((query_ids[place], passage_ids[place]) for place in unknown)
    return Complete(rows, frozenset(missing))
