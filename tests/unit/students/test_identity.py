"""Which settings change a student's key, before and after training: those that act, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import key_of
from sparsekd.recipe import Recipe, Student, Training
from sparsekd.students.identity import needs_passages, student_fields, training_fields

SPLADE: dict[str, Any] = {}
STATIC = {"expansion": "passage"}
CSR = {"kind": "csr"}
KL: dict[str, Any] = {}
CONTRASTIVE = {"loss": "SparseMultipleNegativesRankingLoss"}
CUSTOM_LOSS = "class Mine:\n    pass\n"


@pytest.fixture
def recipe(tiny_headless_folder: Path) -> Callable[..., Recipe]:
    """Return ``make(student, training, labels)``: a whole recipe around these settings."""

    def make(student: dict[str, Any], training: dict[str, Any], labels: dict[str, Any] | None = None) -> Recipe:
        unlabelled = training.get("loss") in ("SparseMultipleNegativesRankingLoss", "SparseTripletLoss")
        return Recipe.model_validate(
            {
                "collection": {"path": "sample"},
                "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
                "teachers": [{"name": "judge", "kind": "cross-encoder", "model": "somewhere"}],
                "labels": labels or {"num_negatives": 1, **({"kind": "none"} if unlabelled else {})},
                "student": {"model": str(tiny_headless_folder), **student},
                "training": training,
            }
        )

    return make


def keys(recipe: Recipe) -> tuple[str, str]:
    """(key before, key after training)."""
    before = student_fields(recipe.student)
    return key_of(before), key_of(training_fields(recipe, "table", before))


# (student, training, change of the student, change of training): whether it changes the student before, and after, training.
CHANGES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], bool, bool]] = [
    (SPLADE, KL, {"num_layers": 1}, {}, True, True),
    (SPLADE, KL, {"max_length": 64}, {}, True, True),
    (SPLADE, KL, {"query_prompt": "q: "}, {}, True, True),
    (SPLADE, KL, {"passage_prompt": "p: "}, {}, True, True),
    (SPLADE, KL, {"initial_active_dims": 50}, {}, True, True),
    (SPLADE, KL, {"residual_scale": 0.5}, {}, True, True),
    (SPLADE, KL, {"head_warmup_steps": 5}, {}, True, True),
    (SPLADE, KL, {"expansion": "passage"}, {}, True, True),
    (STATIC, KL, {"static_weights": "ones"}, {}, True, True),
    (CSR, KL, {"hidden_dim": 512}, {}, True, True),
    (CSR, KL, {"k": 8}, {}, True, True),
    # only once it learns
    (SPLADE, KL, {"dropout": 0.0}, {}, False, True),
    (SPLADE, KL, {"lora_rank": 4}, {}, False, True),
    ({"lora_rank": 4}, KL, {"lora_alpha": 8.0}, {}, False, True),
    (STATIC, KL, {"static_frozen": True}, {}, False, True),
    (CSR, KL, {"k_aux": 16}, {}, False, True),
    (CSR, KL, {"freeze_body": True}, {}, False, True),
    (SPLADE, KL, {"regularizer": "L1"}, {}, False, True),
    (SPLADE, KL, {"lambda_query": 0.5}, {}, False, True),
    (SPLADE, KL, {"lambda_passage": 0.5}, {}, False, True),
    (SPLADE, KL, {"threshold_query": 5}, {}, False, True),
    (SPLADE, KL, {"threshold_passage": 5}, {}, False, True),
    (STATIC, KL, {"lambda_passage": 0.5}, {}, False, True),
    (SPLADE, KL, {"budget": {"query_active_dims": 20.0}}, {}, False, True),
    (SPLADE, KL, {}, {"loss": "SparseMarginMSELoss"}, False, True),
    (SPLADE, KL, {}, {"loss": {"SparseDistillKLDivLoss": 1.0, "SparseMarginMSELoss": 0.1}}, False, True),
    (SPLADE, KL, {}, {"loss": {"SparseDistillKLDivLoss": 0.5}}, False, True),
    (SPLADE, KL, {}, {"temperature": 1.0}, False, True),
    (SPLADE, CONTRASTIVE, {}, {"scale": 20.0}, False, True),
    (SPLADE, {"loss": "SparseTripletLoss"}, {}, {"triplet_margin": 1.0}, False, True),
    (CSR, KL, {}, {"csr_beta": 0.5}, False, True),
    (CSR, KL, {}, {"csr_gamma": 0.5}, False, True),
    (SPLADE, KL, {}, {"batch_size": 8}, False, True),
    (SPLADE, KL, {}, {"precision": "bfloat16"}, False, True),
    (SPLADE, KL, {}, {"epochs": 2.0}, False, True),
    (SPLADE, KL, {}, {"max_steps": 5}, False, True),
    (SPLADE, KL, {}, {"learning_rate": 1e-3}, False, True),
    (STATIC, KL, {}, {"static_learning_rate": 0.01}, False, True),
    (SPLADE, KL, {}, {"label_scale": 2.0}, False, True),
    (SPLADE, KL, {}, {"label_scale": "student"}, False, True),
    (SPLADE, KL, {}, {"warmup_ratio": 0.0}, False, True),
    (SPLADE, KL, {}, {"weight_decay": 0.0}, False, True),
    (SPLADE, KL, {}, {"max_grad_norm": 2.0}, False, True),
    (SPLADE, KL, {}, {"lambda_schedule": "linear"}, False, True),
    (SPLADE, KL, {}, {"lambda_warmup_ratio": 0.5}, False, True),
    (SPLADE, KL, {}, {"seed": 1}, False, True),
    (SPLADE, KL, {}, {"dev_steps": 10}, False, True),
    (SPLADE, {"dev_steps": 10}, {}, {"dev_queries": 5}, False, True),
    (SPLADE, {"dev_steps": 10}, {}, {"dev_depth": 5}, False, True),
    # never, beside the rest
    (SPLADE, KL, {}, {"loss": {"SparseDistillKLDivLoss": 1.0}}, False, False),
    (SPLADE, {"loss": "SparseMarginMSELoss"}, {}, {"temperature": 1.0}, False, False),
    (SPLADE, KL, {}, {"scale": 20.0}, False, False),
    (SPLADE, KL, {}, {"triplet_margin": 1.0}, False, False),
    (SPLADE, KL, {}, {"csr_beta": 0.5}, False, False),
    (SPLADE, KL, {}, {"csr_gamma": 0.5}, False, False),
    (SPLADE, {"max_steps": 5}, {}, {"epochs": 2.0}, False, False),
    (SPLADE, KL, {}, {"dev_queries": 5}, False, False),
    (SPLADE, KL, {}, {"dev_depth": 5}, False, False),
    (SPLADE, KL, {}, {"mini_batch_size": 2}, False, False),
    (SPLADE, KL, {}, {"wrapper": "SpladeLoss"}, False, False),
    (SPLADE, KL, {}, {"mini_batch_size": 2, "wrapper": "CachedSpladeLoss"}, False, False),
    (SPLADE, KL, {}, {"min_active_dims": 2.0}, False, False),
    (SPLADE, KL, {}, {"max_active_share": 0.9}, False, False),
    (SPLADE, KL, {}, {"collapse_patience": 5}, False, False),
    (CSR, KL, {}, {"lambda_schedule": "linear"}, False, False),
    (CSR, KL, {}, {"lambda_warmup_ratio": 0.5}, False, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("student", "training", "of_student", "of_training", "before", "after"),
    CHANGES,
    ids=[f"{student}{training}: {a or b}".replace("'", "") for student, training, a, b, *_ in CHANGES],
)
def test_a_setting_changes_the_keys_of_what_it_changes(
    recipe: Callable[..., Recipe],
    student: dict[str, Any],
    training: dict[str, Any],
    of_student: dict[str, Any],
    of_training: dict[str, Any],
    before: bool,
    after: bool,
) -> None:
    old = keys(recipe(student, training))

    new = keys(recipe({**student, **of_student}, {**training, **of_training}))

    assert (old[0] != new[0], old[1] != new[1]) == (before, after)


def test_every_setting_of_student_and_training_is_tried() -> None:
    tried = {key for _, _, *changes, _, _ in CHANGES for change in changes for key in change}

    assert {*Student.model_fields, *Training.model_fields} - tried == {"kind", "model"}


def test_the_name_of_the_model_changes_nothing(tmp_path: Path, recipe: Callable[..., Recipe], tiny_headless_folder: Path) -> None:
    import shutil

    shutil.copytree(tiny_headless_folder, tmp_path / "elsewhere")

    assert keys(recipe({}, {})) == keys(recipe({"model": str(tmp_path / "elsewhere")}, {}))


def test_the_code_of_a_loss_of_ones_own_is_in_the_key(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "one_of_my_own.py").write_text(CUSTOM_LOSS, encoding="utf-8")
    first = recipe({}, {"loss": "one_of_my_own:Mine"})
    before = keys(first)

    (tmp_path / "one_of_my_own.py").write_text(CUSTOM_LOSS + "# changed\n", encoding="utf-8")

    assert keys(first)[0] == before[0]
    assert keys(first)[1] != before[1]
    with pytest.raises(ValueError, match="'not_there:Mine': no module not_there to import; put its folder on PYTHONPATH"):
        keys(recipe({}, {"loss": "not_there:Mine"}))
    with pytest.raises(ValueError, match=r"'not\.there:Mine': no module not\.there to import"):
        keys(recipe({"regularizer": "not.there:Mine"}, {}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"initial_active_dims": 40}, True),
        ({"head_warmup_steps": 1}, True),
        ({"expansion": "passage"}, True),
        ({"expansion": "query"}, True),
        ({"expansion": "passage", "static_weights": "ones"}, False),
        ({"kind": "csr"}, False),
    ],
)
def test_a_student_that_starts_from_passages_says_so(settings: dict[str, Any], expected: bool) -> None:
    assert needs_passages(Student(model="somewhere", **copy.deepcopy(settings))) is expected
