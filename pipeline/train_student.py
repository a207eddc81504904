"""Stage 2: train the student on the score table; stage 1 runs first where its table is missing or stale.

Alone, or as several processes that train one student: torchrun --nproc-per-node 2 pipeline/train_student.py RECIPE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sparsekd.artifact import key_of
from sparsekd.experiment import Experiment, score_table, student
from sparsekd.plan import Plan
from sparsekd.stage import run_stage


def make(plan: Plan) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return make_together(plan)
    return student(Experiment(plan)).folder


def make_together(plan: Plan) -> Path:
    """The first process does everything; the others take part in its training."""
    from sparsekd.training import ranks
    from sparsekd.training.fit import train

    plan.check_earlier_rounds()
    if ranks.is_first():
        with ranks.leading():
            return student(Experiment(plan)).folder
    plan_by_key = {key_of(each.student_fields): each for each in plan.rounds}
    for key in ranks.words():
        experiment = Experiment(plan_by_key[key])
        work_folder = plan.cache / "students" / f"{key}.work"
        train(experiment.recipe, score_table(experiment), experiment.collection, work_folder=work_folder, key=key)
    return plan.folder("students", plan.student_fields)


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "tables", "students"]))
