"""TREC run files, read: ``query_id Q0 doc_id rank score tag`` lines, separated by whitespace.

The score column alone decides an order, as in trec_eval; the rank column is not read. Every malformed or repeated line is a
ValueError naming file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sparsekd.collection.reading import refusal, shown, text_lines

# Not all that float() takes: 1_000 is 1 to trec_eval, and digits of other scripts are 0.
_DECIMAL = re.compile(r"[+-]?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COLUMNS = ("query_id", "Q0", "doc_id", "rank", "score", "tag")


def trec_run_lines(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield (line number, query_id, doc_id, score) of a run file as it stands; ValueError at the first malformed line."""
    for line, text in text_lines(path):
        columns = text.split()
        if len(columns) != len(_COLUMNS):
            found = f"{len(columns)} columns in {shown(text)}"
            raise refusal(path, line, found, f"{len(_COLUMNS)} ({' '.join(_COLUMNS)})", "correct the line")
        query_id, _, passage_id, _, literal, _ = columns
        yield line, query_id, passage_id, _score(path, line, literal)


def read_run_scores(path: Path, keeps: Callable[[int, str, str], bool] | None = None) -> dict[str, dict[str, float]]:
    """Return {query_id: {passage_id: score}} in file order.

    ``keeps`` gets the line number, query_id and passage_id of each line, may raise, and returns whether the line is kept. Raises
    FileNotFoundError if there is no such file.
    """
    scores_by_query: dict[str, dict[str, float]] = {}
    for line, query_id, passage_id, score in trec_run_lines(path):
        if keeps is not None and not keeps(line, query_id, passage_id):
            continue
        scores = scores_by_query.setdefault(query_id, {})
        if passage_id in scores:
            found = f"doc_id {shown(passage_id)} again for query {shown(query_id)}"
            raise refusal(path, line, found, "each passage once per query", "keep the better line")
        scores[passage_id] = score
    return scores_by_query


def _score(path: Path, line: int, literal: str) -> float:
    score = float(literal) if _DECIMAL.fullmatch(literal) else np.nan
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(np.float32(score))
    if not is_finite:
        raise refusal(path, line, f"score {shown(literal)}", "a finite float32", "correct the line")
    return score
