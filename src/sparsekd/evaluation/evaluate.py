"""Measures every system of a recipe on one split: BM25, the teachers, the untrained student, the student of each round.

Each system's ranking is an artifact of its own under ``runs/``, so a second student costs no second look at the others.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsekd.artifact import Artifact, key_of, publish, read_manifest, verify, write_json_atomically
from sparsekd.device import prepare_device
from sparsekd.evaluation.measures import DEPTH, measure
from sparsekd.evaluation.runs import Ranking, Rankings, write_trec_run
from sparsekd.evaluation.systems import (
    bm25_index,
    bm25_rankings,
    dense_rankings,
    judgements,
    rerank_rankings,
    sparse_teacher_rankings,
)
from sparsekd.evaluation.vocabulary import VOCABULARY, dim_terms, student_vocabulary, vocabulary_facts
from sparsekd.experiment import Experiment, student
from sparsekd.recipe import BM25Teacher, FileTeacher, Teacher

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


@dataclass(frozen=True)
class _Ranked:
    """What a system gave: its ranking, how sparse it is, which terms its postings are of, and what it took."""

    rankings: Rankings
    sparsity: dict[str, float] = field(default_factory=dict)
    vocabulary: dict[str, Any] | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    """Seconds and counts of this machine; in the manifest, since they differ from run to run."""


def evaluate(experiment: Experiment) -> Artifact:
    """Find or make the evaluation: ``metrics.json`` and one TREC run file per system.

    Trains the student first where it is measured and not there yet.
    """
    plan, fields = experiment.plan, experiment.plan.evaluation_fields()
    hit = plan.hit("evaluations", fields)
    if hit is not None:
        logger.info("evaluation %s: hit", hit.key)
        return hit
    judgements(experiment.recipe, experiment.collection, experiment.recipe.evaluation.split)  # refused before training
    for teacher in experiment.recipe.teachers:
        if isinstance(teacher, FileTeacher):
            logger.info("teacher:%s is not measured: imported scores rank only what they hold", teacher.name)
    trained = {"student": student(experiment).key} if experiment.recipe.evaluation.students else {}
    runs = {name: _system(experiment, name, system) for name, system in plan.system_fields().items()}
    figures = {name: json.loads((run.folder / METRICS).read_text(encoding="utf-8")) for name, run in runs.items()}
    folder = plan.folder("evaluations", fields)
    extra = {**experiment.provenance(), **trained}
    with publish(folder, kind="evaluation", fields=fields, extra=extra) as temporary:
        write_json_atomically(temporary / METRICS, {"split": experiment.recipe.evaluation.split, "systems": figures})
        for name, run in runs.items():
            shutil.copyfile(run.folder / "run.trec", temporary / f"{name.replace(':', '-')}.trec")
    return Artifact(folder, read_manifest(folder))


def _system(experiment: Experiment, name: str, fields: dict[str, Any]) -> Artifact:
    """Find or make one system's ranking and figures."""
    plan = experiment.plan
    hit = plan.hit("runs", fields)
    if hit is not None:
        logger.info("evaluation of %s %s: hit", name, hit.key)
        return hit
    folder = plan.folder("runs", fields)
    started = time.monotonic()
    qrels = judgements(experiment.recipe, experiment.collection, experiment.recipe.evaluation.split)
    ranked = _rank(experiment, name)
    figures = {**measure(ranked.rankings, qrels), **ranked.sparsity}
    measured = {"measured": ranked.measured} if ranked.measured else {}
    extra = {**experiment.provenance(), "wall_seconds": time.monotonic() - started, **measured}
    with publish(folder, kind="run", fields=fields, extra=extra) as temporary:
        write_trec_run(temporary / "run.trec", ranked.rankings, f"sparsekd-{key_of(fields)}")
        write_json_atomically(temporary / METRICS, figures)
        if ranked.vocabulary is not None:
            write_json_atomically(temporary / VOCABULARY, ranked.vocabulary)
        plan.require_unchanged("runs")
    logger.info("evaluation of %s: %s", name, figures)
    return Artifact(folder, read_manifest(folder))


