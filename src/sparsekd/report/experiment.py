"""The facts of one experiment's page, as far as the experiment has come; what is not there yet is said in ``missing``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsekd.artifact import Artifact, key_of
from sparsekd.evaluation.examples import EXAMPLES, choose_queries, examples
from sparsekd.evaluation.measures import MEASURES
from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.report.results import BM25, STUDENT, UNTRAINED, Results, System, read_results
from sparsekd.report.teaching import Teaching, read_teaching
from sparsekd.report.withheld import without_own_terms

PASSAGES_SHOWN = 3


@dataclass(frozen=True)
class Training:
    """The trainer's log: the entries of training steps, those of dev measurements, and the seconds of the run."""

    steps: list[dict[str, float]]
    dev: list[dict[str, float]]
    seconds: float | None
    artifact: Artifact


@dataclass(frozen=True)
class Hit:
    """A passage that a system ranked."""

    passage_id: str
    text: str | None
    """None where the collection's texts may not be published."""
    score: float
    grade: int | None
    """None: not judged."""


@dataclass(frozen=True)
class Example:
    """One query side by side: what systems rank first, and what the student made of query and passage."""

    query_id: str
    query: str | None
    """None where the collection's texts may not be published."""
    reason: str
    ndcg: dict[str, float]
    """System -> nDCG@10 of this query."""
    hits: dict[str, list[Hit]]
    num_relevant: int
    terms: dict[str, Any]
    """What ``examples.json`` says of it: terms of both sides and the products that make the score; without texts, no own terms."""


@dataclass(frozen=True)
class Stage:
    """A stage's artifact as provenance names it; ``manifest`` None where it is not made."""

    name: str
    key: str
    manifest: Mapping[str, Any] | None


@dataclass(frozen=True)
class ExperimentFacts:
    """Everything on an experiment's page."""

    collection: str
    counts: dict[str, int]
    """The collection's."""
    has_texts: bool
    """Whether the collection's texts may be shown."""
    results: Results
    training: Training | None
    teaching: Teaching | None
    examples: list[Example]
    stages: list[Stage]
    identities: dict[str, str]
    """Teacher -> digest of its identity."""
    recipe: list[tuple[str, Any]]
    """(dotted key, value) of what the recipe says, overrides applied, defaults left out."""
    overrides: list[str]
    warnings: list[str]
    """What stages warned of, each once."""
    missing: list[str]


def read_experiment(experiment: Experiment) -> ExperimentFacts:
    """Read what there is. Loads the student only where an evaluation is finished and its examples are not made yet."""
    plan = experiment.plan
    results, teaching, training = read_results(plan), read_teaching(experiment), read_training(plan)
    found, stages = _read_examples(experiment, results), list(_stages(plan))
    warned = [warning for stage in stages for warning in (stage.manifest or {}).get("warnings", [])]
    return ExperimentFacts(
        collection=plan.collection_folder.name,
        counts=plan.collection.counts,
        has_texts=plan.recipe.collection.publish_texts,
        results=results,
        training=training,
        teaching=teaching,
        examples=found,
        stages=stages,
        identities={name: key_of(identity) for name, identity in plan.teacher_identities.items()},
        recipe=list(settings(plan)),
        overrides=list(plan.overrides),
        warnings=list(dict.fromkeys(warned)),
        missing=list(_missing(results, teaching, training, found)),
    )


def read_training(plan: Plan) -> Training | None:
    """Return the student's log, None before it is trained."""
    student = plan.hit("students", plan.student_fields)
    if student is None:
        return None
    log = json.loads((student.folder / "training.json").read_text(encoding="utf-8"))
    return Training(
        steps=[entry for entry in log if "loss" in entry],
        dev=[entry for entry in log if "dev_nDCG@10" in entry],
        seconds=next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None),
        artifact=student,
    )


