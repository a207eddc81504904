"""Train a student on a score table: from checks before step 0 to a plain sentence-transformers folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable, check_for_loss
from sparsekd.model_reference import resolve
from sparsekd.recipe import Recipe
from sparsekd.students.adapters import merge_adapters
from sparsekd.students.building import build_student
from sparsekd.students.fast import fast_student
from sparsekd.students.identity import needs_passages, student_fields, training_fields
from sparsekd.students.masked_lm import has_masked_lm_head
from sparsekd.students.recomputation import recomputed
from sparsekd.students.routes import check_columns, column_prompts, routes
from sparsekd.training.arguments import check_device, training_arguments
from sparsekd.training.rows import check_vector_space, text_columns, training_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder
    from transformers import TrainerCallback

    from sparsekd.training.development import FirstStage
    from sparsekd.training.regularizers import DocumentFrequency
    from sparsekd.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedStudent:
    """A trained student and what the trainer logged on the way."""

    model: SparseEncoder
    log_history: list[dict[str, Any]]
    num_steps: int
    resumed_from_step: int
    loss_card: dict[str, Any] = field(default_factory=dict)
    """What the model card says of the loss (``losses.loss_card``), and ``label_scale``."""
    counts: dict[str, int] = field(default_factory=dict)
    """``texts`` tokenised, ``texts_cut`` of them at max_length, ``rows_left_over`` of an epoch, too few for a batch; with dev_steps
    ``best_step``, whose weights these are."""


def check_student(recipe: Recipe) -> SparseEncoder:
    """Return the student as it is without passages; ValueError if the recipe asks for one that cannot be, or for no device."""
    check_device(recipe)
    return build_student(recipe.student, resolve(recipe.student.model).path)


def untrained_student(recipe: Recipe, collection: Collection) -> SparseEncoder:
    """Return the student as it is before step 0, with what starts from the collection's passages (IDF, warm-up, bias)."""
    check_device(recipe)
    passages = list(collection.passages.values()) if needs_passages(recipe.student) else None
    model = build_student(recipe.student, resolve(recipe.student.model).path, passages)
    _warn_of_full_start(recipe)
    return model


def _warn_of_full_start(recipe: Recipe) -> None:
    """Say that a head which starts as the identity has nearly every term active: slow steps, and far to go to a sparse student."""
    student = recipe.student
    if student.kind == "splade" and student.initial_active_dims is None and not has_masked_lm_head(resolve(student.model).path):
        logger.warning(
            "student: %s brings no masked-LM head and [student] initial_active_dims is not set, so nearly the whole vocabulary is "
            "active at the start and every step is slow; set it to a few hundred",
            student.model,
        )


def train(
    recipe: Recipe,
    table: ScoreTable,
    collection: Collection,
    *,
    work_folder: Path,
    key: str,
    first_stage: FirstStage | None = None,
) -> TrainedStudent:
    """Train, resuming from the newest whole checkpoint under ``work_folder`` that belongs to experiment ``key``.

    Where a launcher started several processes, each calls this. ``first_stage`` finds the passages that dev_steps ranks; only the
    first process asks it. Raises ValueError before step 0 if the table cannot feed the loss, the checkpoint is of another
    experiment or memory does not suffice; NonFiniteError at the step that met NaN or infinity; StoppedError after the step in which
    SIGTERM or SIGINT came.
    """
    from transformers import set_seed

    from sparsekd.training import ranks
    from sparsekd.training.checkpoints import newest_whole_checkpoint
    from sparsekd.training.losses import loss_card

    check_for_loss(table, recipe.training.losses)
    rows = training_rows(table, collection)
    ranks.call_others(key)
    set_seed(recipe.training.seed)
    model = untrained_student(recipe, collection)
    check_vector_space(table, model)
    ranks.join(recipe.run.device)
    checkpoint = newest_whole_checkpoint(work_folder, key, sealed_fields(recipe, table))
    model.to(ranks.local_device(recipe.run.device))
    ranks.share_first([*model.parameters(), *model.buffers()])
    label_scale = _label_scale(recipe, model, table, rows)
    if label_scale != 1:
        rows = training_rows(table, collection, label_scale)
    trainer = build_trainer(
        recipe,
        model,
        rows,
        num_passages=table.num_passages,
        work_folder=work_folder,
        key=key,
        table=table,
        collection=collection,
        first_stage=first_stage,
    )
    resumed = _run(recipe, trainer, checkpoint)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    merge_adapters(model)
    counts, state = _counts(recipe, trainer), trainer.state
    card = {**loss_card(trainer.loss), "label_scale": label_scale}
    return TrainedStudent(model.eval(), state.log_history, state.global_step, resumed, card, counts)


