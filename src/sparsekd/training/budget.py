"""What lambda_query and lambda_passage are at each step: a ramp to the recipe's value, or feedback until active dims meet a budget.

A side without a budget follows sentence-transformers' ramp: 0 at step 0, the final value after ``warmup_ratio`` of the steps. A
side with one is steered (``Feedback``): active dims of each global batch are compared with a path that goes geometrically from
where training starts down to the budget and stays there, and log lambda moves against the difference. A batch's few short queries
say little: every few steps a fixed sample of queries is measured in their place, the same texts each time and so without noise.
Batches are a biased sample of a collection and dropout changes what is active, so now and then a larger sample of both sides, as
encode_query and encode_document have them, says by what factor to correct. Costs nothing but these probes. One object per run; its
state is saved with each checkpoint, and a resumed run has the same lambdas to the bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sparsekd.training import ranks
from sparsekd.training.feedback import Feedback, Plan

logger = logging.getLogger(__name__)

Schedule = Literal["quadratic", "linear"]


@dataclass(frozen=True)
class Probe:
    """Measures mean active dims of fixed samples of texts, as the student encodes them now; equal on every process."""

    few_queries: Callable[[], float]
    """Of queries few and short enough to be measured every few steps."""
    both: Callable[[], tuple[float, float]]
    """Of more queries, and of passages."""


REGULARIZERS = {"query": "query_regularizer", "passage": "document_regularizer"}
"""The loss's attribute by side; ``_weight`` and ``_loss`` after it name its lambda and its part of the loss."""
TOLERANCE = 0.1
"""Relative distance from the budget within which it counts as met."""

_PROBES = (0.3, 0.5, 0.7, 0.85, 0.93)  # shares of the run at which both sides are probed, beside its end
_QUERY_STEPS = 4  # between probes of few queries: 96 of 9 tokens cost 3 % of 4 steps of 8 rows
# A probe of the same queries each time has no noise but that of terms at their threshold.
_QUERY_SETTINGS = {"smoothing": 0.7, "memory": 1}


def ramp(step: int, warmup_steps: int, schedule: Schedule) -> float:
    """Return the share of the final weight at optimizer step ``step`` from 0: (step / warmup_steps)², or without the square.

    >>> [ramp(step, 4, "quadratic") for step in (0, 1, 2, 4, 5)]
    [0.0, 0.0625, 0.25, 1.0, 1.0]
    """
    if step >= warmup_steps:
        return 1.0
    ratio = step / max(warmup_steps, 1)
    return ratio if schedule == "linear" else ratio**2


