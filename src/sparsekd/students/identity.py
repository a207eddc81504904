"""What decides a student's bytes, before and after training: only settings that act enter. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsekd.artifact import sha256_of_file
from sparsekd.model_reference import resolve, weights_identity
from sparsekd.recipe import Recipe, Student
from sparsekd.recipe.rules import is_custom, wrapper_of

STUDENT_VERSION = 2
"""Raised when the same fields would give another untrained student."""
TRAINING_VERSION = 4
"""Raised when the same fields would give another trained student."""
_REGULARIZER = {"regularizer", "lambda_query", "lambda_passage", "threshold_query", "threshold_passage", "budget"}
_RAMP = {"lambda_schedule", "lambda_warmup_ratio"}
_TEMPERED = {"SparseDistillKLDivLoss"}
_SCALED = {"SparseMultipleNegativesRankingLoss", "SparseCoSENTLoss", "SparseAnglELoss"}


def student_fields(student: Student) -> dict[str, Any]:
    """Return the fields of the untrained student: digests of the starting weights and how the architecture is made of them.

    What acts in training only is left out, and so are the reference and the path. Where ``needs_passages`` says so, the passages
    decide too.
    """
    acting = {"kind", "num_layers", "max_length", "query_prompt", "passage_prompt"}
    if student.kind == "csr":
        acting |= {"hidden_dim", "k"}
    else:
        acting |= {"expansion", "initial_active_dims", "head_warmup_steps"}
        acting |= {"static_weights"} if student.expansion != "both" else set()
        acting |= {"residual_scale"} if student.residual_scale != 1 else set()
    return {
        "version": f"students v{STUDENT_VERSION}",
        "weights": weights_identity(resolve(student.model).path),
        **student.model_dump(mode="json", include=acting),
    }


def needs_passages(student: Student) -> bool:
    """Say whether the untrained student depends on the collection's passages: by its bias, its head's warm-up or its IDF table."""
    if student.kind == "csr":
        return False
    has_idf_table = student.expansion != "both" and student.static_weights == "idf"
    return student.initial_active_dims is not None or student.head_warmup_steps > 0 or has_idf_table


def training_fields(recipe: Recipe, table_key: str, untrained: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the trained student's key: the table, the untrained student, and every setting of training that acts.

    Left out: how a step is divided (mini batches, processes), which changes rounding only, and alarms, which stop a run and
    change no student. With ``dev_steps`` the dev split decides too; its digest is the caller's to add.
    """
    student, training = recipe.student, recipe.training
    fields = {
        "version": f"training v{TRAINING_VERSION}",
        "table": table_key,
        "student": untrained,
        "learning": student.model_dump(mode="json", include=_learning(student)),
        "regularizer": student.model_dump(mode="json", include=_regularizer(recipe)),
        "training": {**training.model_dump(mode="json", exclude=_idle(recipe)), "loss": training.losses},
    }
    code = _code_digests([*training.losses, student.regularizer])
    return fields | ({"code": code} if code else {})


def _learning(student: Student) -> set[str]:
    """Settings of the student that act while it learns."""
    acting = {"dropout", "lora_rank"} | ({"lora_alpha"} if student.lora_rank is not None else set())
    if student.kind == "csr":
        return acting | {"k_aux", "freeze_body"}
    return acting | ({"static_frozen"} if student.expansion != "both" else set())


def _regularizer(recipe: Recipe) -> set[str]:
    """Settings of the regularizers that act: none without them, and none of a side that has no transformer."""
    if not _is_regularized(recipe):
        return set()
    static_side = {"passage": "query", "query": "passage"}.get(recipe.student.expansion)
    return _REGULARIZER - {f"lambda_{static_side}", f"threshold_{static_side}"}


def _idle(recipe: Recipe) -> set[str]:
    """Settings of training that do not act beside the others, and so change no student."""
    training = recipe.training
    names = set(training.losses)
    idle = {"loss", "wrapper", "mini_batch_size", "min_active_dims", "max_active_share", "collapse_patience"}
    idle |= {"epochs"} if training.max_steps is not None else set()
    idle |= {"temperature"} if not names & _TEMPERED else set()
    idle |= {"label_scale"} if training.label_scale == 1 else set()
    idle |= {"scale"} if not names & _SCALED else set()
    idle |= {"triplet_margin"} if "SparseTripletLoss" not in names else set()
    idle |= {"static_learning_rate"} if training.static_learning_rate is None else set()
    idle |= {"csr_beta", "csr_gamma"} if wrapper_of(recipe) != "CSRLoss" else set()
    idle |= _RAMP if not _is_regularized(recipe) else set()
    return idle | ({"dev_queries", "dev_depth"} if training.dev_steps is None else set())


def _is_regularized(recipe: Recipe) -> bool:
    return wrapper_of(recipe) in ("SpladeLoss", "CachedSpladeLoss")


def _code_digests(names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of the source file of each ``module:Class``; what it imports in turn is not seen.

    Raises ValueError if there is no such module.
    """
    digests = {}
    for name in filter(is_custom, names):
        module = name.partition(":")[0]
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None or found.origin is None or not Path(found.origin).is_file():
            raise ValueError(f"{name!r}: no module {module} to import; put its folder on PYTHONPATH")
        digests[name] = sha256_of_file(Path(found.origin))
    return digests
