"""Every member of a recipe's [study], one after another over one bank, and the page that compares them; what is done is found."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsekd.plan import Plan
from sparsekd.report.page import write_report
from sparsekd.report.study import write_study
from sparsekd.stage import run_stage
from sparsekd.study import FailedMembersError, describe_study, member_plans, require_members, run_study, teacher_calls


def make(plan: Plan) -> Path:
    members = member_plans(plan)
    failures = run_study(members, done=write_report)
    page = write_study(plan, members, failures)
    sys.stdout.write(f"{teacher_calls(members)}\n")
    if failures:
        sys.stdout.write(f"{page}\n")
        raise FailedMembersError(failures, len(members))
    return page


if __name__ == "__main__":
    kinds = ["candidates", "tables", "students", "evaluations"]
    sys.exit(run_stage(__doc__, make, kinds, describe=describe_study, require=require_members))
