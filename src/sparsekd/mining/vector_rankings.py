"""Miners that search vectors: dense ones by a FAISS index, sparse ones by products of CSR matrices, shard by shard of passages.

Memory holds the vectors of ``[run] shard_passages`` passages, under cosine their unit vectors where they are none, and 8 bytes per
query and rank. Exact searches of shards merge by (score, passage_id) into what one search over all passages finds, to the id and
the bit. An approximate index holds all passages itself; what it proposes is scored exactly in a second pass over the shards, where
its recall is measured too.
Q queries, P passages, D width, W proposals, K search depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.approximate import ApproximateIndex, index_parameters, recall
from sparsekd.mining.dense import DenseIndex, Similarity, similarities
from sparsekd.mining.question import Answer, Question, Search
from sparsekd.mining.ranking import NONE, Positions, Scores, best_first, empty_block, id_ranks, merged
from sparsekd.mining.sparse import SparseIndex, sparse_pair_scores
from sparsekd.recipe import DenseMiner, SparseMiner

RECALL_QUERIES = 200
"""Queries on which an approximate index is compared with exact search, those of smallest sha256(query_id); the standard error of
their mean recall is below .01 where single queries spread by .1."""
_SEED = 0  # of the passages that train an index

Block = tuple[Positions, Scores]
Floors = NDArray[np.float32] | None


def dense_search_of(miner: DenseMiner, question: Question) -> Search:
    """Return what answers by a bi-encoder's own similarity. Raises ValueError for what the index refuses."""
    run = question.recipe.run
    source, device = question.source, run.search_device or run.device
    num_passages = len(question.collection.passages)
    parameters = {} if miner.index == "flat" else index_parameters(miner.index, num_passages, miner.depth)  # before encoding
    similarity, vectors_QD = source.similarity(miner), source.vectors(miner, question.queries, "query")

    def positive_scores(rows: range) -> Scores | None:
        return question.positive_scores(rows, _dense_scores(miner, question, vectors_QD, similarity, rows))

    if miner.index == "flat":
        indexes = _indexes(miner, question, similarity, device)

        def search_exactly(rows: range) -> Answer:
            return Answer(*_exact(vectors_QD[rows.start : rows.stop], indexes, miner.depth), positive_scores(rows))

        return search_exactly
    shards = _Shards(question, lambda _, texts: source.vectors(miner, texts, "passage"))
    index = ApproximateIndex(miner.index, vectors_QD.shape[1], parameters, similarity=similarity, device=device)
    _fill(index, miner, question, shards)

    def search(rows: range) -> Answer:
        part_QD, compared = vectors_QD[rows.start : rows.stop], _compared_rows(question, rows)
        block = _refined(index.search(part_QD, miner.depth), part_QD, shards, miner.depth, similarity)
        exact_QK, _ = _exact(part_QD[compared], _indexes(miner, question, similarity, "cpu"), miner.depth)
        share = recall(block[0][compared], exact_QK)
        facts = {"index": miner.index, **parameters, "recall": round(share, 4), "recall_queries": len(compared)}
        return Answer(*block, positive_scores(rows), facts)

    return search


def sparse_search_of(miner: SparseMiner, question: Question) -> Search:
    """Return what answers by the dot product of a SparseEncoder's vectors; a passage that shares no active dim is not found."""
    source = question.source
    indexes = _Shards(question, lambda ids, texts: SparseIndex(source.sparse_vectors(miner, texts, "passage"), ids))
    query_csr = source.sparse_vectors(miner, question.queries, "query")

    def search(rows: range) -> Answer:
        part_csr = query_csr[rows.start : rows.stop]
        block = _merged_shards(indexes, miner.depth, lambda index, _: index.search_positions(part_csr, miner.depth))
        place_by_id: dict[str, int] = {}
        positive_csr: Any = None
        if question.filters_by_miner:
            place_by_id = {passage_id: place for place, passage_id in enumerate(question.positive_ids(rows))}
            positive_csr = source.sparse_vectors(miner, [question.collection.passages[each] for each in place_by_id], "passage")

        def scores_of(row: int, passage_ids: list[str]) -> Scores:
            return sparse_pair_scores(query_csr[row], positive_csr[[place_by_id[each] for each in passage_ids]])

        return Answer(*block, question.positive_scores(rows, scores_of))

    return search


class _Shards:
    """What is made of ``shard_passages`` passages at a time, their vectors or an index: (first position, passage_ids, made).

    A single shard is made once.
    """

    def __init__(self, question: Question, make: Callable[[Sequence[str], Sequence[str]], Any]) -> None:
        """``make`` is given passage_ids and texts."""
        self.passage_ids = list(question.collection.passages)
        self._texts = list(question.collection.passages.values())
        self._size = question.recipe.run.shard_passages
        self._make = make
        self._only: Any = None

    @cached_property
    def id_rank(self) -> Positions:
        """See ``id_ranks``."""
        return id_ranks(self.passage_ids)

    def __iter__(self) -> Iterator[tuple[int, list[str], Any]]:
        if len(self.passage_ids) <= self._size:
            if self._only is None:
                self._only = self._make(self.passage_ids, self._texts)
            yield 0, self.passage_ids, self._only
            return
        for start in range(0, len(self.passage_ids), self._size):
            part = slice(start, start + self._size)  # no name for what is made: it would stay while the next is made
            yield start, self.passage_ids[part], self._make(self.passage_ids[part], self._texts[part])


