"""Lambda follows the library's ramps, or is steered until active dims meet a budget; a resumed run has the same lambdas."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SpladeLoss
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerControl, TrainerState, get_linear_schedule_with_warmup

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.training.budget import LambdaControl, Probe, ramp
from sparsekd.training.feedback import Feedback, Plan
from sparsekd.training.fit import train

TERMS, WIDTH, QUERIES, PASSAGES = 400, 24, 16, 4
ARGUMENTS: Any = SimpleNamespace()


class ToyStudent(nn.Module):
    """Weights log1p(relu(logit)) over 400 terms of a text that is a point in 24 dimensions; half of them start active."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.body = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=draw))
        self.terms = nn.Parameter(torch.randn(TERMS, WIDTH, generator=draw) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(TERMS))

    def forward(self, texts: Tensor) -> Tensor:
        return torch.log1p(torch.relu(texts @ self.body @ self.terms.T + self.bias))


class ToyLoss:
    """What LambdaControl reads and sets of a wrapper: margins or a KL divergence, plus lambda times FLOPS of either side."""

    def __init__(self, kind: str, lambda_query: float, lambda_passage: float) -> None:
        self.kind = kind
        self.query_regularizer_weight, self.document_regularizer_weight = lambda_query, lambda_passage
        self.query_regularizer, self.document_regularizer = SimpleNamespace(active_dims=0.0), SimpleNamespace(active_dims=0.0)
        self.components: dict[str, Tensor] = {}

    def __call__(self, student: ToyStudent, queries: Tensor, passages: Tensor) -> Tensor:
        query_vectors, passage_vectors = student(queries), student(passages)
        repeated = queries.repeat_interleave(PASSAGES, 0)
        student_sim = (query_vectors.repeat_interleave(PASSAGES, 0) * passage_vectors).sum(1).view(-1, PASSAGES)
        gold_sim = 3 * (repeated * passages).sum(1).view(-1, PASSAGES)
        if self.kind == "margin":
            main = functional.mse_loss(student_sim[:, :1] - student_sim[:, 1:], gold_sim[:, :1] - gold_sim[:, 1:])
        else:
            logs = [(scores / 2).log_softmax(-1) for scores in (student_sim, gold_sim)]
            main = 4 * functional.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean")
        self.query_regularizer.active_dims = mean_dims(query_vectors)
        self.document_regularizer.active_dims = mean_dims(passage_vectors)
        self.components = {
            "base_loss": main,
            "document_regularizer_loss": self.document_regularizer_weight * passage_vectors.mean(0).square().sum(),
            "query_regularizer_loss": self.query_regularizer_weight * query_vectors.mean(0).square().sum(),
        }
        return torch.stack(list(self.components.values())).sum()

    def log_components(self) -> dict[str, float]:
        return {name: float(value.detach()) for name, value in self.components.items()}


def mean_dims(vectors: Tensor) -> float:
    return float((vectors > 0).sum(1).float().mean())