class LambdaControl(TrainerCallback, ExportableState):
    """Sets the loss's regularizer weights before each step; one that is None is left alone.

    ``loss`` has ``query_regularizer_weight`` and ``document_regularizer_weight`` (taken as the final values, or as feedback's first
    guesses), ``query_regularizer.active_dims`` and ``document_regularizer.active_dims``, and for feedback ``log_components``.
    ValueError for a budget on a side that has no weight to steer, or above ``vocabulary_size``.
    """

    def __init__(
        self,
        loss: Any,
        *,
        schedule: Schedule = "quadratic",
        warmup_ratio: float = 1 / 3,
        query_budget: float | None = None,
        passage_budget: float | None = None,
        vocabulary_size: int | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.loss = loss
        self.schedule: Schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.final: dict[str, float | None] = {side: getattr(loss, f"{name}_weight") for side, name in REGULARIZERS.items()}
        budgets = {"query": query_budget, "passage": passage_budget}
        settings: dict[str, dict[str, Any]] = {"query": _QUERY_SETTINGS if probe else {}, "passage": {}}
        self.feedback = {
            side: Feedback(budget, _checked_guess(side, budget, self.final[side], vocabulary_size), **settings[side])
            for side, budget in budgets.items()
            if budget is not None
        }
        self._probe = probe
        self._probe_steps: set[int] = set()
        self._warmup_steps = 1
        self._plan = Plan([], 1)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {side: asdict(feedback) for side, feedback in self.feedback.items()}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lay out the run, and take up the saved state if it is resumed."""
        self._warmup_steps = max(1, int(state.max_steps * self.warmup_ratio))
        if self.feedback:
            self._plan = Plan(_relative_rates(kwargs["lr_scheduler"], state.max_steps), self._warmup_steps)
            self._probe_steps = {int(share * state.max_steps) for share in _PROBES} if self._probe else set()
        if state.global_step > 0:
            saved = saved_attributes(self, state)
            self.feedback = {side: Feedback(**saved[side]) for side in self.feedback}
        self._set_weights(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the weights of the step that begins."""
        self._set_weights(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in the step's batch, probe if it is time, and say after the last step how near the budgets are."""
        if not self.feedback:
            return
        step = state.global_step - 1
        main, penalties = self._loss_values()
        for side, feedback in self.feedback.items():
            feedback.observe(self._measured(side, step), main, penalties[side], step, self._plan)
        is_last = state.global_step >= state.max_steps
        dims = {side: feedback.active_dims or 0.0 for side, feedback in self.feedback.items()}
        if self._probe is not None and (step in self._probe_steps or is_last):
            dims = dict(zip(REGULARIZERS, self._probe.both(), strict=True))
            for side, feedback in self.feedback.items():
                feedback.calibrate(dims[side], step, self._plan)
            logger.info("step %d: active dims of a sample: %.1f query, %.1f passage", state.global_step, *dims.values())
        if is_last:
            for side, feedback in self.feedback.items():
                _report(side, feedback, dims[side])

    def _measured(self, side: str, step: int) -> float | None:
        """Return the active dims that ``step`` shows of one side: the batch's, or of queries the probe's where there is one."""
        if side == "query" and self._probe is not None:
            return None if step % _QUERY_STEPS else self._probe.few_queries()
        dims: float = getattr(self.loss, REGULARIZERS[side]).active_dims
        return dims

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the log entry the active dims that feedback goes by, and its pressure."""
        if state.log_history and "loss" in state.log_history[-1]:
            for side, feedback in self.feedback.items():
                if feedback.active_dims is not None and feedback.pressure is not None:
                    state.log_history[-1][f"{side}_active_dims_smoothed"] = feedback.active_dims
                    state.log_history[-1][f"{side}_pressure"] = math.exp(feedback.pressure)

    def _set_weights(self, step: int) -> None:
        for side, name in REGULARIZERS.items():
            final = self.final[side]
            if side in self.feedback:
                setattr(self.loss, f"{name}_weight", self.feedback[side].weight)
            elif final is not None:
                setattr(self.loss, f"{name}_weight", final * ramp(step, self._warmup_steps, self.schedule))

    def _loss_values(self) -> tuple[float, dict[str, float]]:
        """The main loss and each side's penalty without lambda: means over processes, so that all go by equal numbers."""
        components = dict(self.loss.log_components())
        weighted = [components.pop(f"{name}_loss", 0.0) for name in REGULARIZERS.values()]
        of_all = ranks.of_all((math.fsum(components.values()), *weighted))
        main, *penalties = (math.fsum(values) / len(of_all) for values in zip(*of_all, strict=True))
        weights = [getattr(self.loss, f"{name}_weight") or math.inf for name in REGULARIZERS.values()]
        return main, {side: value / weight for side, value, weight in zip(REGULARIZERS, penalties, weights, strict=True)}


def saved_attributes(callback: TrainerCallback, state: TrainerState) -> dict[str, Any]:
    """Return what ``callback.state()`` held when the checkpoint was saved; ValueError if the checkpoint has none.

    The trainer's own way back builds a new callback from JSON, which cannot hold a loss or a model.
    """
    saved: Any = state.stateful_callbacks
    name = type(callback).__name__
    if name not in saved:
        raise ValueError(
            f"checkpoint of step {state.global_step}: holds no state of {name}, so it was written without it; remove the "
            "experiment's work folder and rerun"
        )
    attributes: dict[str, Any] = saved[name]["attributes"]
    return attributes


def _checked_guess(side: str, budget: float, guess: float | None, vocabulary_size: int | None) -> float:
    where = f"[student] budget.{side}_active_dims = {budget:g}"
    if not budget > 0 or not math.isfinite(budget):
        raise ValueError(f"{where}; expected a number above 0")
    if vocabulary_size is not None and budget > vocabulary_size:
        raise ValueError(f"{where}: the student's vectors have {vocabulary_size} dims; expected at most that")
    if not guess:
        raise ValueError(
            f"{where}: feedback needs a regularizer and a first guess of its weight, and lambda_{side} is {guess}; set it "
            "above 0, or remove the budget"
        )
    return guess


def _relative_rates(scheduler: Any, num_steps: int) -> list[float]:
    factors = getattr(scheduler, "lr_lambdas", None)
    if not factors:
        raise ValueError(
            f"budget: the learning-rate scheduler is {type(scheduler).__name__}; feedback needs one whose rates are known "
            "beforehand (LambdaLR, such as lr_scheduler_type = linear)"
        )
    rates = [float(factors[0](step)) for step in range(num_steps)]
    peak = max(rates, default=0.0) or 1.0
    return [rate / peak for rate in rates]


def _report(side: str, feedback: Feedback, dims: float) -> None:
    budget = feedback.budget
    message = f"budget: {side} vectors have about {dims:.1f} active dims of {budget:g}, lambda_{side} {feedback.weight:.3g}"
    if abs(dims / budget - 1) <= TOLERANCE:
        logger.info("%s", message)
        return
    if dims > budget:
        advice = "raise [training] max_steps or learning_rate, or start nearer with [student] initial_active_dims"
    elif feedback.is_idle:
        advice = "the main loss or the other side's budget keeps them there; lower this budget or learning_rate, or raise the other"
    else:
        advice = "raise [training] max_steps: dims that died come back slowly"
    logger.warning("%s; missed by more than %.0f%%: %s", message, 100 * TOLERANCE, advice)