def _merged_shards(shards: _Shards, depth: int, search: Callable[[Any, Floors], Block]) -> Block:
    """Search the index of each shard, whose positions begin at 0, and keep the best of all; ``search`` is told what to reach."""
    block: Block | None = None
    for start, _, index in shards:
        positions_QK, scores_QK = search(index, None if block is None else _floors(block, depth))
        found = np.where(positions_QK == NONE, NONE, positions_QK + start).astype(np.int32), scores_QK
        block = found if block is None else merged(block, found, shards.id_rank, depth)
        del index  # before the next shard's is made
    assert block is not None
    return block


def _floors(block: Block, depth: int) -> Floors:
    """float32 [Q]: the score of each query's last place, which another passage must reach; -inf where places are free."""
    positions_QK, scores_QK = block
    if positions_QK.shape[1] < depth:
        return None
    return np.where(positions_QK[:, -1] == NONE, np.float32(-np.inf), scores_QK[:, -1])


def _indexes(miner: DenseMiner, question: Question, similarity: Similarity, device: str) -> _Shards:
    def make(passage_ids: Sequence[str], texts: Sequence[str]) -> DenseIndex:
        vectors = question.source.vectors(miner, texts, "passage")
        return DenseIndex(vectors, passage_ids, similarity=similarity, device=device)

    return _Shards(question, make)


def _exact(vectors_QD: NDArray[np.float32], indexes: _Shards, depth: int) -> Block:
    return _merged_shards(indexes, depth, lambda index, floors_Q: index.search_positions(vectors_QD, depth, floors_Q=floors_Q))


def _fill(index: ApproximateIndex, miner: DenseMiner, question: Question, shards: _Shards) -> None:
    """Train the index on a sample of the passages, in their order, and add all of them."""
    if index.num_train_vectors:
        texts = list(question.collection.passages.values())
        drawn = np.random.default_rng(_SEED).choice(len(texts), size=index.num_train_vectors, replace=False)
        index.train(question.source.vectors(miner, [texts[position] for position in np.sort(drawn).tolist()], "passage"))
    for _, _, vectors in shards:
        index.add(vectors)
        del vectors  # before the next shard's are made


def _compared_rows(question: Question, rows: range) -> NDArray[np.int64]:
    """Those of the rows, counted from the first, on which recall is measured."""
    digests = [hashlib.sha256(question.judged[row].query_id.encode("utf-8")).digest() for row in rows]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__)[:RECALL_QUERIES], dtype=np.int64)


def _refined(
    positions_QW: NDArray[np.int32], vectors_QD: NDArray[np.float32], shards: _Shards, depth: int, similarity: Similarity
) -> Block:
    """Score proposals exactly, and keep the best ``depth``."""
    scores_QW = np.zeros(positions_QW.shape, dtype=np.float32)
    for start, passage_ids, vectors in shards:
        for row in range(len(positions_QW)):
            inside = np.flatnonzero((positions_QW[row] >= start) & (positions_QW[row] < start + len(passage_ids)))
            scores_QW[row, inside] = similarities(vectors_QD[row], vectors, positions_QW[row, inside] - start, similarity)
        del vectors  # before the next shard's are made
    positions_QK, scores_QK = empty_block(len(positions_QW), min(depth, positions_QW.shape[1]))
    for row in range(len(positions_QW)):
        found = positions_QW[row] != NONE
        best, best_scores = best_first(positions_QW[row, found], scores_QW[row, found], shards.id_rank, depth)
        positions_QK[row, : len(best)], scores_QK[row, : len(best)] = best, best_scores
    return positions_QK, scores_QK


def _dense_scores(
    miner: DenseMiner, question: Question, vectors_QD: NDArray[np.float32], similarity: Similarity, rows: range
) -> Callable[[int, list[str]], Scores]:
    """Return what scores the positives of these queries; their vectors are asked for only where a filter needs them."""
    if not question.filters_by_miner:
        return lambda row, passage_ids: np.empty(0, dtype=np.float32)
    place_by_id = {passage_id: place for place, passage_id in enumerate(question.positive_ids(rows))}
    texts = [question.collection.passages[passage_id] for passage_id in place_by_id]
    vectors = question.source.vectors(miner, texts, "passage")

    def positive_scores(row: int, passage_ids: list[str]) -> Scores:
        places = np.array([place_by_id[passage_id] for passage_id in passage_ids], dtype=np.int64)
        return similarities(vectors_QD[row], vectors, places, similarity)

    return positive_scores
