"""The teacher gate: before a long scoring run, a teacher shows on a judged slice that it ranks no worse than BM25.

It reranks BM25's best passages of a few judged queries; nDCG@10 is compared with that of BM25's own order and of a random one. So a
broken teacher (a wrong prompt, a fresh head, every score equal) is seen after some thousand pairs, not after hours. No torch.
Q queries, K passages of one query.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection

logger = logging.getLogger(__name__)

LONG_RUN_PAIRS = 20_000
"""Unscored pairs from which a run is long: 8 minutes at the 40 pairs/s of a small cross-encoder on 2 cores. The gate scores at most
NUM_QUERIES × DEPTH = 3,200, which stay in the bank."""
NUM_QUERIES = 64
DEPTH = 50
LEAST_QUERIES = 10
"""Fewer say nothing: the standard error of so many differences is near .1."""
CUTOFF = 10

FirstStage = Callable[[Sequence[str], int], list[list[str]]]
"""(queries, depth) -> passage_ids of each, best first."""
Score = Callable[[Sequence[str], Sequence[str]], NDArray[np.float32]]
"""(query_ids, passage_ids) -> float32 [n], the teacher's gold_sim of aligned pairs."""


@dataclass(frozen=True)
class GateFigures:
    """nDCG@10 of three orders of the same passages, means over the queries."""

    split: str
    queries: int
    teacher: float
    bm25: float
    random: float
    noise: float
    """Two standard errors of the mean difference between teacher and BM25."""

    @property
    def is_passed(self) -> bool:
        """Whether the teacher is not below BM25 by more than noise."""
        return self.teacher >= self.bm25 - self.noise


def check_teacher(name: str, collection: Collection, first_stage: FirstStage, score: Score) -> dict[str, float | int | str] | None:
    """Measure a teacher, log the figures and return them; None where too few queries are judged.

    Raises ValueError where it ranks worse than BM25 by more than two standard errors of the paired differences.
    """
    split, judged = judged_slice(collection)
    if len(judged) < LEAST_QUERIES:
        logger.info("teacher gate %s: %d judged queries, fewer than %d: not measured", name, len(judged), LEAST_QUERIES)
        return None
    figures = measure_gate(split, judged, collection, first_stage, score)
    told = (
        f"nDCG@10 {figures.teacher:.3f} reranking BM25's best {DEPTH} passages of {figures.queries} {split} queries; "
        f"BM25 {figures.bm25:.3f}, a random order {figures.random:.3f}"
    )
    logger.info("teacher gate %s: %s", name, told)
    if not figures.is_passed:
        raise ValueError(
            f"[[teachers]] {name!r} ranks worse than BM25: {told}; expected at least BM25's less {figures.noise:.3f}, two standard "
            "errors; check its model, prompts and max_length, or set gate = false to be taught by it all the same"
        )
    return asdict(figures)


def judged_slice(collection: Collection) -> tuple[str, dict[str, dict[str, int]]]:
    """Return the split and the qrels of NUM_QUERIES of its queries, those of smallest sha256(query_id).

    The split is dev where it has LEAST_QUERIES, else train; never test, which is for the evaluation.
    """
    split = "dev" if len(collection.qrels.get("dev", {})) >= LEAST_QUERIES else "train"
    qrels = collection.qrels.get(split, {})
    chosen = heapq.nsmallest(NUM_QUERIES, qrels, key=lambda query_id: hashlib.sha256(query_id.encode()).digest())
    return split, {query_id: qrels[query_id] for query_id in chosen}


def measure_gate(
    split: str, judged: Mapping[str, Mapping[str, int]], collection: Collection, first_stage: FirstStage, score: Score
) -> GateFigures:
    """Return the figures of a slice; a query of which BM25 finds nothing is 0 for all three."""
    found = first_stage([collection.queries[query_id] for query_id in judged], DEPTH)
    query_ids = [query_id for query_id, passage_ids in zip(judged, found, strict=True) for _ in passage_ids]
    scores = iter(score(query_ids, [passage_id for passage_ids in found for passage_id in passage_ids]).tolist())
    figures = []
    for grades, passage_ids in zip(judged.values(), found, strict=True):
        score_by_id = {passage_id: next(scores) for passage_id in passage_ids}
        reranked = sorted(passage_ids, key=lambda passage_id: (-score_by_id[passage_id], passage_id))
        figures.append((ndcg(reranked, grades), ndcg(passage_ids, grades), expected_ndcg(passage_ids, grades)))
    teacher_Q, bm25_Q, random_Q = np.array(figures).T
    noise = 2 * (teacher_Q - bm25_Q).std(ddof=1) / np.sqrt(len(teacher_Q))
    teacher, bm25, random = (float(figure_Q.mean()) for figure_Q in (teacher_Q, bm25_Q, random_Q))
    return GateFigures(split, len(figures), teacher=teacher, bm25=bm25, random=random, noise=float(noise))


def ndcg(passage_ids: Sequence[str], grades: Mapping[str, int]) -> float:
    """Return nDCG@10 of a ranking: DCG / ideal DCG, DCG = Σ over ranks r ≤ 10 of grade / log2(r + 1).

    Linear gain (Järvelin and Kekäläinen 2002, as trec_eval has it); unjudged passages and grades below 0 have grade 0.

    >>> ndcg(["a", "x"], {"x": 1})
    0.6309297535714575
    """
    return _dcg(_gains(passage_ids, grades)) / _ideal_dcg(grades)


def expected_ndcg(passage_ids: Sequence[str], grades: Mapping[str, int]) -> float:
    """Return the mean nDCG@10 over all orders of the passages: every rank expects the mean grade.

    >>> expected_ndcg(["a", "x"], {"x": 1}) == (1 + ndcg(["a", "x"], {"x": 1})) / 2
    True
    """
    gains_K = _gains(passage_ids, grades)
    return _dcg(np.full(len(gains_K), gains_K.mean())) / _ideal_dcg(grades) if len(gains_K) else 0.0


def _gains(passage_ids: Sequence[str], grades: Mapping[str, int]) -> NDArray[np.float64]:
    return np.array([max(0, grades.get(passage_id, 0)) for passage_id in passage_ids], dtype=np.float64)


def _ideal_dcg(grades: Mapping[str, int]) -> float:
    return _dcg(np.array(sorted((max(0, grade) for grade in grades.values()), reverse=True), dtype=np.float64))


def _dcg(gains_K: NDArray[np.float64]) -> float:
    top = gains_K[:CUTOFF]
    return float((top / np.log2(np.arange(2, len(top) + 2))).sum())
