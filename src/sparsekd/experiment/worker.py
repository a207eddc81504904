"""Stage 1 as the work of several processes; see ``runners``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from sparsekd.artifact import IntegrityError
from sparsekd.bank.sharing import QuarantineError, attempts
from sparsekd.experiment.sources import Experiment
from sparsekd.plan import Plan
from sparsekd.provenance import is_ours
from sparsekd.quiet import quieten_libraries
from sparsekd.recipe import recipe_document, recipe_of
from sparsekd.runners import LocalWorkers, Task, Workers, supervise

logger = logging.getLogger(__name__)


def share_stage_1(experiment: Experiment) -> None:
    """Have ``[run] workers`` make the score table; raises what they end with, see ``supervise``."""
    run = experiment.recipe.run
    document = {
        "recipe": recipe_document(experiment.recipe),
        "overrides": list(experiment.plan.overrides),
        "argv": sys.argv,
        "folder": str(Path.cwd()),
    }
    task = Task("sparsekd.experiment.worker", document, run.workers)

    def noted() -> Hashable:
        return attempts(experiment.plan.cache / "bank")

    logger.info("%d workers share stage 1", run.workers)
    supervise(_workers(task, experiment.plan), run.workers, noted)


def _workers(task: Task, plan: Plan) -> Workers:
    run = plan.recipe.run
    if run.runner == "local":
        return LocalWorkers(task, run.threads)
    from sparsekd.runners.cluster import RayWorkers

    return RayWorkers(task, address=run.address, cpus=run.threads or 1, gpus=run.gpus_per_worker, cache=plan.cache)


def work(document: dict[str, Any], number: int) -> tuple[str, str] | None:
    """Carry stage 1 of ``document``'s recipe out as worker ``number``.

    Returns None when the table stands, or the class name and the message of what the stage refuses; other errors are raised.
    """
    from sparsekd.experiment.stages import score_table

    os.chdir(document["folder"])  # what relative paths of the recipe mean
    recipe = recipe_of(document["recipe"], "recipe")
    index, of = recipe.run.part  # of jobs that each have so many workers
    part = f"{index * recipe.run.workers + number}/{of * recipe.run.workers}"
    alone = {"shard": part, "workers": 1, "runner": "local", "address": None, "gpus_per_worker": 0.0}
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=alone)})
    _prepare(recipe.run.log_level, number)
    sys.argv = document["argv"]  # manifests say what people can run again
    try:
        score_table(Experiment(Plan(recipe, tuple(document["overrides"]))))
    except (IntegrityError, QuarantineError) as error:
        return type(error).__name__, str(error)
    except (ValueError, FileNotFoundError) as error:
        if not is_ours(error):
            raise
        return (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError).__name__, str(error)
    return None


def _prepare(log_level: str, number: int) -> None:
    """Worker 0 tells of the progress of all; the others say warnings and errors only."""
    name = "%(asctime)s %(message)s" if number == 0 else f"%(asctime)s worker {number}: %(message)s"
    level = log_level if number == 0 else "WARNING"
    logging.basicConfig(level=level, stream=sys.stderr, format=name, datefmt="%H:%M:%S", force=True)
    quieten_libraries()
