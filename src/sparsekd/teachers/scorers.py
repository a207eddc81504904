"""From a teacher that scores pairs, not texts, to its Scorer. Imports no torch until one is asked for a score."""

from __future__ import annotations

from sparsekd.recipe import CallableTeacher, Run, Teacher, TokenLogitTeacher
from sparsekd.teachers.protocols import Scorer


def make_scorer(teacher: Teacher | TokenLogitTeacher | CallableTeacher, run: Run) -> Scorer:
    """Return the Scorer of a cross-encoder, a late-interaction model, a language model or a function.

    Dense and sparse teachers are encoders, whose vectors are banked; BM25 needs the collection and imported scores need none.
    """
    if isinstance(teacher, CallableTeacher):
        from sparsekd.teachers.function import FunctionScorer

        return FunctionScorer(teacher)
    if not isinstance(teacher, Teacher):
        from sparsekd.teachers.token_logits import TokenLogitScorer

        return TokenLogitScorer(teacher, run)
    if teacher.kind == "late-interaction":
        from sparsekd.teachers.late_interaction import LateInteractionScorer

        return LateInteractionScorer(teacher, run)
    assert teacher.kind == "cross-encoder", teacher.kind
    from sparsekd.teachers.cross_encoder import CrossEncoderScorer

    return CrossEncoderScorer(teacher, run)
