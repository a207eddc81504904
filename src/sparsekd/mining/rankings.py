"""One miner's search, whatever its kind: made ready once, then asked for one block of queries after another.

Vectors come from the caller, who owns encoders and their bank; no torch here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsekd.mining.bm25 import BM25Index
from sparsekd.mining.question import Answer, Question, Search
from sparsekd.mining.ranking import Scores, empty_block
from sparsekd.mining.run_file import RunFile
from sparsekd.mining.selection import query_generator
from sparsekd.mining.vector_rankings import dense_search_of, sparse_search_of
from sparsekd.recipe import BM25Miner, DenseMiner, Miner, RandomMiner, RunMiner, SparseMiner


def search_of(miner: Miner, question: Question) -> Search:
    """Build the miner's index, and return what searches it and scores positives where a filter needs them."""
    if isinstance(miner, BM25Miner):
        return _bm25_search_of(miner, question)
    if isinstance(miner, DenseMiner):
        return dense_search_of(miner, question)
    if isinstance(miner, SparseMiner):
        return sparse_search_of(miner, question)
    if isinstance(miner, RunMiner):
        return lambda rows: _by_run(miner, question, rows)
    return lambda rows: _by_chance(miner, question, rows)


def is_divisible(miner: Miner) -> bool:
    """Whether blocks of queries can be searched apart: an approximate index costs more to build than to search, a file to read."""
    return not isinstance(miner, RunMiner) and not (isinstance(miner, DenseMiner) and miner.index != "flat")


def _bm25_search_of(miner: BM25Miner, question: Question) -> Search:
    passages, queries = question.collection.passages, question.queries
    index = BM25Index(passages, miner.k1, miner.b)
    position_by_id = {passage_id: position for position, passage_id in enumerate(passages)}

    def scores_of(row: int, passage_ids: list[str]) -> Scores:
        return index.pair_scores(queries[row], np.array([position_by_id[each] for each in passage_ids], dtype=np.int32))

    def search(rows: range) -> Answer:
        block = index.search_positions(queries[rows.start : rows.stop], miner.depth)
        return Answer(*block, question.positive_scores(rows, scores_of))

    return search


def _by_run(miner: RunMiner, question: Question, rows: range) -> Answer:
    query_ids = [question.judged[row].query_id for row in rows]
    run = RunFile(Path(miner.path), question.collection, Path(question.recipe.collection.path), query_ids)
    facts = {"lines_outside": run.num_outside, "queries_without_lines": run.num_missing}
    return Answer(*run.search_positions(miner.depth), facts=facts)


def _by_chance(miner: RandomMiner, question: Question, rows: range) -> Answer:
    num_passages = len(question.collection.passages)
    positions_QK, scores_QK = empty_block(len(rows), min(miner.depth, num_passages))
    for place, row in enumerate(rows):
        generator = query_generator(miner.seed, question.judged[row].query_id)
        positions_QK[place] = generator.choice(num_passages, size=positions_QK.shape[1], replace=False)
    return Answer(positions_QK, scores_QK)
