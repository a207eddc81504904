"""sentence-transformers' trainer, made to stop where it would go on with damaged weights.

The library's trainer turns a non-finite loss into 0.0 in its logs and trains on; this one stops with the ids of the batch, and
logs what the sparsity schedule does. Everything else is the library's.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from sentence_transformers import SparseEncoderTrainer
from sentence_transformers.sparse_encoder.data_collator import SparseEncoderDataCollator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekd.training.rows import ID_COLUMN

logger = logging.getLogger(__name__)

_IDS_SHOWN = 5


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the weights before this step are the last good ones."""


class RowCollator(SparseEncoderDataCollator):
    """Tokenises the text columns and carries the query ids along, untokenised."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of ``features`` with their query ids as a list of strings under ``query_id``."""
        ids = [row[ID_COLUMN] for row in features]
        batch: dict[str, Any] = super().__call__([{k: v for k, v in row.items() if k != ID_COLUMN} for row in features])
        return {**batch, ID_COLUMN: ids}


class LogLastStep(TrainerCallback):
    """Has the last step logged, wherever it falls between two logging steps: the card and the report quote it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log entry if this was the last step."""
        control.should_log = control.should_log or state.global_step >= state.max_steps


class DistillationTrainer(SparseEncoderTrainer):
    """Trains a student on a score table; stops with NonFiniteError before bad numbers reach the weights."""

    _batch_ids: list[str]
    _num_batches = 0  # of this process: a resumed run starts at 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one batch; NonFiniteError if it is not finite."""
        self._batch_ids = inputs.pop(ID_COLUMN)
        self._num_batches += 1
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if isinstance(result, tuple) else result
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(self._message("loss", loss.item()))
        return result

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if not math.isfinite(float(norm)):
            raise NonFiniteError(self._message("gradient norm", float(norm)))
        return norm

    def _message(self, what: str, value: float) -> str:
        shown = ", ".join(self._batch_ids[:_IDS_SHOWN])
        more = len(self._batch_ids) - _IDS_SHOWN
        return (
            f"step {self.state.global_step + 1}: {what} is {value}; batch of queries {shown}"
            f"{f' and {more} more' if more > 0 else ''}; nothing of this step was applied. Lower [training] "
            "learning_rate, or look at these rows of the score table"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the regularizer weights and both sides' active dims added, so that ``log_history`` keeps them."""
        if "loss" in logs:
            loss: Any = self.loss
            logs = {
                **logs,
                "lambda_query": float(loss.query_regularizer_weight),
                "lambda_passage": float(loss.document_regularizer_weight),
                "query_active_dims": loss.query_regularizer.active_dims,
                "passage_active_dims": loss.document_regularizer.active_dims,
            }
            logger.info("%s", self._progress(logs, start_time))
        super().log(logs, start_time)

    def _progress(self, logs: dict[str, float], start_time: float | None) -> str:
        step, last = self.state.global_step, self.state.max_steps
        active = f"active dims {logs['query_active_dims']:.0f} query, {logs['passage_active_dims']:.0f} passage"
        line = f"step {step} of {last}: loss {logs['loss']:.4g}, {active}"
        if start_time is None:
            return line
        return f"{line}, {(time.time() - start_time) / self._num_batches * (last - step):.0f} s left"

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the card is written by ``training.card`` from the manifests, without looking anything up."""
