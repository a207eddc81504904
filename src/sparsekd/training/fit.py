"""Train a student on a score table: from checks before step 0 to a plain sentence-transformers folder."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd.collection.beir import Collection
from sparsekd.device import prepare_device
from sparsekd.labels.score_table import ScoreTable, check_for_loss
from sparsekd.model_reference import resolve
from sparsekd.recipe import Recipe
from sparsekd.students.splade import build_student, calibrate_bias, fused_head, has_masked_lm_head
from sparsekd.training.rows import text_columns, training_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder, SparseEncoderTrainingArguments

    from sparsekd.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_CALIBRATION_PASSAGES = 128  # over whole collections they gave 119.6 for 120 and 200.4 for 200


@dataclass(frozen=True)
class TrainedStudent:
    """A trained student and what the trainer logged on the way."""

    model: SparseEncoder
    log_history: list[dict[str, Any]]
    num_steps: int
    resumed_from_step: int


def check_student(recipe: Recipe) -> SparseEncoder:
    """Return the student without its bias calibrated; ValueError if the recipe asks for one that cannot be, or for no device."""
    _check_device(recipe)
    folder = resolve(recipe.student.model).path
    if recipe.student.initial_active_dims is not None and has_masked_lm_head(folder):
        raise ValueError(
            f"[student] initial_active_dims: {recipe.student.model} brings a trained masked-LM head, whose bias is left alone; "
            "remove the key"
        )
    return build_student(recipe.student, folder)


def untrained_student(recipe: Recipe, collection: Collection) -> SparseEncoder:
    """Return the student as it is before step 0, its bias calibrated on passages of the collection if the recipe asks for it."""
    model = check_student(recipe)
    if recipe.student.initial_active_dims is not None:
        # A sample by hash, so that file order changes nothing.
        ids = sorted(collection.passages, key=lambda passage_id: hashlib.sha256(passage_id.encode()).digest())
        sample = [collection.passages[passage_id] for passage_id in ids[:_CALIBRATION_PASSAGES]]
        bias = calibrate_bias(model, sample, recipe.student.initial_active_dims)
        logger.info("student: output bias %.3f for %d active dims per passage", bias, recipe.student.initial_active_dims)
    return model


def train(recipe: Recipe, table: ScoreTable, collection: Collection, *, work_folder: Path, key: str) -> TrainedStudent:
    """Train, resuming from the newest whole checkpoint under ``work_folder`` that belongs to experiment ``key``.

    Raises ValueError before step 0 if the table cannot feed the loss, NonFiniteError at the step that met NaN or infinity.
    """
    import contextlib

    from sentence_transformers import SparseEncoder
    from transformers import TrainerState, set_seed
    from transformers.trainer import TRAINER_STATE_NAME

    from sparsekd.training.checkpoints import newest_whole_checkpoint

    check_for_loss(table, recipe.training.loss)
    rows = training_rows(table, collection)
    set_seed(recipe.training.seed)
    model = untrained_student(recipe, collection).to(recipe.run.device)
    trainer = build_trainer(recipe, model, rows, num_passages=table.num_passages, work_folder=work_folder, key=key)
    checkpoint = newest_whole_checkpoint(work_folder, key)
    if checkpoint is not None:
        logger.info("train: resuming from %s", checkpoint.name)
        reached = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if reached.global_step >= reached.max_steps:
            # The trainer would take one step more than the run has.
            model.load_state_dict(SparseEncoder(str(checkpoint), device=recipe.run.device).state_dict())
            return TrainedStudent(model.eval(), reached.log_history, reached.global_step, reached.global_step)
    with fused_head(model) if recipe.run.fused_head else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    resumed = reached.global_step if checkpoint else 0
    return TrainedStudent(model.eval(), trainer.state.log_history, trainer.state.global_step, resumed)


def build_trainer(
    recipe: Recipe, model: SparseEncoder, rows: Dataset, *, num_passages: int, work_folder: Path, key: str
) -> DistillationTrainer:
    """Return the trainer of ``model`` on ``rows`` (``training_rows``), with a new loss and sealed checkpoints."""
    from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
    from transformers import PrinterCallback

    from sparsekd.training.checkpoints import SealCheckpoint
    from sparsekd.training.losses import build_loss
    from sparsekd.training.trainer import DistillationTrainer, LogLastStep, RowCollator

    arguments = _arguments(recipe, work_folder, num_passages)
    loss = build_loss(model, recipe)
    schedule = SpladeRegularizerWeightSchedulerCallback(
        loss, scheduler_type=recipe.training.lambda_schedule, warmup_ratio=recipe.training.lambda_warmup_ratio
    )
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=loss,
        data_collator=RowCollator(model.preprocess, valid_label_columns=["label"], prompts=arguments.prompts),
        callbacks=[schedule, SealCheckpoint(key), LogLastStep()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for the result; DistillationTrainer.log logs
    return trainer


def _check_device(recipe: Recipe) -> None:
    device = prepare_device(recipe.run)
    if device.startswith("cuda:") and device != "cuda:0":
        number = device.removeprefix("cuda:")
        raise ValueError(
            f"[run] device = {device!r}: the trainer takes the first CUDA device it sees; "
            f'set device = "cuda" and CUDA_VISIBLE_DEVICES={number} in the environment'
        )


def _arguments(recipe: Recipe, work_folder: Path, num_passages: int) -> SparseEncoderTrainingArguments:
    from sentence_transformers import SparseEncoderTrainingArguments

    training, student = recipe.training, recipe.student
    columns = text_columns(num_passages)
    # The trainer applies args.prompts by column name and ignores model.prompts; every text column gets the prompt that
    # encode_query or encode_document will put before it.
    prompts = {column: student.query_prompt if column == "query" else student.passage_prompt for column in columns}
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(work_folder),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        prompts={column: prompt for column, prompt in prompts.items() if prompt},
        save_strategy="steps",
        save_steps=recipe.run.save_steps,
        save_total_limit=2,  # the newest may be torn by a crash
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,  # the library's bar writes each log to stdout
        dataloader_pin_memory=recipe.run.device != "cpu",
        use_cpu=recipe.run.device == "cpu",
        remove_unused_columns=False,
    )
    # One process trains on one device. Without this the trainer wraps the model in DataParallel where it sees several cards,
    # and FLOPS would be taken over a share of the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
