"""Stage 4: one static HTML page of the experiment, or of the recipe's [study], as far as it has come; makes nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.report.page import write_report
from sparsekd.report.study import write_study
from sparsekd.stage import run_stage
from sparsekd.study import member_plans


def make(plan: Plan) -> Path:
    if plan.recipe.study is not None:
        return write_study(plan, member_plans(plan))
    return write_report(Experiment(plan))


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "tables", "students", "evaluations"]))
