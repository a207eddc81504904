"""The stages: candidates, the score table, the student, each found or made."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd.artifact import Artifact, key_of, naming, publish, read_manifest, write_json_atomically
from sparsekd.bank.manifest import locked
from sparsekd.bank.sharing import QuarantineError
from sparsekd.doctor import describe, examined
from sparsekd.experiment.scoring import score_pairs
from sparsekd.experiment.sources import Experiment, MinerVectors, TeacherVectors
from sparsekd.experiment.worker import share_stage_1
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.building import build_table, scored_teachers
from sparsekd.labels.complete import complete
from sparsekd.labels.rows import choose_rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.labels.vectors import vocabulary_digest
from sparsekd.mining.candidates import CandidateRow, Candidates
from sparsekd.plan import Plan
from sparsekd.recipe import AnyTeacher, FileTeacher

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)


def candidates(experiment: Experiment) -> Candidates:
    """Find or mine the candidates; of a later round, after finding or training the student that mines in it."""
    plan, fields = experiment.plan, experiment.plan.candidates_fields
    hit = plan.hit("candidates", fields)
    if hit is not None:
        logger.info("candidates %s: hit", hit.key)
        return Candidates.open(hit.folder)
    from sparsekd.mining.miners import mine_candidates, share_searches

    if plan.previous is not None:
        number = experiment.recipe.mining.rounds
        logger.info("candidates of round %d are mined with the student of round %d", number, number - 1)
        student(Experiment(plan.previous))
    source = MinerVectors(experiment)

    def check_inputs() -> None:
        plan.require_unchanged("candidates")

    if experiment.recipe.run.part[1] > 1:
        share_searches(
            plan.mined_recipe,
            experiment.collection,
            cache=plan.cache,
            fields=fields,
            source=source,
            extra=experiment.provenance(),
            check_inputs=check_inputs,
        )  # what follows is one process's
    with _one_process(plan.folder("candidates", fields)):
        if (hit := plan.hit("candidates", fields)) is not None:
            return Candidates.open(hit.folder)
        return mine_candidates(
            plan.mined_recipe,
            experiment.collection,
            cache=plan.cache,
            fields=fields,
            source=source,
            extra=experiment.provenance(),
            check_inputs=check_inputs,
        )


def score_table(experiment: Experiment) -> ScoreTable:
    """Find or build the score table, asking teachers only for what no run has asked them before."""
    plan = experiment.plan
    hit = plan.hit("tables", plan.table_fields)
    if hit is not None:
        logger.info("table %s: hit, no pair scored", hit.key)
        return _examined(experiment, ScoreTable.open(hit.folder))
    if experiment.recipe.run.is_shared:
        share_stage_1(experiment)
        return ScoreTable.open(plan.folder("tables", plan.table_fields))  # which the workers have examined
    mined = candidates(experiment)
    started = time.monotonic()
    teachers = [experiment.teacher(name) for name in scored_teachers(experiment.recipe)]
    scored, gates = score_pairs(experiment, mined, teachers)
    banked = experiment.banked(*teachers)
    kept, left_out = _without_quarantined(plan, mined, banked, teachers)
    counts = {**scored, **left_out, "mining": mined.counts}
    with _one_process(plan.folder("tables", plan.table_fields)):
        if (hit := plan.hit("tables", plan.table_fields)) is not None:
            return _examined(experiment, ScoreTable.open(hit.folder))
        rows = choose_rows(experiment.recipe, kept, banked)
        plan.require_unchanged("candidates", "tables")
        table = build_table(
            experiment.recipe,
            rows,
            cache=plan.cache,
            fields=plan.table_fields,
            gold_sim=banked,
            vectors=TeacherVectors(experiment) if experiment.recipe.labels.kind == "embedding" else None,
            counts=counts,
            extra={**experiment.provenance(), "wall_seconds": time.monotonic() - started, **({"gate": gates} if gates else {})},
        )
    logger.info("pairs: %d, %d scored, %d reused", counts["pairs"], counts["pairs_scored"], counts["pairs_reused"])
    return _examined(experiment, table)


def _without_quarantined(
    plan: Plan, mined: Candidates, banked: BankedScores, teachers: Sequence[AnyTeacher]
) -> tuple[Iterable[CandidateRow], dict[str, int]]:
    """Return the candidates without the pairs in quarantine that the recipe lets go, and their count.

    Raises QuarantineError if there are more, or if the plan's key was made before they were there.
    """
    allowed = plan.recipe.labels.allow_quarantine
    if not allowed:
        return mined, {}  # scoring has refused them
    kept = complete(mined, banked, [teacher.name for teacher in teachers if not isinstance(teacher, FileTeacher)])
    number = len(kept.missing)
    if number > allowed:
        raise QuarantineError(
            f"{number:,} pairs are in quarantine, over all teachers, and labels.allow_quarantine = {allowed:,}; mend their texts, "
            "or allow as many"
        )
    if number and key_of(Plan(plan.recipe, plan.overrides).table_fields) != key_of(plan.table_fields):
        raise QuarantineError(
            f"{number:,} pairs are in quarantine since this run began, and may be left out; the table's key has to tell of them: "
            "run the same command again"
        )
    return kept, {"pairs_quarantined": number} if number else {}


def _one_process(folder: Path) -> AbstractContextManager[bool]:
    """Let one process at a time make the artifact of a folder; another waits, and finds it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return locked(folder.with_name(f".{folder.name}.lock"))


