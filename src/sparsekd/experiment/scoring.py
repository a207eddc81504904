"""Teachers' scores of the candidates' pairs, brought into the bank.

Imported scores must be there already, and a model with many pairs to score passes the gate, before any long run begins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd import gate
from sparsekd.experiment.sources import Experiment
from sparsekd.labels.building import incomplete_teachers
from sparsekd.labels.rows import filter_pairs
from sparsekd.mining.candidates import Candidates
from sparsekd.recipe import AnyTeacher, BM25Teacher, FileTeacher, Teacher

if TYPE_CHECKING:
    from sparsekd.teachers.scoring import PairTexts, ScoringCounts

logger = logging.getLogger(__name__)


def score_pairs(
    experiment: Experiment, mined: Candidates, teachers: Sequence[AnyTeacher]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bank these teachers' scores of every (query, positive or candidate).

    Imported scores must be there already, which is seen before a model is asked. Returns pairs, scored and reused over all of them,
    and the figures of the teachers that had to pass the gate. Pairs that an import may lack, and does, count as ``pairs_missing``.
    """
    total = {"pairs": 0, "pairs_scored": 0, "pairs_reused": 0}
    gates: dict[str, Any] = {}
    if not teachers:
        return total, gates
    query_ids, passage_ids = filter_pairs(mined)
    imported = {
        teacher.name: _imported_pairs(experiment, teacher, query_ids, passage_ids)
        for teacher in teachers
        if isinstance(teacher, FileTeacher)
    }
    for teacher in teachers:
        figures = _pass_gate(experiment, teacher, query_ids, passage_ids)
        gates |= {teacher.name: figures} if figures else {}
    texts = _pair_texts(experiment, query_ids, passage_ids)
    for teacher in teachers:
        pairs = imported.get(teacher.name)
        counts = _bank(experiment, teacher, texts if pairs is None else _pair_texts(experiment, *pairs))
        total = {name: value + getattr(counts, name) for name, value in total.items()}
        _refuse_constant(experiment, teacher, *(pairs or (query_ids, passage_ids)))
    missing = sum(len(query_ids) - len(pairs[0]) for pairs in imported.values())
    return total | ({"pairs_missing": missing} if missing else {}), gates


def _refuse_constant(experiment: Experiment, teacher: AnyTeacher, query_ids: Sequence[str], passage_ids: Sequence[str]) -> None:
    """Raise ValueError if a teacher gives every pair the same score: nothing can be learnt from it, whatever its calibration."""
    gold_sim = experiment.banked(teacher)(teacher.name, query_ids, passage_ids)
    gold_sim = gold_sim[~np.isnan(gold_sim)]  # what is in quarantine
    if len(gold_sim) > 1 and gold_sim.min() == gold_sim.max():
        raise ValueError(
            f"[[teachers]] {teacher.name!r}: all {len(gold_sim):,} pairs have the score {gold_sim[0]:g} ({teacher.kind}, "
            f"{teacher.reference}); expected scores that tell passages apart; check what it was given to read, or leave it out"
        )


def _pass_gate(
    experiment: Experiment, teacher: AnyTeacher, query_ids: Sequence[str], passage_ids: Sequence[str]
) -> dict[str, Any] | None:
    """Measure a teacher that has many of these pairs to score; None where it has few, asks no model, or the recipe has no gate."""
    if isinstance(teacher, BM25Teacher | FileTeacher) or not teacher.gate:
        return None
    if int(np.isnan(experiment.banked(teacher)(teacher.name, query_ids, passage_ids)).sum()) < gate.LONG_RUN_PAIRS:
        return None

    def score(query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        _bank(experiment, teacher, _pair_texts(experiment, query_ids, passage_ids))
        gold_sim = experiment.banked(teacher)(teacher.name, query_ids, passage_ids)
        return np.nan_to_num(gold_sim, nan=-np.inf, neginf=-np.inf)  # what is in quarantine ranks last

    return gate.check_teacher(teacher.name, experiment.collection, experiment.bm25_passages, score)


def _pair_texts(experiment: Experiment, query_ids: Sequence[str], passage_ids: Sequence[str]) -> PairTexts:
    from sparsekd.teachers.scoring import PairTexts

    queries, passages = list(dict.fromkeys(query_ids)), list(dict.fromkeys(passage_ids))
    return PairTexts(
        [experiment.collection.queries[query_id] for query_id in queries],
        [experiment.collection.passages[passage_id] for passage_id in passages],
        _positions(query_ids, queries),
        _positions(passage_ids, passages),
    )


def _imported_pairs(
    experiment: Experiment, teacher: FileTeacher, query_ids: Sequence[str], passage_ids: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return those of the pairs that were imported; ValueError unless all were, or some where the recipe lets others be missing."""
    from sparsekd.teachers.file import require_imported

    gold_sim = experiment.banked(teacher)(teacher.name, query_ids, passage_ids)
    known = np.flatnonzero(~np.isnan(gold_sim)).tolist()
    if not known or teacher.name not in incomplete_teachers(experiment.recipe):
        require_imported(teacher, experiment.scores_of(teacher).folder, gold_sim, query_ids, passage_ids)
    if len(known) < len(query_ids):
        number, total = len(query_ids) - len(known), len(query_ids)
        logger.info("teacher %s: %d of %d pairs not imported; other teachers take their weight", teacher.name, number, total)
    return [query_ids[place] for place in known], [passage_ids[place] for place in known]


def _bank(experiment: Experiment, teacher: AnyTeacher, texts: PairTexts) -> ScoringCounts:
    """Bank one teacher's scores of these pairs."""
    from sparsekd.teachers.scoring import bank_scorer, bank_scores

    experiment.plan.require_unchanged("candidates", "tables")
    run, scores, allowed = experiment.recipe.run, experiment.scores_of(teacher), experiment.recipe.labels.allow_quarantine
    if isinstance(teacher, FileTeacher):
        from sparsekd.teachers.file import FileScorer

        return bank_scorer(FileScorer(teacher), teacher.name, run, scores, texts)
    if isinstance(teacher, BM25Teacher):
        from sparsekd.teachers.bm25 import BM25Scorer

        scorer = BM25Scorer(teacher, experiment.collection.passages)
        return bank_scorer(scorer, teacher.name, run, scores, texts, by_query=True)
    if isinstance(teacher, Teacher) and teacher.kind != "late-interaction":
        return bank_scores(teacher, run, scores, experiment.embedding_bank, texts, allowed=allowed)
    from sparsekd.teachers.scorers import make_scorer

    by_passage = teacher.kind == "late-interaction"
    return bank_scorer(make_scorer(teacher, run), teacher.name, run, scores, texts, by_passage=by_passage, allowed=allowed)


def _positions(ids: Sequence[str], unique: Sequence[str]) -> NDArray[np.int32]:
    place_by_id = {text_id: place for place, text_id in enumerate(unique)}
    return np.fromiter((place_by_id[text_id] for text_id in ids), dtype=np.int32, count=len(ids))
