"""One miner's answer to all queries, whatever its kind: ranked lists, and above which score its filter drops.

One miner at a time: its index is built, all queries searched, and the index freed, so memory holds one index and 8 bytes per
query and rank of each miner. Vectors come from the caller, who owns encoders and their bank; no torch here.
Q queries, K search depth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection
from sparsekd.mining.bm25 import BM25Index
from sparsekd.mining.dense import DenseIndex, Similarity
from sparsekd.mining.ranking import Positions, Scores, empty_block
from sparsekd.mining.run_file import RunFile
from sparsekd.mining.selection import ceiling_of, percentile_limit, query_generator
from sparsekd.recipe import BM25Miner, DenseMiner, Miner, RandomMiner, Recipe, RunMiner

log = logging.getLogger(__name__)


class VectorSource(Protocol):
    """Where dense miners get their vectors."""

    def similarity(self, spec: DenseMiner) -> Similarity:
        """Return the similarity the encoder was trained for."""
        ...

    def vectors(self, spec: DenseMiner, texts: Sequence[str], role: Literal["query", "passage"]) -> NDArray[np.float32]:
        """Return float32 [n, D] in the order of ``texts``."""
        ...


@dataclass(frozen=True)
class JudgedQuery:
    """A training query: the positives that are scored, and all that are judged."""

    query_id: str
    positive_ids: list[str]
    judged_ids: list[str]


@dataclass(frozen=True)
class Ranking:
    """One miner's answer to all queries."""

    miner: Miner
    name: str
    positions_QK: Positions
    scores_QK: Scores
    ceilings_Q: NDArray[np.float64]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of this miner beside the counts."""


@dataclass(frozen=True)
class Question:
    """What every miner is asked: all queries over all passages, under one recipe."""

    recipe: Recipe
    collection: Collection
    judged: Sequence[JudgedQuery]
    source: VectorSource

    @property
    def queries(self) -> list[str]:
        """The texts of the queries."""
        return [self.collection.queries[query.query_id] for query in self.judged]


def ranking_of(miner: Miner, name: str, question: Question) -> Ranking:
    """Search all queries with one miner, and score their positives where its filter needs them."""
    if isinstance(miner, BM25Miner):
        ranking = _by_bm25(miner, name, question)
    elif isinstance(miner, DenseMiner):
        ranking = _by_vectors(miner, name, question)
    elif isinstance(miner, RunMiner):
        ranking = _by_run(miner, name, question)
    else:
        ranking = _by_chance(miner, name, question)
    num_queries, num_passages = len(question.judged), len(question.collection.passages)
    facts = "".join(f", {key} {value}" for key, value in ranking.facts.items())
    log.info("miner %s: %d queries over %d passages, depth %d%s", name, num_queries, num_passages, miner.depth, facts)
    return ranking


def _by_bm25(miner: BM25Miner, name: str, question: Question) -> Ranking:
    queries, index = question.queries, BM25Index(question.collection.passages, miner.k1, miner.b)
    block = index.search_positions(queries, miner.depth)
    return Ranking(miner, name, *block, _ceilings(question, lambda row, places: index.pair_scores(queries[row], places)))


def _by_vectors(miner: DenseMiner, name: str, question: Question) -> Ranking:
    passages, source = question.collection.passages, question.source
    vectors = source.vectors(miner, list(passages.values()), "passage")
    similarity, device = source.similarity(miner), question.recipe.run.device
    index = DenseIndex(vectors, list(passages), similarity=similarity, device=device)
    query_vectors = source.vectors(miner, question.queries, "query")
    block = index.search_positions(query_vectors, miner.depth)
    return Ranking(miner, name, *block, _ceilings(question, lambda row, places: index.pair_scores(query_vectors[row], places)))


def _by_run(miner: RunMiner, name: str, question: Question) -> Ranking:
    query_ids = [query.query_id for query in question.judged]
    run = RunFile(Path(miner.path), question.collection, Path(question.recipe.collection.path), query_ids)
    facts = {"lines_outside": run.num_outside, "queries_without_lines": run.num_missing}
    return Ranking(miner, name, *run.search_positions(miner.depth), _no_ceilings(question), facts)


def _by_chance(miner: RandomMiner, name: str, question: Question) -> Ranking:
    num_passages = len(question.collection.passages)
    positions_QK, scores_QK = empty_block(len(question.judged), min(miner.depth, num_passages))
    for row, query in enumerate(question.judged):
        generator = query_generator(miner.seed, query.query_id)
        positions_QK[row] = generator.choice(num_passages, size=positions_QK.shape[1], replace=False)
    return Ranking(miner, name, positions_QK, scores_QK, _no_ceilings(question))


def _no_ceilings(question: Question) -> NDArray[np.float64]:
    return np.full(len(question.judged), np.inf)


def _ceilings(question: Question, pair_scores: Callable[[int, Positions], Scores]) -> NDArray[np.float64]:
    """float64 [Q]: the score above which this miner's proposals are likely false negatives; infinity without such a filter."""
    negative_filter = question.recipe.mining.filter
    if negative_filter.by != "miner" or not negative_filter.reads_scores:
        return _no_ceilings(question)
    position_by_id = {passage_id: position for position, passage_id in enumerate(question.collection.passages)}
    scores_by_row = []
    for row, query in enumerate(question.judged):
        positions = np.array([position_by_id[passage_id] for passage_id in query.positive_ids], dtype=np.int32)
        scores_by_row.append(pair_scores(row, positions))
    limit = percentile_limit(np.concatenate(scores_by_row), negative_filter)
    return np.array([ceiling_of(float(scores.min()), negative_filter, limit) for scores in scores_by_row])
