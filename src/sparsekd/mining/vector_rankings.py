"""Miners that search vectors: dense ones by a FAISS index, sparse ones by products of CSR matrices, shard by shard of passages.

Memory holds the vectors of ``[run] shard_passages`` passages, FAISS's copy of them, and 8 bytes per query and rank. Exact searches
of shards merge by (score, passage_id) into what one search over all passages finds, to the id and the bit. An approximate index
holds all passages itself; what it proposes is scored exactly in a second pass over the shards, where its recall is measured too.
Q queries, P passages, D width, W proposals, K search depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.approximate import ApproximateIndex, index_parameters, recall
from sparsekd.mining.dense import DenseIndex, Similarity, similarities
from sparsekd.mining.question import Question, Ranking
from sparsekd.mining.ranking import NONE, Positions, Scores, best_first, empty_block, id_ranks, merged
from sparsekd.mining.sparse import SparseIndex, sparse_pair_scores
from sparsekd.recipe import DenseMiner, SparseMiner

RECALL_QUERIES = 200
"""Queries on which an approximate index is compared with exact search, those of smallest sha256(query_id); the standard error of
their mean recall is below .01 where single queries spread by .1."""
_SEED = 0  # of the passages that train an index

Block = tuple[Positions, Scores]
Floors = NDArray[np.float32] | None


def by_dense_vectors(miner: DenseMiner, name: str, question: Question) -> Ranking:
    """Answer by a bi-encoder's own similarity. Raises ValueError for what the index refuses."""
    source, device = question.source, question.recipe.run.device
    num_passages = len(question.collection.passages)
    parameters = {} if miner.index == "flat" else index_parameters(miner.index, num_passages, miner.depth)  # before encoding
    shards = _Shards(question, lambda texts: source.vectors(miner, texts, "passage"))
    similarity, vectors_QD = source.similarity(miner), source.vectors(miner, question.queries, "query")
    facts: dict[str, Any] = {}
    if miner.index == "flat":
        block = _exact(vectors_QD, shards, miner.depth, similarity, device)
    else:
        index = ApproximateIndex(miner.index, vectors_QD.shape[1], parameters, similarity=similarity, device=device)
        _fill(index, miner, question, shards)
        compared = _compared_rows(question)
        block, share = _refined(index.search(vectors_QD, miner.depth), vectors_QD, shards, compared, miner.depth, similarity)
        facts = {"index": miner.index, **parameters, "recall": round(share, 4), "recall_queries": len(compared)}
    ceilings_Q = question.ceilings(_dense_scores(miner, question, vectors_QD, similarity))
    return Ranking(miner, name, *block, ceilings_Q, facts)


def by_sparse_vectors(miner: SparseMiner, name: str, question: Question) -> Ranking:
    """Answer by the dot product of a SparseEncoder's vectors; a passage that shares no active dim is not found."""
    source = question.source
    shards = _Shards(question, lambda texts: source.sparse_vectors(miner, texts, "passage"))
    query_csr = source.sparse_vectors(miner, question.queries, "query")
    depth = miner.depth
    block = _merged_shards(shards, depth, lambda ids, part, _: SparseIndex(part, ids).search_positions(query_csr, depth))
    place_by_id: dict[str, int] = {}
    positive_csr: Any = None
    if question.filters_by_miner:
        place_by_id = {passage_id: place for place, passage_id in enumerate(question.positive_ids())}
        positive_csr = source.sparse_vectors(miner, [question.collection.passages[each] for each in place_by_id], "passage")

    def positive_scores(row: int, passage_ids: list[str]) -> Scores:
        return sparse_pair_scores(query_csr[row], positive_csr[[place_by_id[each] for each in passage_ids]])

    return Ranking(miner, name, *block, question.ceilings(positive_scores))


class _Shards:
    """The passages' vectors, ``shard_passages`` at a time: (first position, passage_ids, vectors). A single shard is made once."""

    def __init__(self, question: Question, vectors: Callable[[Sequence[str]], Any]) -> None:
        self.passage_ids = list(question.collection.passages)
        self._texts = list(question.collection.passages.values())
        self._size = question.recipe.run.shard_passages
        self._vectors = vectors
        self._only: Any = None

    def __iter__(self) -> Iterator[tuple[int, list[str], Any]]:
        if len(self.passage_ids) <= self._size:
            if self._only is None:
                self._only = self._vectors(self._texts)
            yield 0, self.passage_ids, self._only
            return
        for start in range(0, len(self.passage_ids), self._size):
            part = slice(start, start + self._size)  # no name for the vectors: it would keep them while the next are made
            yield start, self.passage_ids[part], self._vectors(self._texts[part])


