"""sentence-transformers' trainer, made to stop where it would go on with damaged weights, and to say all that it does.

The library's trainer turns a non-finite loss into 0.0 in its logs and trains on; this one stops, in every process, with the ids of
the batch. Gradients are averaged over the processes here (``ranks``). A signal ends the run after a whole step. The log keeps
every component of the loss in full precision, both lambdas and both sides' active dims.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoderTrainer
from sentence_transformers.base.trainer import BaseTrainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from sparsekd.students.adapters import load_checkpoint
from sparsekd.training import ranks
from sparsekd.training.collator import RowCollator
from sparsekd.training.development import DevSelection
from sparsekd.training.losses import own_state, restore_own_state
from sparsekd.training.regularizers import DocumentFrequency
from sparsekd.training.rows import ID_COLUMN
from sparsekd.training.stopping import Signals

logger = logging.getLogger(__name__)

LOSS_STATE = "loss.safetensors"
"""In a checkpoint: what the loss keeps of its own, where it keeps something."""
_IDS_SHOWN = 5


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the weights before this step are the last good ones."""


class LogLastStep(TrainerCallback):
    """Has the last step logged, wherever it falls between two logging steps: the card and the report quote it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log entry if this was the last step."""
        control.should_log = control.should_log or state.global_step >= state.max_steps


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which any process heard a signal, and has that step saved."""

    def __init__(self) -> None:
        self.signals = Signals()
        """Where ``stopping.listening`` notes what came."""
        self.number = 0
        """The signal all processes stopped for, 0 for none."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with the other processes; a signal in the last step ends nothing."""
        number = ranks.largest(self.signals.number)
        if number and state.global_step < state.max_steps:
            self.number = number
            control.should_save = control.should_training_stop = True


class KeepLossState(TrainerCallback):
    """Writes what the loss keeps of its own (a running document frequency, weights of a loss of one's own) into each checkpoint."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state beside the model's; before the seal."""
        kept = own_state(self.loss)
        if kept and ranks.is_first():
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / LOSS_STATE
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}, path)


