"""Stops a run whose student has collapsed, before hours go into it.

A SPLADE student fails in two ways that its loss does not show: every weight dies (regularizer or learning rate too strong), or
nearly the whole vocabulary stays active (too weak). Both are read off the last global batch that the regularizers keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sparsekd.training.budget import REGULARIZERS, saved_attributes

_MOST_ROWS = 0.5  # single texts without a known term, or a batch with a strange one, are no collapse


class CollapseError(RuntimeError):
    """The student's vectors have left the healthy band for longer than ``collapse_patience``; training on would not help."""


@dataclass(frozen=True)
class _Finding:
    what: str
    measured: str
    band: str
    advice: str


class CollapseAlarm(TrainerCallback, ExportableState):
    """Raises CollapseError after ``patience`` consecutive steps outside the healthy band on one side.

    Outside are: more than half of the rows all-zero; mean active dims below ``min_active_dims``; and, once the regularizers stand
    at their final weight, mean active dims above ``max_active_share`` of ``vocabulary_size``, or more than half of the rows with
    every dim active. ``loss`` has ``query_regularizer`` and ``document_regularizer`` with ``active_dims``, ``zero_rows``
    and ``full_share`` of the last global batch, or None. ``sides``: those that are watched.
    """

    def __init__(
        self,
        loss: Any,
        *,
        vocabulary_size: int,
        min_active_dims: float = 1.0,
        max_active_share: float = 0.5,
        patience: int = 50,
        warmup_ratio: float = 1 / 3,
        sides: tuple[str, ...] = ("query", "passage"),
    ) -> None:
        self.loss = loss
        self.vocabulary_size = vocabulary_size
        self.min_active_dims = min_active_dims
        self.max_active_share = max_active_share
        self.patience = patience
        self.warmup_ratio = warmup_ratio
        self.sides = sides
        self.steps_outside: dict[str, int] = {}
        """"side: what" -> consecutive steps."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"steps_outside": dict(self.steps_outside)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take up the saved state if the run is resumed."""
        if state.global_step > 0:
            self.steps_outside = dict(saved_attributes(self, state)["steps_outside"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; CollapseError if it is one too many."""
        is_warm = state.global_step > int(state.max_steps * self.warmup_ratio)
        outside = {}
        for side in self.sides:
            for finding in self._findings(side, getattr(self.loss, REGULARIZERS[side]), is_warm):
                name = f"{side}: {finding.what}"
                outside[name] = self.steps_outside.get(name, 0) + 1
                if outside[name] >= self.patience:
                    raise CollapseError(self._message(side, finding, outside[name], state.global_step))
        self.steps_outside = outside

    def _findings(self, side: str, regularizer: Any, is_warm: bool) -> list[_Finding]:
        dims, most = regularizer.active_dims, self.max_active_share * self.vocabulary_size
        smaller = f"lower lambda_{side} or [training] learning_rate, or raise [training] temperature if the loss is a KL divergence"
        larger = f"raise lambda_{side} or [training] max_steps, or start nearer with [student] initial_active_dims"
        found = []
        if regularizer.zero_rows > _MOST_ROWS:
            rows = f"{regularizer.zero_rows:.0%} of the rows are all-zero"
            found.append(_Finding("zero", rows, f"expected at most {_MOST_ROWS:.0%}", smaller))
        if dims < self.min_active_dims:
            band = f"expected at least {self.min_active_dims:g} ([training] min_active_dims)"
            found.append(_Finding("low", f"{dims:.3g} active dims", band, smaller))
        if is_warm and dims > most:
            band = f"expected at most {most:.0f}, {self.max_active_share:g} of {self.vocabulary_size} ([training] max_active_share)"
            found.append(_Finding("high", f"{dims:.0f} active dims", band, larger))
        if is_warm and regularizer.full_share > _MOST_ROWS:
            rows = f"{regularizer.full_share:.0%} of the rows have every dim active"
            found.append(_Finding("full", rows, f"expected at most {_MOST_ROWS:.0%}", larger))
        return found

    def _message(self, side: str, finding: _Finding, num_steps: int, step: int) -> str:
        weight = getattr(self.loss, f"{REGULARIZERS[side]}_weight")
        shown = "none" if weight is None else f"{weight:.3g}"
        return (
            f"step {step}: {side} vectors have left the healthy band: {finding.measured}, {finding.band}, for {num_steps} "
            f"steps in a row ([training] collapse_patience); lambda_{side} is {shown} now. Try: {finding.advice}"
        )