def _rank(experiment: Experiment, name: str) -> _Ranked:
    recipe, collection, split = experiment.recipe, experiment.collection, experiment.recipe.evaluation.split
    if name.startswith("student"):
        return _rank_student(experiment, load_student(experiment, name))
    teacher = None if name == "bm25" else experiment.teacher(name.removeprefix("teacher:"))
    assert not isinstance(teacher, FileTeacher), name
    if teacher is None or isinstance(teacher, BM25Teacher):
        return _rank_bm25(experiment, teacher)
    if isinstance(teacher, Teacher) and teacher.kind == "dense":
        return _Ranked(dense_rankings(teacher, recipe, collection, split, experiment.embedding_bank))
    if isinstance(teacher, Teacher) and teacher.kind == "sparse":
        return _Ranked(*sparse_teacher_rankings(teacher, recipe, collection, split, experiment.embedding_bank))
    bm25 = bm25_rankings(recipe, collection, split)
    return _Ranked(rerank_rankings(teacher, recipe, collection, bm25, experiment.score_bank))


def _rank_bm25(experiment: Experiment, teacher: BM25Teacher | None) -> _Ranked:
    recipe, collection = experiment.recipe, experiment.collection
    index = bm25_index(recipe, collection, teacher)
    started = time.perf_counter()
    rankings = bm25_rankings(recipe, collection, recipe.evaluation.split, index=index)
    measured = {"queries": len(rankings), "search_seconds": time.perf_counter() - started}
    facts = vocabulary_facts(index.document_frequency, len(collection.passages))
    return _Ranked(_to_depth(rankings), vocabulary=facts, measured=measured)


def _to_depth(rankings: Rankings) -> dict[str, Ranking]:
    """Cut BM25's rankings to DEPTH: how deep a teacher reranks is no part of their key."""
    return {query_id: Ranking(hits.passage_ids[:DEPTH], hits.scores[:DEPTH]) for query_id, hits in rankings.items()}


def load_student(experiment: Experiment, name: str) -> SparseEncoder:
    """Return the model of a system that is a student, trained or not, of whichever round, on the recipe's device."""
    from sparsekd.training.fit import untrained_student

    device = prepare_device(experiment.recipe.run)
    if name == "student:untrained":
        return untrained_student(experiment.recipe, experiment.collection).to(device)
    from sentence_transformers import SparseEncoder

    plan = experiment.plan.plan_by_student[name]
    trained = plan.hit("students", plan.student_fields) or student(Experiment(plan))
    verify(trained)
    return SparseEncoder(str(trained.folder), device=device)


def _rank_student(experiment: Experiment, model: SparseEncoder) -> _Ranked:
    from sparsekd.evaluation.student import encode_csr, of_unit_length, sparse_rankings, sparsity

    collection, run = experiment.collection, experiment.recipe.run
    qrels = judgements(experiment.recipe, collection, experiment.recipe.evaluation.split)
    query_ids, passage_ids = list(qrels), list(collection.passages)
    model.eval()
    queries = [collection.queries[query_id] for query_id in query_ids]
    how: dict[str, Any] = {"batch_tokens": run.batch_tokens, "fused": run.fused_head, "packed": run.packed}
    times = [time.perf_counter()]
    query_csr = encode_csr(model, queries, role="query", **how)
    times.append(time.perf_counter())
    passages = list(collection.passages.values())
    passage_csr = encode_csr(model, passages, role="passage", **how)
    times.append(time.perf_counter())
    figures, vocabulary = sparsity(query_csr, passage_csr), student_vocabulary(passage_csr, dim_terms(model))
    if model.similarity_fn_name == "cosine":  # as the losses over pairs leave it
        query_csr, passage_csr = of_unit_length(query_csr), of_unit_length(passage_csr)
    searching = time.perf_counter()
    rankings = sparse_rankings(query_csr, passage_csr, query_ids, passage_ids)
    measured = {
        "queries": len(queries),
        "passages": len(passages),
        "encode_queries_seconds": times[1] - times[0],
        "encode_passages_seconds": times[2] - times[1],
        "search_seconds": time.perf_counter() - searching,
        "device": run.device,
        "threads": run.threads,
    }
    return _Ranked(rankings, figures, vocabulary, measured)