def _merged_shards(shards: _Shards, depth: int, search: Callable[[list[str], Any, Floors], Block]) -> Block:
    """Search each shard, whose positions begin at 0, and keep the best of all; ``search`` is told what it has to reach."""
    id_rank = id_ranks(shards.passage_ids)
    block: Block | None = None
    for start, passage_ids, vectors in shards:
        positions_QK, scores_QK = search(passage_ids, vectors, None if block is None else _floors(block, depth))
        found = np.where(positions_QK == NONE, NONE, positions_QK + start).astype(np.int32), scores_QK
        block = found if block is None else merged(block, found, id_rank, depth)
        del vectors  # before the next shard's are made
    assert block is not None
    return block


def _floors(block: Block, depth: int) -> Floors:
    """float32 [Q]: the score of each query's last place, which another passage must reach; -inf where places are free."""
    positions_QK, scores_QK = block
    if positions_QK.shape[1] < depth:
        return None
    return np.where(positions_QK[:, -1] == NONE, np.float32(-np.inf), scores_QK[:, -1])


def _exact(vectors_QD: NDArray[np.float32], shards: _Shards, depth: int, similarity: Similarity, device: str) -> Block:
    def search(passage_ids: list[str], vectors: NDArray[np.float32], floors_Q: Floors) -> Block:
        index = DenseIndex(vectors, passage_ids, similarity=similarity, device=device)
        return index.search_positions(vectors_QD, depth, floors_Q=floors_Q)

    return _merged_shards(shards, depth, search)


def _fill(index: ApproximateIndex, miner: DenseMiner, question: Question, shards: _Shards) -> None:
    """Train the index on a sample of the passages, in their order, and add all of them."""
    if index.num_train_vectors:
        texts = list(question.collection.passages.values())
        drawn = np.random.default_rng(_SEED).choice(len(texts), size=index.num_train_vectors, replace=False)
        index.train(question.source.vectors(miner, [texts[position] for position in np.sort(drawn).tolist()], "passage"))
    for _, _, vectors in shards:
        index.add(vectors)
        del vectors  # before the next shard's are made


def _compared_rows(question: Question) -> NDArray[np.int64]:
    """Rows of the queries on which recall is measured."""
    digests = [hashlib.sha256(query.query_id.encode("utf-8")).digest() for query in question.judged]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__)[:RECALL_QUERIES], dtype=np.int64)


def _refined(
    positions_QW: NDArray[np.int32],
    vectors_QD: NDArray[np.float32],
    shards: _Shards,
    compared: NDArray[np.int64],
    depth: int,
    similarity: Similarity,
) -> tuple[Block, float]:
    """Score proposals exactly, keep the best ``depth``, and return them with their recall on the rows ``compared``."""
    scores_QW = np.zeros(positions_QW.shape, dtype=np.float32)

    for start, passage_ids, vectors in shards:
        for row in range(len(positions_QW)):
            inside = np.flatnonzero((positions_QW[row] >= start) & (positions_QW[row] < start + len(passage_ids)))
            scores_QW[row, inside] = similarities(vectors_QD[row], vectors, positions_QW[row, inside] - start, similarity)
        del vectors  # before the next shard's are made
    id_rank = id_ranks(shards.passage_ids)
    positions_QK, scores_QK = empty_block(len(positions_QW), min(depth, positions_QW.shape[1]))
    for row in range(len(positions_QW)):
        found = positions_QW[row] != NONE
        best, best_scores = best_first(positions_QW[row, found], scores_QW[row, found], id_rank, depth)
        positions_QK[row, : len(best)], scores_QK[row, : len(best)] = best, best_scores
    exact_QK, _ = _exact(vectors_QD[compared], shards, depth, similarity, "cpu")
    return (positions_QK, scores_QK), recall(positions_QK[compared], exact_QK)


def _dense_scores(
    miner: DenseMiner, question: Question, vectors_QD: NDArray[np.float32], similarity: Similarity
) -> Callable[[int, list[str]], Scores]:
    """Return what scores a query's positives; their vectors are asked for only where a filter needs them."""
    if not question.filters_by_miner:
        return lambda row, passage_ids: np.empty(0, dtype=np.float32)
    place_by_id = {passage_id: place for place, passage_id in enumerate(question.positive_ids())}
    texts = [question.collection.passages[passage_id] for passage_id in place_by_id]
    vectors = question.source.vectors(miner, texts, "passage")

    def positive_scores(row: int, passage_ids: list[str]) -> Scores:
        places = np.array([place_by_id[passage_id] for passage_id in passage_ids], dtype=np.int64)
        return similarities(vectors_QD[row], vectors, places, similarity)

    return positive_scores
