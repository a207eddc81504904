"""One miner's answer to all queries, whatever its kind: ranked lists, and above which score its filter drops.

One miner at a time: its index is built, all queries searched, and the index freed, so memory holds one index and 8 bytes per
query and rank of each miner. Vectors come from the caller, who owns encoders and their bank; no torch here.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from sparsekd.mining.bm25 import BM25Index
from sparsekd.mining.question import Question, Ranking
from sparsekd.mining.ranking import Scores, empty_block
from sparsekd.mining.run_file import RunFile
from sparsekd.mining.selection import query_generator
from sparsekd.mining.vector_rankings import by_dense_vectors, by_sparse_vectors
from sparsekd.recipe import BM25Miner, DenseMiner, Miner, RandomMiner, RunMiner, SparseMiner

log = logging.getLogger(__name__)


def ranking_of(miner: Miner, name: str, question: Question) -> Ranking:
    """Search all queries with one miner, and score their positives where its filter needs them."""
    if isinstance(miner, BM25Miner):
        ranking = _by_bm25(miner, name, question)
    elif isinstance(miner, DenseMiner):
        ranking = by_dense_vectors(miner, name, question)
    elif isinstance(miner, SparseMiner):
        ranking = by_sparse_vectors(miner, name, question)
    elif isinstance(miner, RunMiner):
        ranking = _by_run(miner, name, question)
    else:
        ranking = _by_chance(miner, name, question)
    num_queries, num_passages = len(question.judged), len(question.collection.passages)
    facts = "".join(f", {key} {value}" for key, value in ranking.facts.items())
    log.info("miner %s: %d queries over %d passages, depth %d%s", name, num_queries, num_passages, miner.depth, facts)
    return ranking


def _by_bm25(miner: BM25Miner, name: str, question: Question) -> Ranking:
    passages, queries = question.collection.passages, question.queries
    index = BM25Index(passages, miner.k1, miner.b)
    position_by_id = {passage_id: position for position, passage_id in enumerate(passages)}

    def positive_scores(row: int, passage_ids: list[str]) -> Scores:
        return index.pair_scores(queries[row], np.array([position_by_id[each] for each in passage_ids], dtype=np.int32))

    return Ranking(miner, name, *index.search_positions(queries, miner.depth), question.ceilings(positive_scores))


def _by_run(miner: RunMiner, name: str, question: Question) -> Ranking:
    query_ids = [query.query_id for query in question.judged]
    run = RunFile(Path(miner.path), question.collection, Path(question.recipe.collection.path), query_ids)
    facts = {"lines_outside": run.num_outside, "queries_without_lines": run.num_missing}
    return Ranking(miner, name, *run.search_positions(miner.depth), np.full(len(query_ids), np.inf), facts)


def _by_chance(miner: RandomMiner, name: str, question: Question) -> Ranking:
    num_passages = len(question.collection.passages)
    positions_QK, scores_QK = empty_block(len(question.judged), min(miner.depth, num_passages))
    for row, query in enumerate(question.judged):
        generator = query_generator(miner.seed, query.query_id)
        positions_QK[row] = generator.choice(num_passages, size=positions_QK.shape[1], replace=False)
    return Ranking(miner, name, positions_QK, scores_QK, np.full(len(question.judged), np.inf))
