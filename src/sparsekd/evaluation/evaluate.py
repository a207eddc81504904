"""Measures every system of a recipe on one split: BM25, the teachers, the untrained student, the student of each round.

Each system's ranking is an artifact of its own under ``runs/``, so a second student costs no second look at the others.
"""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

from sparsekd.artifact import Artifact, key_of, publish, read_manifest, verify, write_json_atomically
from sparsekd.device import prepare_device
from sparsekd.evaluation.measures import DEPTH, measure
from sparsekd.evaluation.runs import Ranking, Rankings, write_trec_run
from sparsekd.evaluation.systems import bm25_rankings, dense_rankings, judgements, rerank_rankings, sparse_teacher_rankings
from sparsekd.experiment import Experiment, student
from sparsekd.recipe import BM25Teacher, FileTeacher, Teacher

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


def evaluate(experiment: Experiment) -> Artifact:
    """Find or make the evaluation: ``metrics.json`` and one TREC run file per system. Trains the student first if it must."""
    plan, fields = experiment.plan, experiment.plan.evaluation_fields()
    hit = plan.hit("evaluations", fields)
    if hit is not None:
        logger.info("evaluation %s: hit", hit.key)
        return hit
    judgements(experiment.recipe, experiment.collection, experiment.recipe.evaluation.split)  # refused before training
    for teacher in experiment.recipe.teachers:
        if isinstance(teacher, FileTeacher):
            logger.info("teacher:%s is not measured: imported scores rank only what they hold", teacher.name)
    trained = student(experiment)
    runs = {name: _system(experiment, name, system) for name, system in plan.system_fields().items()}
    figures = {name: json.loads((run.folder / METRICS).read_text(encoding="utf-8")) for name, run in runs.items()}
    folder = plan.folder("evaluations", fields)
    extra = {**experiment.provenance(), "student": trained.key}
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
    qrels = judgements(experiment.recipe, experiment.collection, experiment.recipe.evaluation.split)
    rankings, sparsity = _rank(experiment, name)
    figures = {**measure(rankings, qrels), **sparsity}
    with publish(folder, kind="run", fields=fields, extra=experiment.provenance()) as temporary:
        write_trec_run(temporary / "run.trec", rankings, f"sparsekd-{key_of(fields)}")
        write_json_atomically(temporary / METRICS, figures)
    logger.info("evaluation of %s: %s", name, figures)
    return Artifact(folder, read_manifest(folder))


def _rank(experiment: Experiment, name: str) -> tuple[Rankings, dict[str, float]]:
    recipe, collection, split = experiment.recipe, experiment.collection, experiment.recipe.evaluation.split
    if name == "bm25":
        return _to_depth(bm25_rankings(recipe, collection, split)), {}
    if name.startswith("teacher:"):
        teacher = experiment.teacher(name.removeprefix("teacher:"))
        assert not isinstance(teacher, FileTeacher), name
        if isinstance(teacher, BM25Teacher):
            return _to_depth(bm25_rankings(recipe, collection, split, teacher)), {}
        if isinstance(teacher, Teacher) and teacher.kind == "dense":
            return dense_rankings(teacher, recipe, collection, split, experiment.embedding_bank), {}
        if isinstance(teacher, Teacher) and teacher.kind == "sparse":
            return sparse_teacher_rankings(teacher, recipe, collection, split, experiment.embedding_bank)
        bm25 = bm25_rankings(recipe, collection, split)
        return rerank_rankings(teacher, recipe, collection, bm25, experiment.score_bank), {}
    return _rank_student(experiment, _load_student(experiment, name))


def _to_depth(rankings: Rankings) -> dict[str, Ranking]:
    """Cut BM25's rankings to DEPTH: how deep a teacher reranks is no part of their key."""
    return {query_id: Ranking(hits.passage_ids[:DEPTH], hits.scores[:DEPTH]) for query_id, hits in rankings.items()}


def _load_student(experiment: Experiment, name: str) -> SparseEncoder:
    from sparsekd.training.fit import untrained_student

    device = prepare_device(experiment.recipe.run)
    if name == "student:untrained":
        return untrained_student(experiment.recipe, experiment.collection).to(device)
    from sentence_transformers import SparseEncoder

    plan = experiment.plan.plan_by_student[name]
    trained = plan.hit("students", plan.student_fields) or student(Experiment(plan))
    verify(trained)
    return SparseEncoder(str(trained.folder), device=device)


def _rank_student(experiment: Experiment, model: SparseEncoder) -> tuple[Rankings, dict[str, float]]:
    from sparsekd.evaluation.student import encode_csr, of_unit_length, sparse_rankings, sparsity

    collection, run = experiment.collection, experiment.recipe.run
    qrels = judgements(experiment.recipe, collection, experiment.recipe.evaluation.split)
    query_ids, passage_ids = list(qrels), list(collection.passages)
    model.eval()
    queries = [collection.queries[query_id] for query_id in query_ids]
    how: dict[str, Any] = {"batch_tokens": run.batch_tokens, "fused": run.fused_head, "packed": run.packed}
    query_csr = encode_csr(model, queries, role="query", **how)
    passages = list(collection.passages.values())
    passage_csr = encode_csr(model, passages, role="passage", **how)
    figures = sparsity(query_csr, passage_csr)
    if model.similarity_fn_name == "cosine":  # as the losses over pairs leave it
        query_csr, passage_csr = of_unit_length(query_csr), of_unit_length(passage_csr)
    return sparse_rankings(query_csr, passage_csr, query_ids, passage_ids), figures
