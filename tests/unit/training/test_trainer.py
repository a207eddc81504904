"""The trainer stops before damaged numbers reach the weights, and logs what the sparsity schedule does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.splade import build_student, fused_head
from sparsekd.training.fit import build_trainer, train
from sparsekd.training.rows import training_rows
from sparsekd.training.trainer import DistillationTrainer, NonFiniteError

MARGIN_MSE = "SparseMarginMSELoss"


class Snapshots(TrainerCallback):
    """Keeps the weights as they were at the beginning of each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


@pytest.fixture
def labelled_rows() -> Callable[..., Dataset]:
    """Return ``make(labels)``: one row per label list, with ids q0, q1, ..."""

    def make(labels: list[list[float]]) -> Dataset:
        count = range(len(labels))
        columns = {
            "query": [f"cat {i}" for i in count],
            "positive": [f"a cat and {i}" for i in count],
            "negative_1": ["a dog" for _ in count],
            "label": labels,
            "query_id": [f"q{i}" for i in count],
        }
        return Dataset.from_dict(columns)

    return make


@pytest.fixture
def make_trainer(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., DistillationTrainer]:
    """Return ``make(rows, **sections)``: the trainer of a tiny student."""

    def make(rows: Dataset, **sections: Any) -> DistillationTrainer:
        recipe = make_recipe(**sections)
        model = build_student(recipe.student, Path(recipe.student.model))
        return build_trainer(recipe, model, rows, num_passages=2, work_folder=tmp_path / "work", key="key")

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_label_that_is_not_finite_stops_the_run_with_the_batchs_ids_and_the_weights_of_the_step_before(
    make_trainer: Callable[..., DistillationTrainer], labelled_rows: Callable[..., Dataset], value: float
) -> None:
    labels = [[2.0, 1.0]] * 5 + [[value, 1.0]] + [[2.0, 1.0]] * 2
    trainer = make_trainer(labelled_rows(labels), loss=MARGIN_MSE, batch_size=2, max_steps=4)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)

    with pytest.raises(NonFiniteError) as caught:
        trainer.train()

    step = len(snapshots.weights)
    message = str(caught.value)
    assert message.startswith(f"step {step}: loss is {value}; batch of queries q")
    assert "q5" in message
    assert "nothing of this step was applied" in message
    assert trainer.state.global_step == step - 1
    assert all(torch.equal(tensor, snapshots.weights[-1][name]) for name, tensor in trainer.model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(
    make_trainer: Callable[..., DistillationTrainer], labelled_rows: Callable[..., Dataset]
) -> None:
    # The square of 1e19 is a finite float32; the gradient's norm, a sum of such squares times vectors, is not.
    trainer = make_trainer(labelled_rows([[1e19, 0.0]] * 2), loss=MARGIN_MSE, batch_size=2, max_steps=1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    with pytest.raises(NonFiniteError, match=r"step 1: gradient norm is (inf|nan); batch of queries q\d, q\d; nothing"):
        trainer.train()

    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_weights_that_are_not_finite_stop_the_run_at_step_1(
    make_trainer: Callable[..., DistillationTrainer], labelled_rows: Callable[..., Dataset]
) -> None:
    trainer = make_trainer(labelled_rows([[2.0, 1.0]] * 7), batch_size=7, max_steps=1)
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[:] = torch.nan

    with pytest.raises(NonFiniteError, match=r"step 1: loss is nan; batch of queries (q\d, ){4}q\d and 2 more; nothing"):
        trainer.train()


def test_a_diverging_run_stops(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    recipe = make_recipe(loss=MARGIN_MSE, learning_rate=1e30, max_steps=5)

    with pytest.raises(NonFiniteError, match=r"step [2-5]: (loss|gradient norm) is (nan|inf).*Lower \[training\] learning_rate"):
        train(recipe, make_table(recipe), collection, work_folder=tmp_path / "work", key="key")


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected"),
    [
        ("quadratic", 2 / 3, [0.0, (9 / 20) ** 2, (19 / 20) ** 2, 1.0]),
        ("quadratic", 1 / 3, [0.0, (9 / 10) ** 2, 1.0, 1.0]),
        ("linear", 2 / 3, [0.0, 9 / 20, 19 / 20, 1.0]),
    ],
)
def test_regularizer_weights_follow_the_schedule_and_stand_in_the_log(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    schedule: str,
    ratio: float,
    expected: list[float],
) -> None:
    student = {"lambda_query": 0.01, "lambda_passage": 0.003}
    recipe = make_recipe(student=student, max_steps=30, batch_size=2, lambda_schedule=schedule, lambda_warmup_ratio=ratio)

    trained = train(recipe, make_table(recipe), collection, work_folder=tmp_path / "work", key="key")

    logs = [entry for entry in trained.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 10, 20, 30]  # step s is the s-th, which begins after s - 1
    assert [entry["lambda_query"] for entry in logs] == pytest.approx([0.01 * share for share in expected])
    assert [entry["lambda_passage"] for entry in logs] == pytest.approx([0.003 * share for share in expected])


def test_the_log_holds_the_active_dims_of_the_batch(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    recipe = make_recipe(batch_size=64, max_steps=1)  # the whole table at once
    table = make_table(recipe)

    trained = train(recipe, table, collection, work_folder=tmp_path / "work", key="key")

    untrained = build_student(recipe.student, Path(recipe.student.model))
    ids = [(query_id, passage_ids) for query_id, passage_ids, _ in table.rows()]
    queries = [collection.queries[query_id] for query_id, _ in ids]
    passages = [collection.passages[passage_id] for _, passage_ids in ids for passage_id in passage_ids]
    for name, texts in (("query_active_dims", queries), ("passage_active_dims", passages)):
        expected = float((untrained.encode(texts).to_dense() > 0).sum()) / len(texts)
        assert trained.log_history[0][name] == pytest.approx(expected)


def test_nothing_is_printed_on_stdout(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = make_recipe(max_steps=10)
    table = make_table(recipe)
    capsys.readouterr()

    with caplog.at_level("INFO", logger="sparsekd"):
        train(recipe, table, collection, work_folder=tmp_path / "work", key="key")

    assert capsys.readouterr().out == ""
    assert "step 10 of 10: loss " in caplog.text
    assert "passage, 0 s left" in caplog.text


@pytest.mark.parametrize("loss", ["SparseDistillKLDivLoss", MARGIN_MSE])
def test_one_step_under_the_fused_head_has_the_plain_loss_and_gradients(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path, loss: str
) -> None:
    recipe = make_recipe(loss=loss)
    table = make_table(recipe)
    losses, gradients = [], []
    for head in (fused_head, contextlib.nullcontext):
        model = build_student(recipe.student, Path(recipe.student.model))
        rows = training_rows(table, collection)
        trainer = build_trainer(recipe, model, rows, num_passages=table.num_passages, work_folder=tmp_path / "work", key="key")
        trainer.loss.query_regularizer_weight = trainer.loss.document_regularizer_weight = 0.05  # type: ignore[union-attr, assignment]
        model.train()

        with head(model):
            value = trainer.compute_loss(model, trainer.data_collator([rows[number] for number in range(4)]))  # type: ignore[no-untyped-call]
            value.backward()

        losses.append(value.item())
        gradients.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None})

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list(gradients[0]) == list(gradients[1])
    scale = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5 * scale)
