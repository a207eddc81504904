"""A loss or gradient that is not finite in one process stops all of them: two real gloo ranks, one of which meets the row."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import multiprocessing
from transformers import TrainerCallback

from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.training.fit import build_trainer
from sparsekd.training.trainer import NonFiniteError

BAD = "q5"
# The square of 1e19 is a finite float32; the gradient's norm, a sum of such squares times vectors, is not.
LABELS = {"loss": float("nan"), "gradient norm": 1e19}


class Beginnings(TrainerCallback):
    """Keeps the weights as they were at the beginning of the last step."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def rows_with(label: float) -> Dataset:
    """Eight rows, of which the sixth has ``label``."""
    ids = [f"q{number}" for number in range(8)]
    columns = {
        "query": [f"cat {query_id}" for query_id in ids],
        "positive": [f"a cat and {query_id}" for query_id in ids],
        "negative_1": ["a dog"] * 8,
        "label": [[label if query_id == BAD else 2.0, 0.0] for query_id in ids],
        "query_id": ids,
    }
    return Dataset.from_dict(columns)


def train_until_it_stops(rank: int, recipe: Recipe, folder: Path) -> None:
    """In a process of its own: train on each of ``LABELS``, two rows a step, and leave what was found for the test."""
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {name: "2" for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    models = {what: build_student(recipe.student, Path(recipe.student.model)) for what in LABELS}  # before they meet: it saves
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for what, model in models.items():
        trainer = build_trainer(recipe, model, rows_with(LABELS[what]), num_passages=2, work_folder=folder / what, key="key")
        beginnings = Beginnings()
        trainer.add_callback(beginnings)
        with pytest.raises(NonFiniteError) as caught:
            trainer.train()
        found[what] = {
            "message": str(caught.value),
            "step": trainer.state.global_step + 1,
            "batch": trainer._batch_ids,
            "before": beginnings.weights,
            "after": model.state_dict(),
        }
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # the server imports everything first
def test_both_processes_stop_with_the_ids_of_the_row_and_the_weights_of_the_step_before(
    make_recipe: Callable[..., Recipe], fork_server: None, tmp_path: Path
) -> None:
    recipe = make_recipe(loss="SparseMarginMSELoss", labels={"num_negatives": 1}, batch_size=2, max_steps=4, run={"save_steps": 1})

    multiprocessing.start_processes(train_until_it_stops, args=(recipe, tmp_path), nprocs=2, start_method="forkserver")

    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for what in LABELS:
        first, second = (rank[what] for rank in ranks)
        assert first["message"] == second["message"]
        assert first["message"].startswith(f"step {first['step']}: {what} is ")
        assert "; nothing of this step was applied. Lower [training] learning_rate" in first["message"]
        assert [BAD in rank["batch"] for rank in (first, second)].count(True) == 1
        # A loss is one process's own, a gradient is everybody's.
        blamed = [rank["batch"] for rank in (first, second) if what != "loss" or BAD in rank["batch"]]
        assert f"batch of queries {', '.join(query_id for batch in blamed for query_id in batch)};" in first["message"]
        assert first["step"] == second["step"]
        for name, tensor in first["after"].items():
            assert all(torch.equal(tensor, other[name]) for other in (first["before"], second["before"], second["after"]))
        saved = {int(path.name.rpartition("-")[2]) for path in (tmp_path / what).glob("checkpoint-*")}
        assert max(saved, default=0) == first["step"] - 1
