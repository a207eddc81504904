"""Rankings and TREC run files.

A ranking is one query's passages, best first: score descending, ties by passage_id ascending, whatever made it. Run files hold
the same order; ``passage_id`` is called doc_id there. Reading back gives equal ids and bit-equal scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekd.collection.reading import shown
from sparsekd.collection.trec import read_run_scores

# Columns are separated by whitespace, and trec_eval's C strings end at NUL.
_NOT_IN_COLUMN = re.compile(r"[\s\x00]")


@dataclass(frozen=True, eq=False)
class Ranking:
    """One query's passage_ids and float32 scores, best first."""

    passage_ids: list[str]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.passage_ids)


Rankings = Mapping[str, Ranking]
"""query_id -> its ranking; empty where nothing was found."""


def ranked(passage_ids: Sequence[str], scores: Sequence[float] | NDArray[np.float32]) -> Ranking:
    """Return the ranking of one query's hits, which may come in any order.

    Raises ValueError if there are not as many scores as ids, a score is not finite, or a passage_id occurs twice.

    >>> ranked(["b", "c", "a"], [1, 2, 1]).passage_ids
    ['c', 'a', 'b']
    """
    scores_K = np.asarray(scores, dtype=np.float32)
    if scores_K.shape != (len(passage_ids),):
        raise ValueError(f"ranking: {len(passage_ids)} passage_ids, scores of shape {scores_K.shape}; expected one each")
    bad = np.flatnonzero(~np.isfinite(scores_K))
    if bad.size:
        first = passage_ids[bad[0]]
        raise ValueError(f"ranking: {bad.size} of {len(scores_K)} scores are not finite (first: passage {shown(first)})")
    if len(set(passage_ids)) != len(passage_ids):
        twice = next(passage_id for passage_id in passage_ids if list(passage_ids).count(passage_id) > 1)
        raise ValueError(f"ranking: passage {shown(twice)} occurs twice; expected each passage once per query")
    values = scores_K.tolist()
    order = sorted(range(len(values)), key=lambda place: (-values[place], passage_ids[place]))
    return Ranking([passage_ids[place] for place in order], scores_K[order])


def write_trec_run(path: Path, rankings: Rankings, tag: str) -> None:
    """Write ``query_id Q0 doc_id rank score tag`` lines, ranks from 1, scores with the digits float32 needs and no more.

    A query without results has no line. trec_eval orders by the score column and breaks ties by doc_id descending, so its
    figures can differ from ours where scores tie. Raises ValueError for an id or tag that is empty or has whitespace in it.
    """
    _refuse_whitespace("tag", tag)
    for query_id, ranking in rankings.items():
        _refuse_whitespace("query_id", query_id)
        for passage_id in ranking.passage_ids:
            _refuse_whitespace("doc_id", passage_id)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for query_id, ranking in rankings.items():
            for rank, (passage_id, score) in enumerate(zip(ranking.passage_ids, ranking.scores, strict=True), start=1):
                stream.write(f"{query_id} Q0 {passage_id} {rank} {score!s} {tag}\n")


def read_trec_run(path: Path) -> dict[str, Ranking]:
    """Return the rankings of a run file, queries in file order.

    The score column decides the order and ties go by passage_id; the rank column is not read, as in trec_eval. Raises
    FileNotFoundError, and ValueError naming file and line for a malformed or repeated one.
    """
    return {query_id: ranked(list(scores), list(scores.values())) for query_id, scores in read_run_scores(path).items()}


def _refuse_whitespace(column: str, value: str) -> None:
    if not value or _NOT_IN_COLUMN.search(value):
        raise ValueError(
            f"run file: {column} {shown(value)} is empty or holds whitespace or NUL, which separate columns; expected neither; "
            "rename it in the collection"
        )
