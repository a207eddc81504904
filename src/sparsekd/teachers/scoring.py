"""Stage 1's work: ask the score bank about every pair, send only the unknown ones to the teacher, commit shard by shard.

Pairs are taken over all queries at once, made unique by content, and sorted longest first with ties by content, so that batches
hold texts of near-equal length and a run resumed after a crash forms the batches the uninterrupted one would have formed. The
teacher's model is loaded only if a pair is missing, and processes that score the same pairs share the shards. A crash loses at most
one shard of ``run.shard_pairs`` pairs, and memory holds the tokens of two: beside the texts and the banks, a pair takes some 70
bytes until all are scored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.scores import TeacherScores
from sparsekd.bank.sharing import Items, Part, Positions, SharedShards
from sparsekd.bank.sparse import SparseBank
from sparsekd.bank.text_key import text_keys
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.batching import BLOCK, made_ahead
from sparsekd.teachers.cross_encoder import CrossEncoderScorer
from sparsekd.teachers.dense import DenseEncoder
from sparsekd.teachers.embedding import banked_vectors
from sparsekd.teachers.keys import unique_keys
from sparsekd.teachers.progress import Progress, progress
from sparsekd.teachers.protocols import BatchedScorer, Encoder, Role, Scorer
from sparsekd.teachers.sparse import SparseTeacher, banked_sparse_vectors, pairwise_dot

if TYPE_CHECKING:
    import scipy.sparse

_log = logging.getLogger(__name__)

GoldSim = NDArray[np.float32]


@dataclass(frozen=True)
class PairTexts:
    """Pairs to score: pair i is (queries[query_index[i]], passages[passage_index[i]]); repeats are allowed."""

    queries: Sequence[str]
    passages: Sequence[str]
    query_index: NDArray[np.int32]
    passage_index: NDArray[np.int32]


@dataclass(frozen=True)
class ScoringCounts:
    """What was asked and done, for a manifest and the last log line; pairs are unique by content."""

    pairs: int
    pairs_scored: int
    """Not banked when this process first asked; scored since, by it or by processes that share the work."""
    pairs_reused: int
    num_truncated: int
    """Pairs (cross-encoder) or texts (dense) cut to the length limit, among those computed now."""


def bank_scores(
    teacher: Teacher, run: Run, scores: TeacherScores, embeddings: EmbeddingBank, texts: PairTexts, *, allowed: int = 0
) -> ScoringCounts:
    """Append the gold_sim of every unknown pair to ``scores``; a bi-encoder's vectors go to ``embeddings`` (or its ``sparse``) too.

    ``scores`` must be open under ``teacher_identity(teacher)``. Raises QuarantineError if more pairs than ``allowed`` end the
    processes that score them, or any text those that encode it. Raises ValueError, banking nothing of the shard, if the teacher
    gives a score that is not finite.
    """
    if teacher.kind == "dense":
        return bank_similarities(DenseEncoder(teacher, run), teacher.name, run, scores, embeddings, texts)
    if teacher.kind == "sparse":
        return bank_dot_products(SparseTeacher(teacher, run), teacher.name, run, scores, embeddings.sparse, texts)
    return bank_scorer(CrossEncoderScorer(teacher, run), teacher.name, run, scores, texts, allowed=allowed)


def bank_scorer(
    scorer: Scorer,
    name: str,
    run: Run,
    scores: TeacherScores,
    texts: PairTexts,
    *,
    by_query: bool = False,
    by_passage: bool = False,
    allowed: int = 0,
) -> ScoringCounts:
    """Fill ``scores`` from any Scorer, but for ``allowed`` pairs in quarantine; ``name`` is for the log.

    ``by_query`` hands over the pairs of one query together, for a scorer that texts of mixed lengths cost nothing; ``by_passage``
    those of one passage, for one that keeps what it made of the latest texts.
    """
    pairs = _look_up(scores, texts)
    if by_query:
        pairs = replace(pairs, order=np.arange(len(pairs.order)))  # pairs are in order of query keys
    if by_passage:
        pairs = replace(pairs, order=np.lexsort((pairs.passage_keys[:, 1], pairs.passage_keys[:, 0])))

    if isinstance(scorer, BatchedScorer):
        _commit_shards(pairs, lambda shards, bar: _score_ahead(scorer, pairs, shards, bar), name, run, scores, allowed)
    else:
        score = _by_block(lambda block: scorer.score([pairs.texts_of(position) for position in block]))
        _commit_shards(pairs, score, name, run, scores, allowed)
    return _counts(pairs, scorer.num_truncated)


def bank_similarities(
    encoder: Encoder, name: str, run: Run, scores: TeacherScores, embeddings: EmbeddingBank, texts: PairTexts
) -> ScoringCounts:
    """Fill ``scores`` from an Encoder: each text of an unknown pair is encoded once, through ``embeddings``."""

    def vectors(side: Sequence[str], role: Role) -> NDArray[np.float32]:
        return banked_vectors(encoder, embeddings, side, role, run)

    pairs = _bank_vector_scores(vectors, encoder.score_vectors, name, run, scores, texts)
    return _counts(pairs, encoder.num_truncated)


def bank_dot_products(
    teacher: SparseTeacher, name: str, run: Run, scores: TeacherScores, bank: SparseBank, texts: PairTexts
) -> ScoringCounts:
    """Fill ``scores`` from a sparse teacher: each text of an unknown pair is encoded once, through ``bank``."""

    def vectors(side: Sequence[str], role: Role) -> scipy.sparse.csr_matrix:
        return banked_sparse_vectors(teacher, bank, side, role, run)

    pairs = _bank_vector_scores(vectors, pairwise_dot, name, run, scores, texts)
    return _counts(pairs, teacher.num_truncated)


def _bank_vector_scores(
    vectors: Callable[[Sequence[str], Role], Any],
    similarity: Callable[[Any, Any], GoldSim],
    name: str,
    run: Run,
    scores: TeacherScores,
    texts: PairTexts,
) -> _Pairs:
    """Fill ``scores`` with the similarity of the rows that ``vectors`` gives for the texts of unknown pairs, each text once."""
    pairs = _look_up(scores, texts)
    if pairs.missing.any():
        query_vectors, query_row = _vectors_of(vectors, texts.queries, pairs.queries[pairs.missing], "query")
        passage_vectors, passage_row = _vectors_of(vectors, texts.passages, pairs.passages[pairs.missing], "passage")

    def score(block: Positions) -> GoldSim:
        left, right = query_row[pairs.queries[block]], passage_row[pairs.passages[block]]
        return similarity(query_vectors[left], passage_vectors[right])

    _commit_shards(pairs, _by_block(score), name, run, scores)
    return pairs


@dataclass(frozen=True)
class _Pairs:
    """The unique pairs in order of their keys, what the bank knew of them, and which it did not."""

    texts: PairTexts
    queries: Positions
    """Place in texts.queries of each unique pair's query."""
    passages: Positions
    query_keys: NDArray[np.uint64]
    passage_keys: NDArray[np.uint64]
    gold_sim: GoldSim
    """NaN where unknown; filled while scoring."""
    missing: NDArray[np.bool_]
    """Which the bank did not know."""
    order: Positions
    """All pairs in scoring order; those that are known are passed over."""

    def texts_of(self, position: int) -> tuple[str, str]:
        return self.texts.queries[self.queries[position]], self.texts.passages[self.passages[position]]

    def describe(self, position: int) -> str:
        query, passage = self.texts_of(position)
        return f"query {query[:80]!r}, passage {passage[:80]!r}"


