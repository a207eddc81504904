"""The stopping rule: nDCG@10 of reranking BM25's candidates for dev queries, by the model as it is."""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ir_measures
from sentence_transformers.base.evaluation import BaseEvaluator

from sparsekd.collection.beir import Collection
from sparsekd.recipe import TrainTeacher
from sparsekd.training.development import FirstStage

logger = logging.getLogger(__name__)

METRIC = "ndcg@10"
_PAIRS = 64  # per forward pass, which groups them by length


class DevReranking(BaseEvaluator):
    """Reranks ``dev_depth`` BM25 passages of ``dev_queries`` dev queries; what the trainer asks between steps."""

    def __init__(self, section: TrainTeacher, collection: Collection, first_stage: FirstStage) -> None:
        """Ask the first stage once. Raises ValueError without dev judgements, or where it finds no judged passage."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.primary_metric = METRIC
        judged = collection.qrels.get("dev")
        if not judged:
            there = ", ".join(name for name, qrels in collection.qrels.items() if qrels) or "none"
            raise ValueError(
                f"[train_teacher] dev_steps = {section.dev_steps}: no dev query has judgements (splits with judgements: {there}); "
                "expected qrels/dev.tsv, whose nDCG@10 says when to stop; move some train queries there"
            )
        chosen = heapq.nsmallest(section.dev_queries, judged, key=lambda query_id: hashlib.sha256(query_id.encode()).digest())
        found = first_stage([collection.queries[query_id] for query_id in chosen], section.dev_depth)
        self._pool = {query_id: list(ids) for query_id, ids in zip(chosen, found, strict=True)}
        self._qrels = {query_id: {each: max(0, grade) for each, grade in judged[query_id].items()} for query_id in chosen}
        self._pairs = [
            (collection.queries[query_id], collection.passages[each]) for query_id, ids in self._pool.items() for each in ids
        ]
        self.bm25 = self._ndcg(self._pool)
        best = self._ndcg({query_id: self._by_grade(query_id) for query_id in chosen})
        if not best:
            raise ValueError(
                f"[train_teacher] dev_depth = {section.dev_depth}: BM25's best passages of {len(chosen)} dev queries hold none "
                "that is judged relevant, so every order of them has nDCG@10 0; raise dev_depth or dev_queries"
            )
        logger.info(
            "dev: %d queries, %d pairs to rerank; nDCG@10 of BM25 %.4f, at best %.4f",
            len(chosen),
            len(self._pairs),
            self.bm25,
            best,
        )

    def __call__(self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1) -> dict[str, float]:
        """Return {METRIC: mean over the queries}, 0 for a query without passages; ties keep BM25's order."""
        scores = iter(model.predict(self._pairs, batch_size=_PAIRS, show_progress_bar=False).tolist())
        ranked = {}
        for query_id, ids in self._pool.items():
            score_by_id = {each: next(scores) for each in ids}
            ranked[query_id] = sorted(ids, key=lambda each: -score_by_id[each])
        return {METRIC: self._ndcg(ranked)}

    def _by_grade(self, query_id: str) -> list[str]:
        return sorted(self._pool[query_id], key=lambda each: -self._qrels[query_id].get(each, 0))

    def _ndcg(self, ranked: Mapping[str, Sequence[str]]) -> float:
        """Mean nDCG@10 as trec_eval has it, linear gain. Minus the rank stands for the score: trec_eval breaks ties its own way."""
        run = {
            query_id: {each: -float(rank) for rank, each in enumerate(ids, start=1)} for query_id, ids in ranked.items() if ids
        }
        evaluator = ir_measures.pytrec_eval.evaluator([ir_measures.nDCG @ 10], self._qrels)
        (ndcg,) = evaluator.calc_aggregate(run).values()
        return float(ndcg)