def _read_examples(experiment: Experiment, results: Results) -> list[Example]:
    plan, student = experiment.plan, results.systems.get(STUDENT)
    evaluation, trained = plan.hit("evaluations", plan.evaluation_fields()), plan.hit("students", plan.student_fields)
    if student is None or evaluation is None or trained is None:
        return []
    best = results.best_teacher
    systems = [results.systems.get(BM25), best, results.systems.get(UNTRAINED)]
    bm25, teacher, untrained = (system.values[MEASURES[0]] if system else {} for system in systems)
    chosen = choose_queries(student.values[MEASURES[0]], bm25, teacher, untrained)
    made = examples(experiment, evaluation, chosen, student.rankings)
    told = json.loads((made.folder / EXAMPLES).read_text(encoding="utf-8"))["queries"]
    shown = {name: system for name, system in results.systems.items() if system in (results.systems.get(BM25), best, student)}
    order = {BM25: 0, STUDENT: 2}
    shown = {name: shown[name] for name in sorted(shown, key=lambda name: order.get(name, 1))}
    return [_example(experiment, results, shown, each) for each in told]


def _example(experiment: Experiment, results: Results, systems: Mapping[str, System], told: dict[str, Any]) -> Example:
    query_id = told["query_id"]
    grades, collection = results.qrels[query_id], experiment.collection
    has_texts = experiment.recipe.collection.publish_texts
    hits = {
        name: [
            Hit(passage_id, collection.passages[passage_id] if has_texts else None, float(score), grades.get(passage_id))
            for passage_id, score in zip(ranking.passage_ids[:PASSAGES_SHOWN], ranking.scores, strict=False)
        ]
        for name, system in systems.items()
        for ranking in [system.rankings.get(query_id)]
        if ranking is not None
    }
    return Example(
        query_id=query_id,
        query=collection.queries[query_id] if has_texts else None,
        reason=told["reason"],
        ndcg={name: system.values[MEASURES[0]][query_id] for name, system in results.systems.items()},
        hits={name: hits.get(name, []) for name in systems},
        num_relevant=sum(grade >= 1 for grade in grades.values()),
        terms=told if has_texts else without_own_terms(told),
    )


def _stages(plan: Plan) -> Iterator[Stage]:
    for kind, fields in plan.artifacts(["candidates", "tables", "students", "evaluations"]):
        hit = plan.hit(kind, fields)
        yield Stage(kind, key_of(fields), hit.manifest if hit else None)
    for name, fields in plan.system_fields().items():
        run = plan.hit("runs", fields)
        yield Stage(f"run of {name}", key_of(fields), run.manifest if run else None)


def settings(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what a recipe says, overrides applied, defaults left out."""
    document = plan.recipe.model_dump(mode="json", exclude_unset=True, exclude={"study"})
    yield from _flat(document, "")


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _flat(each, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for position, each in enumerate(value):
            yield from _flat(each, f"{prefix}.{position}")
    else:
        yield prefix, value


def _missing(results: Results, teaching: Teaching | None, training: Training | None, found: list[Example]) -> Iterator[str]:
    if teaching is None:
        yield "candidates and teacher scores: not made yet; make teacher-scores makes them"
    elif teaching.table is None:
        yield "the score table: candidates are mined, but not scored yet; make teacher-scores goes on"
    if training is None:
        yield "the trained student: make train-student trains it"
    for name in results.missing:
        yield f"the ranking of {name}: not measured yet; make evaluate measures it"
    for name in results.unmeasurable:
        yield f"a ranking of teacher {name}: imported scores know no other pairs"
    if not found and not results.missing and training is not None:
        yield "examples: the evaluation is not finished; make evaluate finishes it"
    without = [results.systems[name] for name in (STUDENT, UNTRAINED, BM25) if name in results.systems]
    without = [system for system in without if system.vocabulary is None]
    if without:
        names, keys = (", ".join(part) for part in zip(*((system.name, system.run.key) for system in without), strict=True))
        yield (
            f"index bytes, rates and document frequencies of {names}: measured by an earlier version, which did not keep them; "
            f"remove the runs {keys} and the evaluation, and make evaluate measures them again"
        )
