"""Runs the members of a study one after another over one bank, and counts the teacher calls that the bank saved.

Every member is an experiment of its own with its own keys, so what is done is found, a study that was cut off goes on, and a member
shares candidates, tables and scores with whoever needs the same. No torch until a member has something to make.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekd.dry_run import describe_plan
from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.provenance import heard_warnings
from sparsekd.recipe import Member, study_members
from sparsekd.resources import require
from sparsekd.training.stopping import StoppedError

logger = logging.getLogger(__name__)


class FailedMembersError(RuntimeError):
    """Some members of a study failed; the others are done, and the same command tries the failed ones again."""

    def __init__(self, failures: Mapping[str, str], num_members: int) -> None:
        told = "".join(f"\n  {name}: {message}" for name, message in failures.items())
        super().__init__(f"{len(failures)} of {num_members} members of the study failed; the same command tries them again{told}")


@dataclass(frozen=True)
class TeacherCalls:
    """Scored (query, passage) pairs, over all teachers."""

    asked: int
    """Asked of teachers when the members' tables were made, each table once."""
    without_bank: int
    """That the members' labels need, each member by itself."""

    def __str__(self) -> str:
        return f"teacher calls: {self.asked:,} pairs scored; without the bank {self.without_bank:,}"


def member_plans(plan: Plan) -> list[tuple[Member, Plan]]:
    """Return the members of a recipe's study, each with its plan; ValueError as of ``study_members``."""
    return [(member, plan.member(member.recipe, member.overrides)) for member in study_members(plan.recipe)]


def run_study(members: Sequence[tuple[Member, Plan]], done: Callable[[Experiment], Any]) -> dict[str, str]:
    """Evaluate every member, making what is missing, and call ``done`` with each that is; return message by failed member.

    A failure of one member ends that member alone; a signal ends the study.
    """
    from sparsekd.evaluation.evaluate import evaluate

    failures: dict[str, str] = {}
    for number, (member, plan) in enumerate(members, start=1):
        logger.info("study: member %d of %d, %s", number, len(members), member.name)
        heard_warnings().messages.clear()
        try:
            experiment = Experiment(plan)
            evaluate(experiment)
            done(experiment)
        except StoppedError:
            raise
        except Exception as error:
            logger.exception("study: member %s failed", member.name)
            failures[member.name] = str(error) or type(error).__name__
        gc.collect()  # models of this member, before the next one's are loaded
    logger.info("study: %d of %d members done; %s", len(members) - len(failures), len(members), teacher_calls(members))
    return failures


def teacher_calls(members: Sequence[tuple[Member, Plan]]) -> TeacherCalls:
    """Add up what the manifests of the members' tables say; a member without a table counts nothing."""
    counts = [(table.key, table.manifest["counts"]) for _, plan in members if (table := plan.hit("tables", plan.table_fields))]
    asked = sum({key: int(told.get("pairs_scored", 0)) for key, told in counts}.values())
    return TeacherCalls(asked, sum(int(told.get("pairs", 0)) for _, told in counts))


def require_members(plan: Plan, kinds: Sequence[str]) -> None:
    """Raise ValueError that names the first member that cannot fit into memory or on the disk; the recipe itself makes nothing."""
    for member, each in member_plans(plan):
        try:
            require(each, kinds)
        except ValueError as problem:
            raise ValueError(f"[study] member {member.name}: {problem}") from problem


def describe_study(plan: Plan, kinds: Sequence[str]) -> str:
    """Return every member's plan in words."""
    members = member_plans(plan)
    parts = [f"study of {len(members)} members"]
    for number, (member, each) in enumerate(members, start=1):
        parts.append(f"member {number}: {member.name}\n{describe_plan(each, kinds)}")
    return "\n\n".join(parts)
