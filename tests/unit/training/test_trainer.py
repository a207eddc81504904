"""The trainer stops before damaged numbers reach the weights, and logs what the sparsity schedule does."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.students.fast import fused_head
from sparsekd.training import fit
from sparsekd.training.fit import build_trainer, train
from sparsekd.training.rows import training_rows
from sparsekd.training.stopping import StoppedError, listening
from sparsekd.training.trainer import LOSS_STATE, DistillationTrainer, NonFiniteError

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
    assert re.search(r"passage, [\d.]+ rows/s, 0 s left", caplog.text)


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


class Send(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_whole_step_which_is_saved_and_the_next_run_goes_on_from_it(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    recipe = make_recipe(student={"dropout": 0.1}, max_steps=6)
    table, places = make_table(recipe), {"work_folder": tmp_path / "work", "key": "key"}
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    uninterrupted = train(recipe, table, collection, work_folder=tmp_path / "other", key="key")
    build = fit.build_trainer

    def sending(*args: Any, **kwargs: Any) -> DistillationTrainer:
        trainer = build(*args, **kwargs)
        trainer.add_callback(Send(number, 4))
        return trainer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fit, "build_trainer", sending)
        with pytest.raises(StoppedError) as caught:
            train(recipe, table, collection, **places)

    assert str(caught.value) == (f"stopped by {number.name} after step 4 of 6, which is saved; the same command goes on from there")
    assert caught.value.number == number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers

    resumed = train(recipe, table, collection, **places)

    assert (resumed.resumed_from_step, resumed.num_steps) == (4, 6)
    expected = uninterrupted.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


def test_a_signal_in_the_last_step_ends_nothing(make_trainer: Callable[..., Any], labelled_rows: Callable[..., Dataset]) -> None:
    trainer = make_trainer(labelled_rows([[2.0, 1.0]] * 4), batch_size=2, max_steps=2)
    trainer.add_callback(Send(signal.SIGTERM, 2))

    with listening() as trainer.stop.signals:
        trainer.train()

    assert trainer.stop.signals.number == signal.SIGTERM
    assert (trainer.stop.number, trainer.state.global_step) == (0, 2)


def test_a_second_interrupt_does_not_wait_for_the_step() -> None:
    with listening() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT

        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_every_component_of_the_loss_stands_in_the_log_unrounded(
    make_trainer: Callable[..., Any], labelled_rows: Callable[..., Dataset]
) -> None:
    components_of_steps: list[dict[str, float]] = []

    class Seen(TrainerCallback):
        """Keeps each step's components as the loss has them."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            components_of_steps.append(trainer.loss.log_components())

    student = {"lambda_query": 1e-7, "lambda_passage": 1e-7}
    loss = {"SparseDistillKLDivLoss": 1.0, MARGIN_MSE: 0.05}
    trainer = make_trainer(labelled_rows([[2.0, 1.0]] * 8), student=student, loss=loss, batch_size=2, max_steps=4)
    trainer.add_callback(Seen())

    trainer.train()

    first, last = (entry for entry in trainer.state.log_history if "loss" in entry)
    names = {"SparseDistillKLDivLoss", MARGIN_MSE, "query_regularizer_loss", "document_regularizer_loss"}
    assert names <= first.keys()
    for name in names:
        values = [components[name] for components in components_of_steps]
        assert first[name] == pytest.approx(values[0], rel=1e-6)
        assert last[name] == pytest.approx(sum(values[1:]) / 3, rel=1e-6)  # since the entry before
    assert 0 < last["query_regularizer_loss"] < 5e-5  # the library's log would say 0.0
    assert last["loss"] == pytest.approx(sum(last[name] for name in names), rel=1e-5)


def test_the_log_says_how_fast_it_goes_from_the_second_entry_on(
    make_trainer: Callable[..., Any], labelled_rows: Callable[..., Dataset]
) -> None:
    trainer = make_trainer(labelled_rows([[2.0, 1.0]] * 8), batch_size=2, max_steps=20)

    trainer.train()

    first, middle, last = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert "rows_per_second" not in first
    assert middle["rows_per_second"] > 0
    assert middle["seconds_left"] == pytest.approx(10 * 2 / middle["rows_per_second"])
    assert last["seconds_left"] == 0


