"""A dozen test queries of a finished evaluation to look at: why each was chosen, and the student's terms for it.

Published as ``examples/KEY/examples.json``, ids and terms only; what the systems ranked is in the evaluation's run files. Making it
loads the student and encodes a query and a passage for each example.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsekd.artifact import Artifact, publish, read_manifest, write_json_atomically
from sparsekd.evaluation.runs import Rankings
from sparsekd.experiment import Experiment

if TYPE_CHECKING:
    import scipy.sparse
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)

EXAMPLES = "examples.json"
EXAMPLES_VERSION = 1
"""Raised when the same evaluation would give other examples or terms."""
PER_REASON = 3
TERMS_KEPT = 40
"""Of a vector, by weight; the terms that made a score are kept all."""

Values = Mapping[str, float]
"""query_id -> a measure."""


def examples(experiment: Experiment, evaluation: Artifact, chosen: Mapping[str, str], best: Rankings) -> Artifact:
    """Find or make the examples of a finished evaluation. ``chosen``: query_id -> reason; ``best``: the student's ranking."""
    plan = experiment.plan
    fields = {"stage": "examples", "version": EXAMPLES_VERSION, "evaluation": evaluation.key, "chosen": dict(chosen)}
    hit = plan.hit("examples", fields)
    if hit is not None:
        return hit
    from sparsekd.evaluation.evaluate import load_student

    model = load_student(experiment, "student")
    top = {query_id: best[query_id].passage_ids[0] for query_id in chosen if query_id in best and len(best[query_id])}
    folder = plan.folder("examples", fields)
    with publish(folder, kind="examples", fields=fields, extra=experiment.provenance()) as temporary:
        write_json_atomically(temporary / EXAMPLES, {"queries": _explained(experiment, model, chosen, top)})
    logger.info("examples %s: %d queries", folder.name, len(chosen))
    return Artifact(folder, read_manifest(folder))


def choose_queries(
    student: Values, bm25: Values, teacher: Values, untrained: Values, per_reason: int = PER_REASON
) -> dict[str, str]:
    """Return query_id -> reason of up to four times ``per_reason`` queries, each once.

    ``best``: the student's highest values, those farthest above BM25 first. ``worst``: its lowest, those farthest below the teacher
    first. ``changed``: farthest from the untrained student, either way. ``random``: of smallest sha256(query_id) among the rest.
    Ties go by query_id. A system that was not measured has no values and leaves the ties to the next rule.

    >>> choose_queries({"a": 1.0, "b": 0.0, "c": 0.5}, {}, {}, {"c": 0.1}, per_reason=1)
    {'a': 'best', 'b': 'worst', 'c': 'changed'}
    """
    rules: dict[str, Callable[[str], Any]] = {
        "best": lambda q: (-student[q], bm25.get(q, 0.0) - student[q], q),
        "worst": lambda q: (student[q], student[q] - teacher.get(q, 0.0), q),
        "changed": lambda q: (-abs(student[q] - untrained.get(q, student[q])), q),
        "random": lambda q: hashlib.sha256(q.encode("utf-8")).hexdigest(),
    }
    chosen: dict[str, str] = {}
    for reason, rule in rules.items():
        rest = sorted((query_id for query_id in student if query_id not in chosen), key=rule)
        chosen |= dict.fromkeys(rest[:per_reason], reason)
    return chosen


def _explained(
    experiment: Experiment, model: SparseEncoder, chosen: Mapping[str, str], top: Mapping[str, str]
) -> list[dict[str, Any]]:
    from sparsekd.evaluation.student import encode_csr, of_unit_length
    from sparsekd.evaluation.vocabulary import dim_terms

    run, collection, terms = experiment.recipe.run, experiment.collection, dim_terms(model)
    how: dict[str, Any] = {"batch_tokens": run.batch_tokens, "fused": run.fused_head, "packed": run.packed}
    queries = [collection.queries[query_id] for query_id in chosen]
    passages = [collection.passages[top[query_id]] if query_id in top else "" for query_id in chosen]
    query_csr = encode_csr(model, queries, role="query", **how)
    passage_csr = encode_csr(model, passages, role="passage", **how)
    if model.similarity_fn_name == "cosine":
        query_csr, passage_csr = of_unit_length(query_csr), of_unit_length(passage_csr)
    found = []
    for row, (query_id, reason) in enumerate(chosen.items()):
        query, passage = _vector(query_csr, row), _vector(passage_csr, row)
        example: dict[str, Any] = {
            "query_id": query_id,
            "reason": reason,
            "query_active_dims": len(query),
            "query_terms": _by_weight(query, terms, _own_dims(model, queries[row])),
        }
        if query_id in top:
            matches = sorted(
                ((dim, query[dim] * passage[dim]) for dim in query.keys() & passage.keys()), key=lambda m: (-m[1], m[0])
            )
            example |= {
                "passage_id": top[query_id],
                "passage_active_dims": len(passage),
                "passage_terms": _by_weight(passage, terms, _own_dims(model, passages[row])),
                "matches": [[terms[dim], query[dim], passage[dim], product] for dim, product in matches],
            }
        found.append(example)
    return found


def _vector(csr: scipy.sparse.csr_matrix, row: int) -> dict[int, float]:
    """Weight by active dim."""
    part = slice(csr.indptr[row], csr.indptr[row + 1])
    pairs = zip(csr.indices[part].tolist(), np.asarray(csr.data[part], dtype=np.float64).tolist(), strict=True)
    return {dim: weight for dim, weight in pairs if weight}


def _by_weight(vector: Mapping[int, float], terms: Sequence[str], own: set[int] | None) -> list[list[Any]]:
    """[term, weight, whether the text itself holds it] of the heaviest dims; None where dims are no terms."""
    heaviest = sorted(vector.items(), key=lambda item: (-item[1], item[0]))[:TERMS_KEPT]
    return [[terms[dim], weight, None if own is None else dim in own] for dim, weight in heaviest]


def _own_dims(model: SparseEncoder, text: str) -> set[int] | None:
    """Dims of the text's own words, all of them, also of those beyond the student's limit of tokens."""
    from sparsekd.training.rows import dims_are_terms, tokenizer_of

    if not dims_are_terms(model):
        return None
    return set(tokenizer_of(model)(text, truncation=False, add_special_tokens=False, verbose=False)["input_ids"])
