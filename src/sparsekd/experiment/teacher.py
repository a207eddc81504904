"""Stage 0: the cross-encoder of ``[train_teacher]``, found or trained on the candidates that stage 1 mines too."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from sparsekd.artifact import Artifact, key_of, publish, read_manifest, write_json_atomically
from sparsekd.bank.manifest import locked
from sparsekd.experiment.sources import Experiment
from sparsekd.experiment.stages import candidates
from sparsekd.teacher_training.identity import KIND, give_name
from sparsekd.teacher_training.rows import teacher_rows

logger = logging.getLogger(__name__)


def trained_teacher(experiment: Experiment) -> Artifact:
    """Find or train the recipe's own cross-encoder, a plain sentence-transformers folder, and let its name mean this one.

    One process trains a key at a time; another that asks for it waits and finds it made. Raises ValueError if the recipe asks for
    none, or its collection has nothing to train on or to stop by.
    """
    plan, section = experiment.plan, experiment.plan.train_teacher
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("[train_teacher] trains in one process, and a launcher started several; start the script without it")
    fields = plan.trained_teacher_fields
    folder = plan.folder(KIND, fields)
    work_folder = folder.with_name(f"{folder.name}.work")
    hit = plan.hit(KIND, fields)
    if hit is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            hit = plan.hit(KIND, fields) or _train(experiment, folder, work_folder)
    else:
        logger.info("teacher %s: hit", hit.key)
    before = give_name(plan.cache, section.name, hit.key)
    logger.info("%s: %s%s", section.name, hit.key, f" (before: {before})" if before else "")
    shutil.rmtree(work_folder, ignore_errors=True)  # also what a crash between publishing and this line has left
    return hit


def _train(experiment: Experiment, folder: Path, work_folder: Path) -> Artifact:
    plan, section, collection = experiment.plan, experiment.plan.train_teacher, experiment.collection
    rows = teacher_rows(section, candidates(experiment))
    from sparsekd.teacher_training.card import write_card
    from sparsekd.teacher_training.fit import train_teacher
    from sparsekd.training.arguments import check_device

    check_device(experiment.recipe)
    fields = plan.trained_teacher_fields
    trained = train_teacher(
        section,
        experiment.recipe.run,
        collection,
        rows,
        experiment.bm25_passages,
        work_folder=work_folder,
        key=key_of(fields),
        fields=fields,
    )
    steps = {"steps": trained.num_steps, "resumed_from_step": trained.resumed_from_step, "best_step": trained.best_step}
    extra: dict[str, Any] = {**experiment.provenance(), "counts": {**trained.counts, **steps}, "dev_nDCG@10": trained.dev}
    with publish(folder, kind="teacher", fields=fields, extra=extra) as temporary:
        trained.model.save_pretrained(str(temporary), create_model_card=False)
        write_card(temporary / "README.md", experiment.recipe, section, trained, extra)
        write_json_atomically(temporary / "training.json", trained.log_history)
        plan.require_unchanged("candidates", "teachers")
    return Artifact(folder, read_manifest(folder))
