"""Stage 4: one static HTML page of the experiment, as far as it has come; makes nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.report.page import write_report
from sparsekd.stage import run_stage


def make(plan: Plan) -> Path:
    return write_report(Experiment(plan))


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "tables", "students", "evaluations"]))
