"""Stage 0, optional: fine-tune the cross-encoder of [train_teacher]; teachers with model = "trained:NAME" then use it."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsekd.experiment import Experiment, trained_teacher
from sparsekd.plan import Plan
from sparsekd.stage import run_stage


def make(plan: Plan) -> Path:
    return trained_teacher(Experiment(plan)).folder


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "teachers"]))
