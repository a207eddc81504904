"""Fine-tune a cross-encoder: sentence-transformers' trainer and losses, stopped by dev nDCG@10, resumable by the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sparsekd.collection.beir import Collection
from sparsekd.recipe import Run, TrainTeacher
from sparsekd.teacher_training.body import build_cross_encoder, grouped_by_length, num_cut
from sparsekd.teacher_training.development import METRIC, DevReranking
from sparsekd.teacher_training.rows import TeacherRows
from sparsekd.training.checkpoints import SealCheckpoint, newest_whole_checkpoint
from sparsekd.training.stopping import StoppedError, listening
from sparsekd.training.trainer import NonFiniteError, StopOnSignal

if TYPE_CHECKING:
    from sparsekd.training.development import FirstStage

logger = logging.getLogger(__name__)

_METRIC = f"eval_{METRIC}"


@dataclass(frozen=True)
class TrainedTeacher:
    """The best cross-encoder of a run and what is known of it."""

    model: CrossEncoder
    num_steps: int
    resumed_from_step: int
    best_step: int
    dev: dict[str, float]
    """nDCG@10 on the dev queries of ``bm25`` and of this model, ``reranked``."""
    counts: dict[str, int]
    """``rows``, ``rows_dropped`` for too few candidates, ``pairs``, ``pairs_cut`` of them at max_length."""
    log_history: list[dict[str, Any]] = field(repr=False)
    loss_config: dict[str, Any]
    citation: str


class MeasureLastStep(TrainerCallback):
    """Has the last step measured, saved and logged, wherever it falls between two measurements."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for all three if this was the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = True


class TeacherTrainer(CrossEncoderTrainer):
    """The library's trainer, made to stop at numbers that are not finite and to say what it does in the log."""

    _first_query = ""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the loss of one batch."""
        self._first_query = inputs["query"][0]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; NonFiniteError before NaN reaches the weights. LambdaLoss takes NaN scores for ties: its loss hides them."""
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: gradient norm is {float(norm)}; first query of the batch: "
                f"{self._first_query[:80]!r}; nothing of this step was applied. Lower [train_teacher] learning_rate"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the entry, and put it in one line on stderr."""
        step, last = self.state.global_step, self.state.max_steps
        if "loss" in logs:
            logger.info("step %d of %d: loss %.4f, gradient norm %.2f", step, last, logs["loss"], logs["grad_norm"])
        elif _METRIC in logs:
            logger.info("step %d of %d: dev nDCG@10 %.4f", step, last, logs[_METRIC])
        super().log(logs, start_time)

    def take_up(self, state: TrainerState) -> None:
        """Be as after the last step of a run that ended in this state: the best weights."""
        self.state = state
        self._load_best_model()

    def _load_best_model(self) -> None:
        """Load the best checkpoint; the library would log a failure and go on with the last weights."""
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(str(output_dir), create_model_card=False)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the card is written from the manifest."""


def train_teacher(
    section: TrainTeacher,
    run: Run,
    collection: Collection,
    rows: TeacherRows,
    first_stage: FirstStage,
    *,
    work_folder: Path,
    key: str,
    fields: Mapping[str, Any],
) -> TrainedTeacher:
    """Fine-tune the section's body on ``rows``, going on from the newest whole checkpoint of ``key`` under ``work_folder``.

    ``run.device`` must be there (``training.arguments.check_device``). ``first_stage`` finds what dev queries rerank. Raises
    ValueError before step 0 for a body or a dev split that will not do; NonFiniteError at the step that met NaN or infinity;
    StoppedError after the step in which SIGTERM or SIGINT came.
    """
    dev = DevReranking(section, collection, first_stage)
    model = build_cross_encoder(section, run.device)
    columns = rows.columns(collection)
    cut, pairs = num_cut(model, section, columns)
    logger.info(
        "train-teacher: %d rows, %d dropped; %d of %d pairs cut at %d tokens",
        len(rows.query_ids),
        rows.num_dropped,
        cut,
        pairs,
        section.max_length,
    )
    loss = getattr(losses, section.loss)(model, mini_batch_size=-1)
    checkpoint = newest_whole_checkpoint(work_folder, key, fields)
    early = EarlyStoppingCallback(early_stopping_patience=section.patience)
    stop = StopOnSignal()
    trainer = TeacherTrainer(
        model=model,
        args=_arguments(section, run, work_folder),
        train_dataset=Dataset.from_dict(columns),
        loss=loss,
        evaluator=dev,
        callbacks=[stop, MeasureLastStep(), early, SealCheckpoint(key, fields)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for the result
    resumed = _run(trainer, stop, checkpoint, section)
    state = trainer.state
    best = float(state.best_metric or 0.0)
    if best <= dev.bm25:
        logger.warning("train-teacher: reranks no better than BM25: dev nDCG@10 %.4f, BM25 %.4f", best, dev.bm25)
    return TrainedTeacher(
        model=model.eval(),
        num_steps=state.global_step,
        resumed_from_step=resumed,
        best_step=int(str(state.best_model_checkpoint).rsplit("-", 1)[-1]),
        dev={"bm25": dev.bm25, "reranked": best},
        counts={"rows": len(rows.query_ids), "rows_dropped": rows.num_dropped, "pairs": pairs, "pairs_cut": cut},
        log_history=state.log_history,
        loss_config=loss.get_config_dict(),
        citation=loss.citation.strip(),
    )


def _run(trainer: TeacherTrainer, stop: StopOnSignal, checkpoint: Path | None, section: TrainTeacher) -> int:
    """Train from ``checkpoint`` to the end; return the step it was saved after, 0 for none."""
    reached = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    if checkpoint is not None and reached is not None:
        logger.info("train-teacher: resuming from %s", checkpoint.name)
        if _is_over(reached, section):
            trainer.take_up(reached)
            return int(reached.global_step)
    with grouped_by_length(trainer.model), listening() as stop.signals:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.number:
        raise StoppedError(stop.number, trainer.state.global_step, trainer.state.max_steps)
    return int(reached.global_step) if reached else 0


def _is_over(state: TrainerState, section: TrainTeacher) -> bool:
    """Whether a saved run had no step left: the last was taken, or patience had run out."""
    callbacks: Any = state.stateful_callbacks
    without_better = callbacks["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
    return state.global_step >= state.max_steps or without_better >= section.patience


def _arguments(section: TrainTeacher, run: Run, work_folder: Path) -> CrossEncoderTrainingArguments:
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(work_folder),
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=section.warmup_ratio,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        bf16=section.precision == "bfloat16",
        seed=section.seed,
        data_seed=section.seed,
        eval_strategy="steps",
        eval_steps=section.dev_steps,
        save_strategy="steps",
        save_steps=section.dev_steps,
        save_total_limit=2,  # the best is kept beside the newest, which may be torn by a crash
        load_best_model_at_end=True,
        metric_for_best_model=_METRIC,
        greater_is_better=True,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,  # the library's bar writes each log to stdout
        dataloader_pin_memory=False,
        use_cpu=run.device == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device
    return arguments
