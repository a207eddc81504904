"""Stage 1: mine candidates, score the pairs no run has scored before, write the score table."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsekd.experiment import Experiment, score_table
from sparsekd.plan import Plan
from sparsekd.stage import run_stage


def make(plan: Plan) -> Path:
    return score_table(Experiment(plan)).artifact.folder


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "tables"]))