def _look_up(scores: TeacherScores, texts: PairTexts) -> _Pairs:
    query_keys, query_first, query_rank = unique_keys(text_keys(texts.queries))
    passage_keys, passage_first, passage_rank = unique_keys(text_keys(texts.passages))
    # One integer per pair, ordered by query key, then passage key: the order the bank is fastest in.
    width = max(1, len(passage_keys))
    query_of, passage_of = np.divmod(np.unique(query_rank[texts.query_index] * width + passage_rank[texts.passage_index]), width)
    queries, passages = query_first[query_of], passage_first[passage_of]
    gold_sim = scores.lookup(query_keys[query_of], passage_keys[passage_of])
    # Characters stand for tokens here; the teacher sorts each block by tokens. A stable sort leaves ties in order of keys.
    length = _characters(texts.queries)[queries] + _characters(texts.passages)[passages]
    order = np.argsort(-length, kind="stable")
    return _Pairs(texts, queries, passages, query_keys[query_of], passage_keys[passage_of], gold_sim, np.isnan(gold_sim), order)


def _characters(texts: Sequence[str]) -> Positions:
    return np.array([len(text) for text in texts], dtype=np.int64)


def _vectors_of(
    vectors: Callable[[Sequence[str], Role], Any], texts: Sequence[str], places: Positions, role: Role
) -> tuple[Any, Positions]:
    """Return the vectors of the texts at ``places``, each once, and the row of each place."""
    used = np.unique(places)
    row_by_place = np.full(len(texts), -1, dtype=np.int64)
    row_by_place[used] = np.arange(len(used))
    return vectors([texts[place] for place in used], role), row_by_place


