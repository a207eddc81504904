"""What decides a student's bytes, before and after training. Imports no torch."""

from __future__ import annotations

from typing import Any

from sparsekd.model_reference import resolve, weights_identity
from sparsekd.recipe import Recipe, Student, Training

STUDENT_VERSION = 1
"""Raised when the same fields would give another untrained student."""
TRAINING_VERSION = 1
"""Raised when the same fields would give another trained student."""
_REGULARIZER = {"lambda_query", "lambda_passage", "threshold_query", "threshold_passage"}


def student_fields(student: Student) -> dict[str, Any]:
    """Return the fields of the untrained student: digests of the starting weights and how the architecture is made of them.

    The regularizer's weights are left out: they change the trained student only. The reference and the path are left out too.
    """
    folder = resolve(student.model).path
    settings = student.model_dump(mode="json", exclude={"model", *_REGULARIZER})
    return {"version": f"students/splade v{STUDENT_VERSION}", "weights": weights_identity(folder), **settings}


def training_fields(recipe: Recipe, table_key: str, untrained: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the trained student's key: the table, the untrained student, the regularizer, the training section."""
    return {
        "version": f"training v{TRAINING_VERSION}",
        "table": table_key,
        "student": untrained,
        "regularizer": recipe.student.model_dump(mode="json", include=_REGULARIZER),
        "training": recipe.training.model_dump(mode="json", exclude=_idle(recipe.training)),
    }


def _idle(training: Training) -> set[str]:
    """Settings that do not act beside the others, and so change no student."""
    beside_max_steps = {"epochs"} if training.max_steps is not None else set()
    return beside_max_steps | ({"temperature"} if training.loss == "SparseMarginMSELoss" else set())
