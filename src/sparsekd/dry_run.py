"""The plan in words: what is there, what is missing and why, what it would cost. Loads no model and no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsekd.artifact import key_of, nearest
from sparsekd.bank.scores import ScoreBank
from sparsekd.labels.banked import BankedScores
from sparsekd.labels.building import incomplete_teachers, scored_teachers
from sparsekd.labels.rows import filter_pairs
from sparsekd.mining.approximate import describe_parameters, index_parameters
from sparsekd.mining.candidates import Candidates, miner_names
from sparsekd.plan import Plan
from sparsekd.recipe import DenseMiner, FileTeacher
from sparsekd.resources import describe_needs

_BYTES_PER_PAIR = 24  # `sparsekd bank ls` says 1.46 MB for 66,499 pairs; rounded up
_FIELDS_SHOWN = 6
_UP_TO_A_STUDENT = ("candidates", "tables", "students")  # what a round makes before the next one can mine


def describe_plan(plan: Plan, kinds: Sequence[str]) -> str:
    """Return the plan of ``kinds`` as text: each artifact's key, hit or miss with the reason, pairs, disk, order of work."""
    lines = [f"recipe: collection {plan.recipe.collection.path}, cache {plan.recipe.run.cache}"]
    missing: list[tuple[Plan, str]] = []
    for each in plan.rounds:
        number, is_last = each.recipe.mining.rounds, each is plan
        lines += [f"round {number} of {len(plan.rounds)}"] if len(plan.rounds) > 1 else []
        for kind, fields in each.artifacts(kinds if is_last else _UP_TO_A_STUDENT):
            hit = each.hit(kind, fields)
            lines.append(f"{kind:<12} {key_of(fields)}  {'hit' if hit else 'miss'}")
            if hit is None:
                missing.append((each, kind))
                lines += _why(each, kind, fields)
                lines += _indexes(each) if kind == "candidates" else []
            else:
                missing.clear()  # what this one was made of is not needed any more
    for each, kind in missing:
        if kind == "tables":
            lines += [f"pairs of round {each.recipe.mining.rounds}"] if len(plan.rounds) > 1 else []
            lines += _pairs(each)
    lines += describe_needs(plan, kinds)
    lines.append("order of work: " + (" -> ".join(_named(plan, missing)) if missing else "nothing to do"))
    return "\n".join(lines)


def _named(plan: Plan, missing: Sequence[tuple[Plan, str]]) -> list[str]:
    """Kinds of artifacts, with the round where there are several."""
    return [kind if len(plan.rounds) == 1 else f"{kind} of round {each.recipe.mining.rounds}" for each, kind in missing]


def _why(plan: Plan, kind: str, fields: Mapping[str, Any]) -> list[str]:
    """Name the fields in which the nearest existing artifact of the kind differs."""
    found = nearest(plan.cache / kind, fields)
    if found is None:
        return [f"             no {kind} made yet"]
    folder, changed = found
    shown = [
        f"             differs from {folder.name} in {name}: {theirs!r} -> {ours!r}" for name, (theirs, ours) in changed.items()
    ]
    more = len(shown) - _FIELDS_SHOWN
    return shown[:_FIELDS_SHOWN] + ([f"             and {more} more fields"] if more > 0 else [])


def _indexes(plan: Plan) -> list[str]:
    """State the parameters of the approximate indexes that will be built; ValueError where one cannot be."""
    asked = plan.recipe.mining.asked
    lines = []
    for name, miner in zip(miner_names(asked), asked, strict=True):
        if isinstance(miner, DenseMiner) and miner.index != "flat":
            num_passages = len(plan.collection.passages)
            parameters = describe_parameters(index_parameters(miner.index, num_passages, miner.depth))
            lines.append(f"miner {name}: index {miner.index} over {num_passages:,} passages, {parameters}")
    return lines


def _pairs(plan: Plan) -> list[str]:
    """Count pairs wanted and banked: exactly where the candidates are there, else by the quotas."""
    collection = plan.collection
    bank = ScoreBank(plan.cache / "bank")
    scores = {name: bank.open(plan.teacher_identities[name]) for name in scored_teachers(plan.recipe)}
    from_file = {teacher.name: "each an error" for teacher in plan.recipe.teachers if isinstance(teacher, FileTeacher)}
    from_file |= {name: "left to the other teachers" for name in incomplete_teachers(plan.recipe)}
    lines = []
    if plan.hit("candidates", plan.candidates_fields):
        query_ids, passage_ids = filter_pairs(Candidates.open(plan.folder("candidates", plan.candidates_fields)))
        banked = BankedScores(collection, scores)
        for name in scores:
            known = int(np.isfinite(banked(name, query_ids, passage_ids)).sum())
            lines.append(_line(name, len(query_ids), str(known), len(query_ids) - known, from_file.get(name)))
        return lines
    num_queries = len(collection.qrels.get("train", {}))
    positives = sum(sum(grade >= 1 for grade in grades.values()) for grades in collection.qrels.get("train", {}).values())
    wanted = positives + num_queries * sum(miner.quota for miner in plan.mined_recipe.mining.miners)
    to_score, mining = wanted, plan.recipe.mining
    if plan.previous is not None:  # whose pairs are banked by then
        to_score = num_queries * (mining.student_miner.quota + (0 if mining.fallback is None else mining.fallback.quota))
    for name, teacher_scores in scores.items():
        banked_words = f"unknown until mined ({teacher_scores.num_pairs} in the teacher's bank)"
        lines.append(_line(name, wanted, banked_words, to_score, from_file.get(name)))
    return lines


def _line(teacher: str, wanted: int, banked: str, to_score: int, if_not_imported: str | None) -> str:
    if if_not_imported:
        cost = f"at most {to_score} not imported, {if_not_imported}" if to_score else "all imported"
        return f"teacher {teacher}: pairs wanted {wanted}, already banked {banked}, {cost}"
    megabytes = to_score * _BYTES_PER_PAIR / 1e6
    cost = f"to score at most {to_score}, disk about {megabytes:.1f} MB"
    return f"teacher {teacher}: pairs wanted {wanted}, already banked {banked}, {cost}"