def _examined(experiment: Experiment, table: ScoreTable) -> ScoreTable:
    describe(table, experiment.recipe)
    examined(experiment.plan, table, experiment.provenance())
    return table


def student(experiment: Experiment) -> Artifact:
    """Find or train the student; the folder is a plain sentence-transformers model.

    One process trains a key at a time; another that asks for it waits and finds it made.
    """
    plan, fields = experiment.plan, experiment.plan.student_fields
    folder = plan.folder("students", fields)
    work_folder = folder.with_name(f"{folder.name}.work")
    hit = plan.hit("students", fields)
    if hit is None:
        if plan.hit("tables", plan.table_fields) is None:
            from sparsekd.training.fit import check_student

            _check_vocabulary(experiment, check_student(experiment.recipe))  # refused before a teacher is paid
        table = score_table(experiment)
        with _one_process(folder):
            hit = plan.hit("students", fields) or _trained(experiment, table, folder, work_folder)
    else:
        logger.info("student %s: hit", hit.key)
    shutil.rmtree(work_folder, ignore_errors=True)  # also what a crash between publishing and this line has left
    return hit


def _check_vocabulary(experiment: Experiment, model: SparseEncoder) -> None:
    """Raise ValueError if vectors are to label whose dims mean other terms than the student's."""
    if experiment.recipe.labels.kind != "embedding":
        return
    from sparsekd.teachers.sparse import teacher_vocabulary
    from sparsekd.training.rows import check_vocabulary

    teacher = experiment.vector_teacher()
    vocabulary = teacher_vocabulary(teacher)
    if vocabulary is not None:
        check_vocabulary(vocabulary_digest(vocabulary), model, f"teacher {teacher.name!r}")


def _trained(experiment: Experiment, table: ScoreTable, folder: Path, work_folder: Path) -> Artifact:
    from sparsekd.training.card import write_card
    from sparsekd.training.fit import train

    fields, started = experiment.plan.student_fields, time.monotonic()
    with naming(work_folder):  # the trainer writes its checkpoints there
        trained = train(
            experiment.recipe,
            table,
            experiment.collection,
            work_folder=work_folder,
            key=key_of(fields),
            first_stage=experiment.bm25_passages,
        )
    steps = {"steps": trained.num_steps, "resumed_from_step": trained.resumed_from_step}
    extra: dict[str, Any] = {
        **experiment.provenance(),
        "wall_seconds": time.monotonic() - started,  # since the last resume
        "counts": {"rows": len(table), **steps, **trained.counts},
    }
    with publish(folder, kind="student", fields=fields, extra=extra) as temporary:
        trained.model.save_pretrained(str(temporary), create_model_card=False)
        write_card(temporary / "README.md", experiment.recipe, table, extra, trained)
        write_json_atomically(temporary / "training.json", trained.log_history)
        experiment.plan.require_unchanged("candidates", "tables", "students")
    return Artifact(folder, read_manifest(folder))