def _label_scale(recipe: Recipe, model: SparseEncoder, table: ScoreTable, rows: Dataset) -> float:
    """Return what the labels are multiplied by; measured, by the first process and again when resumed, where the recipe says so."""
    from sparsekd.training import ranks
    from sparsekd.training.label_scale import label_scale_of

    if recipe.training.label_scale != "student":
        return recipe.training.label_scale
    run, scale = recipe.run, 0.0
    if ranks.is_first():
        scale = label_scale_of(model, table, rows, packed=run.packed, fused=run.fused_head)
    return ranks.from_first(scale)


def _run(recipe: Recipe, trainer: DistillationTrainer, checkpoint: Path | None) -> int:
    """Train from ``checkpoint`` to the end; return the step it was saved after, 0 for none."""
    import torch
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    from sparsekd.training import ranks
    from sparsekd.training.memory import check_memory
    from sparsekd.training.stopping import StoppedError, listening

    reached = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    if checkpoint is not None and reached is not None:
        logger.info("train: resuming from %s", checkpoint.name)
        if reached.global_step >= reached.max_steps:
            trainer.take_up(checkpoint, reached)  # train() would take one step more than the run has
            return int(reached.global_step)
    with fast_student(trainer.model, packed=recipe.run.packed, fused=recipe.run.fused_head), recomputed(trainer.model):
        check_memory(recipe, trainer)
        if ranks.rank():  # dropout of its own; a resumed run takes up the state it saved
            torch.manual_seed(recipe.training.seed + ranks.rank())
        with listening() as trainer.stop.signals:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stop.number:
        raise StoppedError(trainer.stop.number, trainer.state.global_step, trainer.state.max_steps)
    return int(reached.global_step) if reached else 0


def _counts(recipe: Recipe, trainer: DistillationTrainer) -> dict[str, int]:
    token_sets, num_rows = trainer.data_collator.token_sets(), len(trainer.train_dataset)
    counts = {
        "texts": sum(len(texts) for texts in token_sets),
        "texts_cut": sum(texts.num_cut for texts in token_sets),
        "rows_left_over": num_rows % recipe.training.batch_size if trainer.args.dataloader_drop_last else 0,
    }
    if trainer.selection is not None and trainer.selection.best_step is not None:
        counts["best_step"] = trainer.selection.best_step
    logger.info(
        "train: %d of %d texts cut at %d tokens; %d of %d rows left over in each epoch",
        counts["texts_cut"],
        counts["texts"],
        recipe.student.max_length,
        counts["rows_left_over"],
        num_rows,
    )
    return counts


def sealed_fields(recipe: Recipe, table: ScoreTable | None) -> dict[str, Any]:
    """Return what a checkpoint is made from, field by field, so that a refusal can name what differs."""
    table_key, of_table = (table.key, table.artifact.manifest["fields"]) if table is not None else ("", {})
    return {**training_fields(recipe, table_key, student_fields(recipe.student)), "table_fields": of_table}


