"""From a recipe to the trainer's arguments; and what must be refused of a run's device, precision and number of processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekd.device import prepare_device
from sparsekd.recipe import Recipe

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoderTrainingArguments


def check_device(recipe: Recipe) -> None:
    """Set the compute threads; ValueError if training cannot run where, or in the precision, that the recipe says."""
    device = prepare_device(recipe.run)
    if device.startswith("cuda:") and device != "cuda:0":
        number = device.removeprefix("cuda:")
        raise ValueError(
            f"[run] device = {device!r}: the trainer takes the first CUDA device it sees; "
            f'set device = "cuda" and CUDA_VISIBLE_DEVICES={number} in the environment'
        )
    if recipe.training.precision == "float16" and not device.startswith("cuda"):
        raise ValueError(
            f'[training] precision = "float16" needs a CUDA device, and [run] device = {device!r}; '
            'set precision = "bfloat16" or "float32"'
        )


def training_arguments(
    recipe: Recipe, work_folder: Path, num_rows: int, *, prompts: Mapping[str, str], routes: Mapping[str, str]
) -> SparseEncoderTrainingArguments:
    """Return the arguments of a run over ``num_rows`` rows, whose text columns have these prompts and routes.

    ValueError if the batch cannot be divided among the processes, or the log is wanted in a form whose package is not there.
    """
    from sentence_transformers import SparseEncoderTrainingArguments

    training = recipe.training
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(work_folder),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=_rows_per_process(recipe, num_rows),
        # The rows an epoch leaves over make no batch: a smaller one would be regularized otherwise, and several processes could
        # not share it. Other rows are left over in each epoch.
        dataloader_drop_last=num_rows >= training.batch_size,
        learning_rate=training.learning_rate,
        learning_rate_mapping=_rates_of_their_own(recipe),
        lr_scheduler_type="linear",
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        seed=training.seed,
        data_seed=training.seed,
        prompts=dict(prompts),
        router_mapping=dict(routes),
        save_strategy="steps",
        save_steps=recipe.run.save_steps,
        save_total_limit=2,  # the newest may be torn by a crash
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=_report_to(recipe),
        disable_tqdm=True,  # the library's bar writes each log to stdout
        dataloader_pin_memory=recipe.run.device.startswith("cuda"),
        use_cpu=recipe.run.device == "cpu",
        remove_unused_columns=False,
    )
    # One process trains on one device. Without this the trainer wraps the model in DataParallel where it sees several cards,
    # and FLOPS would be taken over a share of the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _rates_of_their_own(recipe: Recipe) -> dict[str, float]:
    """Return the learning rate by pattern of parameter names, for those that have another than the rest."""
    rate, expansion = recipe.training.static_learning_rate, recipe.student.expansion
    if rate is None:
        return {}
    side = {"passage": "query", "query": "document"}[expansion]
    return {rf"sub_modules\.{side}\.0\.weight$": rate}


def _rows_per_process(recipe: Recipe, num_rows: int) -> int:
    """Return the rows of a step in this process; ValueError if the batch cannot be divided or filled."""
    from sparsekd.training import ranks

    batch_size, num_processes = recipe.training.batch_size, ranks.num_processes()
    if batch_size % num_processes:
        raise ValueError(
            f"[training] batch_size = {batch_size} cannot be divided among {num_processes} processes; "
            f"set a multiple of {num_processes}, or start another number of processes"
        )
    if num_processes > 1 and num_rows < batch_size:
        raise ValueError(
            f"[training] batch_size = {batch_size}: the table has {num_rows} rows, too few for one step of {num_processes} "
            "processes; lower batch_size, or start one process"
        )
    return batch_size // num_processes


def _report_to(recipe: Recipe) -> str:
    if not recipe.run.tensorboard:
        return "none"
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("[run] tensorboard = true needs the package tensorboard, which is not installed; pip install tensorboard")
    return "tensorboard"
