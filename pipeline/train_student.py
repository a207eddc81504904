"""Stage 2: train the student on the score table; stage 1 runs first where its table is missing or stale."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsekd.experiment import Experiment, student
from sparsekd.plan import Plan
from sparsekd.stage import run_stage


def make(plan: Plan) -> Path:
    return student(Experiment(plan)).folder


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "tables", "students"]))
