"""A TREC run file as a miner: its lines, checked against the collection, as ranked lists.

Lines of queries that are not trained on, and of passages that ``max_passages`` leaves out, are counted; an id that the collection's
files do not have is refused with file and line. Memory: the lines of the training queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from sparsekd.artifact import sha256_of_file
from sparsekd.collection.beir import Collection
from sparsekd.collection.reading import json_objects, refusal, shown
from sparsekd.collection.trec import read_run_scores
from sparsekd.mining.ranking import Positions, Scores, best_first, empty_block, id_ranks


def run_identity(path: str) -> dict[str, str]:
    """Return what decides a run's lines, for keys; FileNotFoundError if there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such run file; expected TREC lines; check path of the miner of kind \"run\"")
    return {"sha256": sha256_of_file(Path(path))}


class RunFile:
    """The ranked lists of a run file for some queries of a collection in ``folder``."""

    def __init__(self, path: Path, collection: Collection, folder: Path, query_ids: Sequence[str]) -> None:
        self.num_outside = 0
        """Lines of queries that are not trained on or of passages that the recipe leaves out."""
        self._path = path
        self._collection = collection
        self._folder = folder
        self._wanted = frozenset(query_ids)
        self._query_ids = query_ids
        self._scores = read_run_scores(path, self._keeps)
        if not self._scores and not self.num_outside:
            raise ValueError(f"{path}: 0 rows, expected at least one line of a run; make the run over this collection")

    @property
    def num_missing(self) -> int:
        """Queries that are trained on and have no line."""
        return sum(query_id not in self._scores for query_id in self._query_ids)

    def search_positions(self, depth: int) -> tuple[Positions, Scores]:
        """Return int32 [Q, K] positions (-1 filler) and float32 [Q, K] scores, by score, ties by passage_id."""
        passage_ids = list(self._collection.passages)
        position_by_id = {passage_id: position for position, passage_id in enumerate(passage_ids)}
        id_rank = id_ranks(passage_ids)
        positions_QK, scores_QK = empty_block(len(self._query_ids), min(depth, len(passage_ids)))
        for row, query_id in enumerate(self._query_ids):
            scores = self._scores.get(query_id, {})
            hits = np.array([position_by_id[passage_id] for passage_id in scores], dtype=np.int32)
            positions, best = best_first(hits, np.array(list(scores.values()), dtype=np.float32), id_rank, depth)
            positions_QK[row, : len(positions)], scores_QK[row, : len(best)] = positions, best
        return positions_QK, scores_QK

    def _keeps(self, line: int, query_id: str, passage_id: str) -> bool:
        """Whether a line is of a query that is trained on and a passage that is kept; raises for an id that nothing has."""
        if query_id not in self._collection.queries and query_id not in self._all_queries:
            raise self._unknown(line, f"query_id {shown(query_id)}", "queries.jsonl")
        if passage_id not in self._collection.passages and passage_id not in self._all_passages:
            raise self._unknown(line, f"doc_id {shown(passage_id)}", "corpus.jsonl")
        if query_id in self._wanted and passage_id in self._collection.passages:
            return True
        self.num_outside += 1
        return False

    def _unknown(self, line: int, found: str, file: str) -> ValueError:
        return refusal(self._path, line, found, f"an _id of {self._folder / file}", "make the run over this collection")

    @cached_property
    def _all_queries(self) -> frozenset[str]:
        return _ids(self._folder / "queries.jsonl")

    @cached_property
    def _all_passages(self) -> frozenset[str]:
        return _ids(self._folder / "corpus.jsonl")


def _ids(path: Path) -> frozenset[str]:
    """Ids of a file, read only when the collection that was kept lacks one."""
    return frozenset(str(record.get("_id")) for _, record in json_objects(path))