def draw_texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` queries and 4 passages of each, the first the likest; texts come in 50 kinds and different lengths."""
    kinds = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))

    def texts(number: int, scale: float) -> Tensor:
        points = kinds[torch.randint(50, (number,), generator=generator)] + 0.7 * torch.randn(number, WIDTH, generator=generator)
        return points * torch.exp(0.16 * torch.randn(number, 1, generator=generator)) * scale

    queries = texts(count, 0.5)
    likeness = torch.tensor([2.0, 1.2, 0.6, 0.0]).repeat(count)[:, None]
    return queries, queries.repeat_interleave(PASSAGES, 0) * likeness + texts(count * PASSAGES, 0.8)


class ToyRun:
    """A training loop that calls LambdaControl as the trainer does."""

    def __init__(self, kind: str, guesses: tuple[float, float], steps: int, learning_rate: float = 1e-2, **settings: Any) -> None:
        self.student, self.loss = ToyStudent(), ToyLoss(kind, *guesses)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=learning_rate)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, steps // 10, steps)
        self.generator = torch.Generator().manual_seed(2)
        self.settings = settings
        self.control = LambdaControl(self.loss, **settings)
        self.state = TrainerState(max_steps=steps, stateful_callbacks=[self.control])
        self.lambdas: list[tuple[float, float]] = []

    def probe_with(self, both: Callable[[], tuple[float, float]]) -> None:
        """Start anew with a probe."""
        self.control = LambdaControl(self.loss, probe=Probe(lambda: both()[0], both), **self.settings)
        self.state.stateful_callbacks = [self.control]

    def event(self, name: str) -> None:
        getattr(self.control, name)(ARGUMENTS, self.state, TrainerControl(), lr_scheduler=self.scheduler)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.event("on_step_begin")
            self.lambdas.append((self.loss.query_regularizer_weight, self.loss.document_regularizer_weight))
            self.optimizer.zero_grad()
            self.loss(self.student, *draw_texts(QUERIES, self.generator)).backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.state.global_step += 1
            self.event("on_step_end")

    def dims(self) -> tuple[float, float]:
        """Active dims of 1,000 queries and 4,000 passages that were not trained on."""
        with torch.no_grad():
            queries, passages = draw_texts(1000, torch.Generator().manual_seed(3))
            return mean_dims(self.student(queries)), mean_dims(self.student(passages))


def splade_loss(lambda_query: float | None, lambda_passage: float) -> SpladeLoss:
    class AnyLoss(nn.Module):
        def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
            return embeddings[0].sum()

    model: Any = None
    regularizers = {"document_regularizer": FlopsLoss(model), "query_regularizer": FlopsLoss(model)}
    return SpladeLoss(
        model, AnyLoss(), document_regularizer_weight=lambda_passage, query_regularizer_weight=lambda_query, **regularizers
    )


@pytest.mark.parametrize("schedule", ["quadratic", "linear"])
@pytest.mark.parametrize(("steps", "ratio"), [(30, 1 / 3), (7, 0.5), (10, 1.0), (3, 0.1)])
@pytest.mark.parametrize("lambda_query", [0.3, None])
def test_without_a_budget_lambda_is_the_librarys_at_every_step(
    schedule: Any, steps: int, ratio: float, lambda_query: float | None
) -> None:
    ours, theirs = splade_loss(lambda_query, 0.07), splade_loss(lambda_query, 0.07)
    callbacks = [
        (ours, LambdaControl(ours, schedule=schedule, warmup_ratio=ratio)),
        (theirs, SpladeRegularizerWeightSchedulerCallback(theirs, scheduler_type=schedule, warmup_ratio=ratio)),
    ]
    weights: list[list[Any]] = [[], []]

    for (loss, callback), seen in zip(callbacks, weights, strict=True):
        state: Any = TrainerState(max_steps=steps)
        callback.on_train_begin(ARGUMENTS, state, TrainerControl())
        for state.global_step in range(steps + 1):
            callback.on_step_begin(ARGUMENTS, state, TrainerControl())
            seen.append((loss.query_regularizer_weight, loss.document_regularizer_weight))

    assert weights[0] == weights[1]
    assert weights[0][0] == (lambda_query if lambda_query is None else 0.0, 0.0)
    assert weights[0][-1] == (lambda_query, 0.07)


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("kind", "guess"), [("margin", 100.0), ("divergence", 1.0)])
def test_active_dims_end_within_a_tenth_of_both_budgets_from_a_first_guess_a_hundred_times_too_small_or_large(
    kind: str, guess: float, factor: float
) -> None:
    run = ToyRun(kind, (guess * factor, guess * factor), 240, query_budget=40.0, passage_budget=80.0)
    run.probe_with(run.dims)
    before = run.dims()
    run.event("on_train_begin")

    run.steps(240)

    assert min(before) > 150
    assert run.dims() == (pytest.approx(40.0, rel=0.1), pytest.approx(80.0, rel=0.1))


def test_a_run_resumed_in_the_middle_has_the_lambdas_of_the_one_that_was_not_stopped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"query_budget": 60.0, "passage_budget": 100.0}
    whole, stopped = (ToyRun("margin", (100.0, 100.0), 60, **settings) for _ in range(2))
    for run in (whole, stopped):
        run.event("on_train_begin")
        run.steps(25)
    stopped.state.stateful_callbacks = {"LambdaControl": stopped.control.state()}  # type: ignore[assignment]
    stopped.state.save_to_json(str(tmp_path / "trainer_state.json"))

    stopped.loss.query_regularizer_weight, stopped.loss.document_regularizer_weight = 100.0, 100.0  # as a new loss has them
    stopped.control = LambdaControl(stopped.loss, **settings)
    stopped.state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    stopped.event("on_train_begin")
    for run in (whole, stopped):
        run.steps(35)

    assert stopped.lambdas == whole.lambdas  # to the bit
    assert len(set(whole.lambdas)) > 50
    assert stopped.control.state() == whole.control.state()


def test_the_state_of_the_feedback_survives_json_to_the_bit() -> None:
    feedback, plan = Feedback(50.0, 0.1), Plan([1.0] * 20, 10)
    for step in range(7):
        feedback.observe(100.0 / 3 - step / 7, 1 / 3, 1e-7 * (step + 1), step, plan)

    again = Feedback(**json.loads(json.dumps(asdict(feedback))))

    assert again == feedback
    assert again.weight == feedback.weight


def test_a_side_without_a_budget_follows_its_ramp_while_the_other_is_steered() -> None:
    run = ToyRun("margin", (2.0, 100.0), 30, passage_budget=100.0)
    run.event("on_train_begin")

    run.steps(30)

    assert [query for query, _ in run.lambdas] == [2.0 * ramp(step, 10, "quadratic") for step in range(30)]
    assert len({passage for _, passage in run.lambdas}) > 20


@pytest.mark.parametrize(("active_dims", "direction"), [(400.0, 1), (10.0, -1)])
def test_lambda_moves_against_the_distance_from_the_budget(active_dims: float, direction: int) -> None:
    feedback, plan = Feedback(50.0, 1.0, start=math.log(50.0)), Plan([1.0] * 100, 4)
    for step in range(4):
        feedback.observe(50.0, 1.0, 0.1, step, plan)
    before = feedback.weight

    for step in range(4, 20):
        feedback.observe(active_dims, 1.0, 0.1, step, plan)

    assert (feedback.weight / before > 2) if direction > 0 else (feedback.weight / before < 0.5)


def test_pressure_stays_in_its_bounds_and_comes_back_from_them_at_once() -> None:
    feedback, plan = Feedback(50.0, 1.0), Plan([1.0] * 1000, 1)
    for step in range(400):
        feedback.observe(5000.0, 1.0, 1.0, step, plan)  # whatever lambda does: it cannot follow
    assert feedback.weight == pytest.approx(3.0)

    for step in range(400, 420):
        feedback.observe(20.0, 1.0, 1.0, step, plan)

    assert feedback.weight < 0.1


def test_a_vector_without_active_dims_or_a_loss_of_zero_leaves_lambda_finite() -> None:
    feedback, plan = Feedback(50.0, 1.0), Plan([1.0] * 50, 10)

    for step, (dims, main, penalty) in enumerate([(100.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0)] * 5):
        feedback.observe(dims, main, penalty, step, plan)

    assert 0 < feedback.weight < math.inf


def test_a_probe_corrects_what_batches_show_by_its_factor() -> None:
    run = ToyRun("margin", (100.0, 100.0), 240, query_budget=40.0, passage_budget=80.0)
    # As if the collection's texts had a fifth fewer active dims than the batches'.
    run.probe_with(lambda: (run.dims()[0] * 0.8, run.dims()[1] * 0.8))
    run.event("on_train_begin")

    run.steps(240)

    query_dims, passage_dims = run.dims()
    assert query_dims * 0.8 == pytest.approx(40.0, rel=0.1)
    assert passage_dims * 0.8 == pytest.approx(80.0, rel=0.1)


def test_the_log_entry_gets_what_feedback_goes_by() -> None:
    run = ToyRun("margin", (100.0, 100.0), 10, query_budget=40.0)
    run.event("on_train_begin")
    run.steps(3)
    run.state.log_history.append({"loss": 1.0, "step": 3})

    run.event("on_log")

    entry = run.state.log_history[-1]
    assert entry["query_active_dims_smoothed"] == pytest.approx(200, rel=0.2)
    assert 0.03 <= entry["query_pressure"] <= 3.0
    assert "passage_pressure" not in entry


def test_a_missed_budget_is_said_with_advice(caplog: pytest.LogCaptureFixture) -> None:
    run = ToyRun("margin", (100.0, 100.0), 5, learning_rate=1e-6, query_budget=10.0, passage_budget=400.0)
    run.event("on_train_begin")

    with caplog.at_level(logging.INFO, logger="sparsekd"):
        run.steps(5)

    query, passage = (record.getMessage() for record in caplog.records)
    assert query.startswith("budget: query vectors have about ")
    assert "missed by more than 10%: raise [training] max_steps or learning_rate" in query
    assert "passage vectors" in passage
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        ({"query_budget": 0.0}, (1.0, 1.0), r"\[student\] budget.query_active_dims = 0; expected a number above 0"),
        ({"passage_budget": 401.0, "vocabulary_size": 400}, (1.0, 1.0), "passage_active_dims = 401: the student's vectors have"),
        ({"query_budget": 40.0}, (0.0, 1.0), "lambda_query is 0.0; set it above 0, or remove the budget"),
        ({"query_budget": 40.0}, (None, 1.0), "needs a regularizer and a first guess of its weight, and lambda_query is None"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(settings: dict[str, Any], weights: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LambdaControl(ToyLoss("margin", *weights), **settings)


def test_a_scheduler_whose_rates_are_not_known_is_refused() -> None:
    run = ToyRun("margin", (1.0, 1.0), 5, query_budget=10.0)
    run.scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)  # type: ignore[assignment]

    with pytest.raises(ValueError, match="the learning-rate scheduler is ExponentialLR; feedback needs one whose rates are known"):
        run.event("on_train_begin")


def test_a_checkpoint_without_the_state_is_refused() -> None:
    run = ToyRun("margin", (1.0, 1.0), 5, query_budget=10.0)
    run.state.stateful_callbacks, run.state.global_step = {}, 3  # type: ignore[assignment]

    with pytest.raises(ValueError, match="checkpoint of step 3: holds no state of LambdaControl"):
        run.event("on_train_begin")


def test_a_student_trained_to_a_budget_and_resumed_equals_the_one_trained_at_once(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    budget = {"query_active_dims": 30.0, "passage_active_dims": 50.0}
    recipe = make_recipe(student={"budget": budget}, run={"save_steps": 6}, max_steps=12, loss="SparseMarginMSELoss")
    table = make_table(recipe)
    whole = train(recipe, table, collection, work_folder=tmp_path / "work", key="key")
    shutil.rmtree(tmp_path / "work" / "checkpoint-12")

    resumed = train(recipe, table, collection, work_folder=tmp_path / "work", key="key")

    assert resumed.resumed_from_step == 6
    entries = [[entry for entry in trained.log_history if "loss" in entry] for trained in (whole, resumed)]
    names = ("step", "lambda_query", "lambda_passage", "query_active_dims_smoothed", "passage_pressure")
    assert [[entry[name] for name in names] for entry in entries[1]] == [[entry[name] for name in names] for entry in entries[0]]
    assert entries[0][-1]["lambda_query"] not in (0.0, recipe.student.lambda_query)
    weights = whole.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())