def test_rows_that_make_no_whole_batch_are_left_over_unless_they_are_all_there_is(
    make_trainer: Callable[..., Any], labelled_rows: Callable[..., Dataset]
) -> None:
    for num_rows, steps in ((7, 3), (1, 1)):
        trainer = make_trainer(labelled_rows([[2.0, 1.0]] * num_rows), batch_size=2, max_steps=None, epochs=1.0)

        trainer.train()

        assert trainer.state.global_step == steps


def test_rows_of_other_columns_than_the_recipes_are_refused(
    make_trainer: Callable[..., Any], labelled_rows: Callable[..., Dataset]
) -> None:
    rows = labelled_rows([[2.0, 1.0]] * 2).rename_column("negative_1", "passage")

    with pytest.raises(ValueError, match=r"the rows have text columns \['query', 'positive', 'passage'\], \[labels\] asks for"):
        make_trainer(rows)


def test_a_loss_keeps_its_own_state_in_the_checkpoint(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    recipe = make_recipe(student={"regularizer": "DF-FLOPS", "dropout": 0.1}, max_steps=4, run={"save_steps": 2})
    table = make_table(recipe)
    uninterrupted = train(recipe, table, collection, work_folder=tmp_path / "work", key="key")
    assert (tmp_path / "work" / "checkpoint-2" / LOSS_STATE).is_file()
    shutil.rmtree(tmp_path / "work" / "checkpoint-4")

    resumed = train(recipe, table, collection, work_folder=tmp_path / "work", key="key")

    expected = uninterrupted.model.state_dict()
    assert resumed.resumed_from_step == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


def test_autocast_trains_float32_weights(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    recipe = make_recipe(precision="bfloat16", max_steps=3)

    trained = train(recipe, make_table(recipe), collection, work_folder=tmp_path / "work", key="key")

    assert {tensor.dtype for tensor in trained.model.parameters()} == {torch.float32}
    plain = train(make_recipe(max_steps=3), make_table(recipe), collection, work_folder=tmp_path / "plain", key="key")
    losses = [entry["loss"] for entry in (trained.log_history[0], plain.log_history[0])]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    vectors = trained.model.encode(["a cat"]).to_dense()
    assert vectors.dtype == torch.float32
    assert not hasattr(trained.model.forward, "__wrapped__")


@pytest.mark.parametrize(
    ("training", "run", "message"),
    [
        ({"precision": "float16"}, {}, r'\[training\] precision = "float16" needs a CUDA device, and \[run\] device = \'cpu\''),
        ({}, {"tensorboard": True}, r"\[run\] tensorboard = true needs the package tensorboard, which is not installed"),
        ({"dev_steps": 2}, {}, r"\[training\] dev_steps needs a collection and a first stage"),
    ],
)
def test_what_cannot_be_had_is_refused_before_training(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    training: dict[str, Any],
    run: dict[str, Any],
    message: str,
) -> None:
    if run and importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed")
    recipe = make_recipe(run=run, **training)

    with pytest.raises(ValueError, match=message):
        train(recipe, make_table(recipe), collection, work_folder=tmp_path / "work", key="key")


def test_the_best_student_by_dev_ndcg_is_kept_and_resumed_to(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    def first_stage(queries: Sequence[str], depth: int) -> list[list[str]]:
        return [list(collection.passages)[:depth] for _ in queries]

    recipe = make_recipe(dev_steps=2, max_steps=6, learning_rate=0.05, run={"save_steps": 2})
    table, places = make_table(recipe), {"work_folder": tmp_path / "work", "key": "key", "first_stage": first_stage}

    trained = train(recipe, table, collection, **places)
    again = train(recipe, table, collection, **places)

    figures = {entry["step"]: entry["dev_nDCG@10"] for entry in trained.log_history if "dev_nDCG@10" in entry}
    assert list(figures) == [2, 4, 6]
    assert trained.counts["best_step"] == max(figures, key=lambda step: (figures[step], -step))
    assert again.counts["best_step"] == trained.counts["best_step"]
    expected = again.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.model.state_dict().items())