def build_trainer(
    recipe: Recipe,
    model: SparseEncoder,
    rows: Dataset,
    *,
    num_passages: int,
    work_folder: Path,
    key: str,
    table: ScoreTable | None = None,
    collection: Collection | None = None,
    first_stage: FirstStage | None = None,
) -> DistillationTrainer:
    """Return the trainer of ``model`` on ``rows`` (``training_rows``), with a new loss and sealed checkpoints.

    Token ids are kept in the cache that ``table`` is in, without it under ``work_folder``. ``collection`` is what the budget's
    probe, IDF-FLOPS and dev_steps look at. Raises ValueError if the rows have not the columns of the recipe's labels.
    """
    from transformers import PrinterCallback

    from sparsekd.training import ranks
    from sparsekd.training.checkpoints import SealCheckpoint
    from sparsekd.training.collator import RowCollator, text_columns_of, token_columns
    from sparsekd.training.losses import build_loss
    from sparsekd.training.trainer import DistillationTrainer, KeepLossState, LogLastStep

    columns, expected = text_columns_of(rows[0]), text_columns(recipe.labels.kind, num_passages)
    if columns != expected:
        raise ValueError(f"the rows have text columns {columns}, [labels] asks for {expected}; rebuild the table")
    # The trainer applies args.prompts by column name and ignores model.prompts; every text column gets the prompt that
    # encode_query or encode_document will put before it.
    prompts, route_by_column = column_prompts(recipe.student, columns), routes(recipe.student, columns)
    check_columns(columns, prompts=prompts, routes=route_by_column)
    arguments = training_arguments(recipe, work_folder, len(rows), prompts=prompts, routes=route_by_column)
    cache = work_folder if table is None else table.artifact.folder.parent.parent
    tokens = ranks.first_then_others(
        lambda: token_columns(model, rows, columns, prompts=prompts, routes=route_by_column, cache=cache)
    )
    document_frequency = _document_frequency(recipe, model, collection)
    loss = build_loss(model, recipe, document_frequency=document_frequency)
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=loss,
        data_collator=RowCollator(model.preprocess, prompts=prompts, router_mapping=route_by_column, tokens=tokens),
        callbacks=[
            *_guides(recipe, loss, model, collection),
            *_selection(recipe, model, collection, first_stage, work_folder),
            LogLastStep(),
            KeepLossState(loss),
            SealCheckpoint(key, sealed_fields(recipe, table)),  # the last to write into a checkpoint
        ],
    )
    trainer.document_frequency = document_frequency
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for the result; DistillationTrainer.log logs
    return trainer


def _guides(recipe: Recipe, loss: Any, model: SparseEncoder, collection: Collection | None) -> list[TrainerCallback]:
    """Return what sets both lambdas at each step, by ramp or budget, and what stops a student that collapses."""
    from sparsekd.recipe.rules import wrapper_of
    from sparsekd.training.alarms import CollapseAlarm
    from sparsekd.training.budget import LambdaControl
    from sparsekd.training.development import sample_probe

    training, budget = recipe.training, recipe.student.budget
    width = int(model.get_embedding_dimension() or 0)
    control = LambdaControl(
        loss,
        schedule=training.lambda_schedule,
        warmup_ratio=training.lambda_warmup_ratio,
        query_budget=budget.query_active_dims if budget else None,
        passage_budget=budget.passage_active_dims if budget else None,
        vocabulary_size=width,
        probe=sample_probe(model, collection) if budget and collection else None,
    )
    if wrapper_of(recipe) not in ("SpladeLoss", "CachedSpladeLoss"):
        return [control]  # an autoencoder has k active dims always; without regularizers none is in a band
    alarm = CollapseAlarm(
        loss,
        vocabulary_size=width,
        min_active_dims=training.min_active_dims,
        max_active_share=training.max_active_share,
        patience=training.collapse_patience,
        warmup_ratio=training.lambda_warmup_ratio,
        sides={"passage": ("passage",), "query": ("query",)}.get(recipe.student.expansion, ("query", "passage")),
    )
    return [control, alarm]


def _selection(
    recipe: Recipe, model: SparseEncoder, collection: Collection | None, first_stage: FirstStage | None, work_folder: Path
) -> list[TrainerCallback]:
    """Return what measures the dev split and keeps the best student, where the recipe asks for it."""
    from sparsekd.training import ranks
    from sparsekd.training.development import DevSelection, dev_pool

    every, budget = recipe.training.dev_steps, recipe.student.budget
    if every is None:
        return []
    pool = None
    if ranks.is_first():
        if collection is None or first_stage is None:
            raise ValueError("[training] dev_steps needs a collection and a first stage; train without it, or pass both")
        pool = dev_pool(recipe.training, collection, first_stage)
    return [
        DevSelection(
            model,
            pool,
            every=every,
            folder=work_folder / "best",
            query_budget=budget.query_active_dims if budget else None,
            passage_budget=budget.passage_active_dims if budget else None,
        )
    ]


def _document_frequency(recipe: Recipe, model: SparseEncoder, collection: Collection | None) -> DocumentFrequency | None:
    """Return the document frequency of the student's terms in the collection, where the regularizer needs it."""
    if recipe.student.regularizer != "IDF-FLOPS" or collection is None:
        return None
    from sparsekd.students.routes import splade_route
    from sparsekd.students.static import whole_passage_ids
    from sparsekd.training.regularizers import DocumentFrequency

    tokenizer: Any = splade_route(model)[1].tokenizer
    ids = whole_passage_ids(tokenizer, list(collection.passages.values()))
    return DocumentFrequency.of(ids, int(model.get_embedding_dimension() or 0))