ScoreShards = Callable[[Iterable[Positions], Progress], Iterator[GoldSim]]


def _by_block(score: Callable[[Positions], GoldSim]) -> ScoreShards:
    """Score each shard by BLOCKs of pairs."""

    def score_shards(shards: Iterable[Positions], bar: Progress) -> Iterator[GoldSim]:
        for shard in shards:
            gold_sim = np.empty(len(shard), dtype=np.float32)
            for begin in range(0, len(shard), BLOCK):
                block = shard[begin : begin + BLOCK]
                gold_sim[begin : begin + BLOCK] = score(block)
                bar.update(len(block))
            yield gold_sim

    return score_shards


def _score_ahead(scorer: BatchedScorer, pairs: _Pairs, shards: Iterable[Positions], bar: Progress) -> Iterator[GoldSim]:
    """Score each shard while the tokens of the next are made."""

    def tokenize(shard: Positions) -> Any:
        return scorer.tokenize([pairs.texts_of(int(position)) for position in shard])

    for tokens in made_ahead(tokenize, shards):
        yield scorer.score_tokens(tokens, bar.update)


def _commit_shards(
    pairs: _Pairs, score: ScoreShards, name: str, run: Run, scores: TeacherScores, allowed: int = 0
) -> None:
    """Score the missing pairs, shared with whoever scores the same, append them shard by shard, and log counts, rate and range."""
    total, todo = len(pairs.gold_sim), int(pairs.missing.sum())
    started, num_scored = time.monotonic(), 0
    with (
        progress(f"{name}, {(total - todo) / max(1, total):.0%} of {total} reused", total=todo, unit="pairs") as bar,
        _shared(pairs, run, scores) as shards,
    ):
        for free in shards.passes():
            for gold_sim in score(free, bar):
                shard = shards.oldest
                pairs.gold_sim[shard] = gold_sim
                _append(pairs, shard, scores)
                shards.committed()
                num_scored += len(shard)
        shards.refuse_quarantined(f"teacher {name}", np.flatnonzero(pairs.missing), allowed=allowed)
    if num_scored < todo:  # others have scored the rest
        elsewhere = np.flatnonzero(np.isnan(pairs.gold_sim))
        pairs.gold_sim[elsewhere] = scores.lookup(pairs.query_keys[elsewhere], pairs.passage_keys[elsewhere])
        _log.info("teacher %s: %d pairs were scored by other processes", name, todo - num_scored)
    rate = num_scored / max(time.monotonic() - started, 1e-9)
    _log.info("teacher %s: %d pairs, scored %d, reused %d, %.1f pairs/s", name, total, num_scored, total - todo, rate)
    known = pairs.gold_sim[~np.isnan(pairs.gold_sim)]  # all, but for what is in quarantine
    if len(known):
        low, mean, high = known.min(), known.mean(dtype=np.float64), known.max()
        _log.info("teacher %s: gold_sim min %.4f, mean %.4f, max %.4f", name, low, mean, high)


def _shared(pairs: _Pairs, run: Run, scores: TeacherScores) -> SharedShards:
    def known(positions: Positions) -> NDArray[np.bool_]:
        return ~np.isnan(scores.lookup(pairs.query_keys[positions], pairs.passage_keys[positions]))

    keys = np.concatenate([pairs.query_keys, pairs.passage_keys], axis=1)
    items = Items(keys, pairs.order, pairs.missing, known, pairs.describe)
    return SharedShards(scores.folder, items, size=run.shard_pairs, part=Part(*run.part))


def _append(pairs: _Pairs, shard: Positions, scores: TeacherScores) -> None:
    def describe(row: int) -> str:
        return pairs.describe(int(shard[row]))

    scores.append(pairs.query_keys[shard], pairs.passage_keys[shard], pairs.gold_sim[shard], describe=describe)


def _counts(pairs: _Pairs, num_truncated: int) -> ScoringCounts:
    total, scored = len(pairs.gold_sim), int(pairs.missing.sum())
    return ScoringCounts(pairs=total, pairs_scored=scored, pairs_reused=total - scored, num_truncated=num_truncated)
