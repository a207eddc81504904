"""Stage 3: measure BM25, the teachers, the untrained student and the student; print the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sparsekd.evaluation.evaluate import METRICS, evaluate
from sparsekd.evaluation.table import metrics_table
from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.stage import run_stage


def make(plan: Plan) -> Path:
    folder = evaluate(Experiment(plan)).folder
    sys.stdout.write(metrics_table(json.loads((folder / METRICS).read_text(encoding="utf-8"))) + "\n")
    return folder


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, make, ["candidates", "tables", "students", "evaluations"]))
