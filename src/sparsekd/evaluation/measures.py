"""nDCG@10, RR@10 and R@100 by ir-measures, of the order we rank in.

trec_eval sorts by score and breaks ties by doc_id descending, the MS MARCO script ascending, and trec_eval reads scores as
float32. So both are given minus the rank as the score: what is measured is our order, ties by passage_id ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ir_measures

from sparsekd.evaluation.runs import Rankings

MEASURES = ("nDCG@10", "RR@10", "R@100")
"""The figures, in the order they are shown."""
DEPTH = 100
"""Passages ranked per query: what the deepest of the measures reads."""


def measure(rankings: Rankings, qrels: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Return the mean of each of MEASURES over all judged queries, 0 for a judged query without results.

    ``qrels``: query_id -> passage_id -> grade. nDCG@10 = DCG / ideal DCG, DCG = sum over ranks r <= 10 of grade / log2(r + 1),
    linear gain (Järvelin and Kekäläinen 2002, as trec_eval has it). RR@10 = 1 / rank of the first passage of grade >= 1, 0
    beyond rank 10. R@100 = share of the passages of grade >= 1 within rank 100. Unjudged passages and grades below 0 have
    grade 0; queries without judgements are not measured. Raises ValueError if nothing is judged.
    """
    trec_eval, ms_marco, run = _evaluators(rankings, qrels)
    means = {str(name): float(mean) for part in (trec_eval, ms_marco) for name, mean in part.calc_aggregate(run).items()}
    return {name: means[name] for name in MEASURES}


def measure_queries(rankings: Rankings, qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Return each of MEASURES of every judged query, query_id -> value in the order of ``qrels``; ``measure`` is their means."""
    trec_eval, ms_marco, run = _evaluators(rankings, qrels)
    values = {name: dict.fromkeys(qrels, 0.0) for name in MEASURES}  # a query without results has no line below
    for part in (trec_eval, ms_marco):
        for each in part.iter_calc(run):
            values[str(each.measure)][each.query_id] = float(each.value)
    return values


def _evaluators(rankings: Rankings, qrels: Mapping[str, Mapping[str, int]]) -> tuple[Any, Any, dict[str, dict[str, float]]]:
    """Return what measures by trec_eval's and by MS MARCO's definitions, and the rankings as they take them."""
    if not qrels:
        raise ValueError("measures: no judged query; expected qrels with at least one")
    judged = {query_id: {passage_id: max(0, grade) for passage_id, grade in grades.items()} for query_id, grades in qrels.items()}
    run = {
        query_id: {passage_id: -float(rank) for rank, passage_id in enumerate(rankings[query_id].passage_ids, start=1)}
        for query_id in judged
        if query_id in rankings and len(rankings[query_id])
    }
    # Named providers: ir-measures' own choice would change with what else is installed. trec_eval has no cutoff for RR.
    trec_eval = ir_measures.pytrec_eval.evaluator([ir_measures.nDCG @ 10, ir_measures.R @ 100], judged)
    ms_marco = ir_measures.msmarco.evaluator([ir_measures.RR @ 10], judged)
    return trec_eval, ms_marco, run
