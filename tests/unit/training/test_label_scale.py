"""label_scale: labels are multiplied by a number, or by what leaves the untrained student's margins their size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.artifact import key_of
from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.identity import student_fields, training_fields
from sparsekd.training.fit import train, untrained_student
from sparsekd.training.label_scale import label_scale_of, scale_between
from sparsekd.training.rows import text_columns, training_rows

MARGIN_MSE = "SparseMarginMSELoss"
MARGIN = {"labels": {"kind": "margin"}, "loss": MARGIN_MSE}


def margins_of(recipe: Recipe, table: ScoreTable, collection: Collection) -> tuple[np.ndarray, np.ndarray]:
    """The untrained student's margins and the labels', by the library's own encoding, one row at a time."""
    model, student, labels = untrained_student(recipe, collection), [], []
    for query_id, passage_ids, row in table.rows():
        query = model.encode_query([collection.queries[query_id]], convert_to_sparse_tensor=False)
        texts = [collection.passages[passage_id] for passage_id in passage_ids]
        scores = (query @ model.encode_document(texts, convert_to_sparse_tensor=False).T)[0].double().numpy()
        student.append(scores[0] - scores[1:])
        labels.append(np.array(row) if table.kind == "margin" else row[0] - np.array(row[1:]))
    return np.concatenate(student), np.concatenate(labels)


@pytest.mark.parametrize("settings", [{"loss": MARGIN_MSE}, MARGIN], ids=["score-list", "margin"])
def test_the_students_margins_fit_the_scaled_labels_best_as_they_are(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, settings: dict[str, Any]
) -> None:
    recipe = make_recipe(**settings)
    table = make_table(recipe)
    student, labels = margins_of(recipe, table, collection)
    if student @ labels < 0:  # tiny models agree by chance only
        pytest.fail("choose another seed of the tiny models: their margins oppose the labels")

    scale = label_scale_of(untrained_student(recipe, collection), table, training_rows(table, collection), packed=True, fused=True)

    (gain,) = np.linalg.lstsq(student[:, None], scale * labels, rcond=None)[0]
    assert gain == pytest.approx(1.0, rel=5e-3)


def test_labels_hardly_agreeing_with_the_student_are_refused() -> None:
    opposed = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])

    with pytest.raises(ValueError, match=r"agree with the labels by -1\.00 .* state a number"):
        scale_between(*opposed)


@pytest.mark.parametrize("constant", ["student", "labels"])
def test_constant_margins_are_refused(constant: str) -> None:
    margins = {"student": torch.ones(3), "labels": torch.ones(3)} | {constant: torch.zeros(3)}

    with pytest.raises(ValueError, match=r"agree with the labels by 0\.00"):
        scale_between(**margins)


@pytest.mark.parametrize("settings", [{"loss": MARGIN_MSE}, MARGIN], ids=["score-list", "margin"])
def test_rows_hold_labels_times_the_scale(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, settings: dict[str, Any]
) -> None:
    table = make_table(make_recipe(**settings))

    plain, scaled = training_rows(table, collection), training_rows(table, collection, 3.0)

    assert [row["label"] for row in scaled] == [[3.0 * value for value in row["label"]] for row in plain]
    assert list(scaled[0]) == ["query", *text_columns(table.kind, table.num_passages)[1:], "label", "query_id"]


def test_training_on_labels_scaled_by_four_is_training_on_a_table_that_is_scaled_by_four(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    zscore: dict[str, Any] = {"calibration": {"kind": "zscore", "scale": 1.0}}
    by_training = make_recipe(loss=MARGIN_MSE, labels=zscore, label_scale=4.0)
    by_table = make_recipe(loss=MARGIN_MSE, labels={"calibration": {"kind": "zscore", "scale": 4.0}})

    losses = []
    for number, recipe in enumerate((by_training, by_table)):
        trained = train(recipe, make_table(recipe), collection, work_folder=tmp_path / str(number), key="key")
        losses.append([entry["loss"] for entry in trained.log_history if "loss" in entry])
        assert trained.loss_card["label_scale"] == (4.0, 1.0)[number]
        shutil.rmtree(tmp_path / "cache")  # the next table has the same key here

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_label_scale_of_one_enters_no_key(make_recipe: Callable[..., Recipe]) -> None:
    def key(**settings: Any) -> str:
        recipe = make_recipe(loss=MARGIN_MSE, **settings)
        return key_of(training_fields(recipe, "table", student_fields(recipe.student)))

    assert "label_scale" not in training_fields(make_recipe(), "table", {})["training"]
    assert len({key(), key(label_scale=2.0), key(label_scale="student")}) == 3


def test_labels_that_are_no_scores_are_not_scaled(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=r'label_scale = 2\.0 multiplies score lists and margins, \[labels\] kind = "similarity"'):
        make_recipe(labels={"kind": "similarity"}, loss="SparseCoSENTLoss", label_scale=2.0)