class DistillationTrainer(SparseEncoderTrainer):
    """Trains a student on a score table; stops with NonFiniteError before bad numbers reach the weights."""

    data_collator: RowCollator
    train_dataset: Dataset
    loss: Any
    _batch_ids: list[str]
    _num_batches = 0  # of this process: a resumed run starts at 0
    _last_log: tuple[int, float] | None = None  # batches and time of the last log entry
    document_frequency: DocumentFrequency | None = None
    """What the loss was built with (``losses.build_loss``)."""

    def __init__(self, **kwargs: Any) -> None:
        """Take the library's arguments; ``callbacks`` in the order in which they are to be called."""
        self.stop = StopOnSignal()
        callbacks = kwargs.pop("callbacks", [])
        self.selection = next((callback for callback in callbacks if isinstance(callback, DevSelection)), None)
        """What keeps the best student, if anything does."""
        super().__init__(callbacks=[self.stop, *callbacks], **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Leave the model as it is where several processes train: ``ranks`` averages the gradients."""
        super().create_accelerator_and_postprocess()
        prepare: Any = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = prepare

    def prepare_loss(self, loss: Any, model: Any) -> nn.Module:
        """Move the loss to the model's device; the library would add a schedule of its own to every SpladeLoss without one."""
        prepared: nn.Module = BaseTrainer.prepare_loss(self, loss, model)
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute loss and gradients of one batch, the gradients averaged over the processes."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        ranks.average_gradients([*self.model.parameters(), *own_parameters(self.loss)])
        ranks.share_first(self.model.buffers())  # counters of an autoencoder: each process has seen other rows
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the loss of one batch; NonFiniteError in every process if it is not finite in one."""
        self._batch_ids = inputs.pop(ID_COLUMN)
        self._num_batches += 1
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if isinstance(result, tuple) else result
        is_finite = bool(torch.isfinite(loss))
        if ranks.largest(0 if is_finite else 1):
            bad = [found for found in ranks.of_all(None if is_finite else (loss.item(), self._batch_ids)) if found is not None]
            raise NonFiniteError(self._message("loss", bad[0][0], [query_id for _, ids in bad for query_id in ids]))
        return result

    def loss_of(self, loss: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the value of ``loss`` on a batch of the collator, as in training; nothing is tracked."""
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != ID_COLUMN})
        features, labels = self.collect_features(inputs)
        with self.compute_loss_context_manager():
            value = loss(features, labels)
        return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        # Under float16 the scaler meets overflow by design: it skips the step and lowers its scale.
        if not math.isfinite(float(norm)) and self.accelerator.scaler is None:
            ids = [query_id for batch_ids in ranks.of_all(self._batch_ids) for query_id in batch_ids]
            raise NonFiniteError(self._message("gradient norm", float(norm), ids))
        return norm

    def _message(self, what: str, value: float, ids: list[str]) -> str:
        shown = ", ".join(ids[:_IDS_SHOWN])
        more = len(ids) - _IDS_SHOWN
        return (
            f"step {self.state.global_step + 1}: {what} is {value}; batch of queries {shown}"
            f"{f' and {more} more' if more > 0 else ''}; nothing of this step was applied. Lower [training] "
            "learning_rate, or look at these rows of the score table"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with loss components, lambdas, both sides' active dims and rows/s added, so that ``log_history`` keeps them."""
        if "loss" in logs:
            loss = self.loss
            logs = {
                **logs,
                **self._components(),
                "lambda_query": float(loss.query_regularizer_weight),
                "lambda_passage": float(loss.document_regularizer_weight),
                "query_active_dims": loss.query_regularizer.active_dims,
                "passage_active_dims": loss.document_regularizer.active_dims,
                **self._speed(),
            }
            logger.info("%s", self._progress(logs))
        super().log(logs, start_time)

    def _components(self) -> dict[str, float]:
        """Return the mean of each component since the last log entry, over all processes, unrounded.

        The library would round to 4 decimals, where a regularizer of 3e-5 shows as 0.
        """
        sums: dict[str, torch.Tensor] = nested_gather(  # type: ignore[no-untyped-call]
            self.accum_loss_components["train"], parallel_mode=self.args.parallel_mode
        )
        self.accum_loss_components["train"] = {}
        steps = float(sums.pop("steps").sum()) if "steps" in sums else 0.0
        return {name: float(value.sum()) / steps for name, value in sums.items()}

    def _speed(self) -> dict[str, float]:
        """Return rows/s since the last log entry and the seconds that the remaining steps would take at that rate."""
        now, before = time.monotonic(), self._last_log
        self._last_log = (self._num_batches, now)
        if before is None or now <= before[1]:  # the first step also pays for what is done once
            return {}
        step_seconds = (now - before[1]) / (self._num_batches - before[0])
        rows = self.args.per_device_train_batch_size * ranks.num_processes()
        remaining = self.state.max_steps - self.state.global_step
        return {"rows_per_second": rows / step_seconds, "seconds_left": step_seconds * remaining}

    def _progress(self, logs: dict[str, float]) -> str:
        step, last = self.state.global_step, self.state.max_steps
        active = f"active dims {logs['query_active_dims']:.0f} query, {logs['passage_active_dims']:.0f} passage"
        line = f"step {step} of {last}: loss {logs['loss']:.4g}, {active}"
        if "rows_per_second" not in logs:
            return line
        return f"{line}, {logs['rows_per_second']:.1f} rows/s, {logs['seconds_left']:.0f} s left"

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        """Load the weights, adapters included, and what the loss keeps of its own."""
        load_checkpoint(self.model, Path(checkpoint_path))
        kept = Path(checkpoint_path) / LOSS_STATE
        restore_own_state(self.loss, load_file(kept) if kept.is_file() else {})

    def take_up(self, checkpoint: Path, state: TrainerState) -> None:
        """Be as after the last step of a run whose last checkpoint this is."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.selection is not None:
            self.selection.on_train_begin(self.args, state, self.control)
            self.selection.restore(state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model alone: the library would render a model card into each checkpoint, slower than all the rest."""
        self.model.save_pretrained(str(output_dir), create_model_card=False)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the card is written by ``training.card`` from the manifests, without looking anything up."""


def own_parameters(loss: Any) -> list[nn.Parameter]:
    """Return the parameters a loss has beside the model's."""
    return [tensor for tensor in own_state(loss).values() if isinstance(tensor, nn.Parameter)]
