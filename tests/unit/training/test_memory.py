"""The memory of a step is known within a factor of 2 before the first, and what cannot be had is refused with what can."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.fast import fast_student
from sparsekd.training.fit import build_trainer, train, untrained_student
from sparsekd.training.memory import (
    StepMemory,
    available_bytes,
    check_fits,
    check_memory,
    measure_step,
    representative_rows,
)
from sparsekd.training.rows import training_rows

GIGABYTE = 1_000_000_000


def test_peak_of_a_chain_of_layers_is_its_activations_and_gradients() -> None:
    # y_i = relu(x_i w): each of 8 layers keeps a relu output of rows x 500 floats; w and its gradient are 1 MB each.
    weight = torch.nn.Linear(500, 500, bias=False)

    def step(rows: int, mini_batch_size: int | None) -> torch.Tensor:
        hidden = torch.ones(rows * 100, 500)
        for _ in range(8):
            hidden = torch.relu(weight(hidden))
        return hidden.sum()

    memory = measure_step(weight, step, 64)

    activations = 100 * 500 * 4 * 8
    assert activations <= memory.per_row <= 2 * activations
    assert 3e6 <= memory.fixed <= 5.1e6  # gradient, two moments, and up to two products on their way into the gradient
    assert memory.per_row_at_once == 0
    assert weight.weight.grad is None


def test_a_peak_that_is_flat_at_first_is_followed_until_rows_decide_it() -> None:
    # The gradient of w (64 MB, twice while it is summed up) is the peak until activations of 1.6 MB a row outgrow it.
    weight = torch.nn.Linear(4000, 4000, bias=False)
    factor = torch.ones(1, 1, requires_grad=True)

    def step(rows: int, mini_batch_size: int | None) -> torch.Tensor:
        hidden = torch.ones(rows * 50, 1000) * factor
        for _ in range(8):
            hidden = torch.sigmoid(hidden)
        return hidden.sum() + (weight.weight * 2).sum()

    memory = measure_step(weight, step, 10_000)

    assert 8 * 200_000 <= memory.per_row <= 2 * 8 * 200_000
    few = measure_step(weight, step, 10_000, available=100e6)
    assert few.per_row >= memory.per_row  # where little can be tried, it is the whole of a row's step that counts


def test_measuring_leaves_random_numbers_buffers_and_mode_as_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)).eval()
    state, before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    measure_step(model, lambda rows, _: model(torch.randn(rows + 1, 4)).sum(), 8)

    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def make_trainer(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> Callable[..., Any]:
    """Return ``make(recipe)``: its trainer on the sample's table."""

    def make(recipe: Recipe) -> Any:
        table, model = make_table(recipe), untrained_student(recipe, collection)
        rows = training_rows(table, collection)
        return build_trainer(recipe, model, rows, num_passages=table.num_passages, work_folder=tmp_path / "work", key="key")

    return make


@pytest.mark.parametrize("training", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
@pytest.mark.parametrize("run", [{}, {"packed": False}, {"packed": False, "fused_head": False}], ids=["fast", "padded", "library"])
def test_an_estimate_is_within_a_factor_of_2_of_a_whole_step(
    make_recipe: Callable[..., Recipe],
    make_trainer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    run: dict[str, Any],
    training: dict[str, Any],
) -> None:
    from sparsekd.training.memory import _peak_bytes

    recipe = make_recipe(run=run, batch_size=12, **training)
    trainer = make_trainer(recipe)
    rows = [trainer.train_dataset[place] for place in range(12)]
    optimizer = 2 * sum(parameter.numel() * 4 for parameter in trainer.model.parameters())

    with fast_student(trainer.model, packed=recipe.run.packed, fused=recipe.run.fused_head):
        with caplog.at_level("INFO", logger="sparsekd"):
            check_memory(recipe, trainer)
        trainer.model.train()
        batch = trainer.data_collator(rows)
        found = _peak_bytes(lambda: trainer.loss_of(trainer.loss, batch).backward(), torch.device("cpu")) + optimizer

    estimate = float(caplog.text.rpartition("needs about ")[2].split()[0]) * 1e6
    assert found / 2 <= estimate <= found * 2


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    memory = StepMemory(fixed=GIGABYTE, per_row=GIGABYTE / 10)
    assert memory.of(10) == pytest.approx(1.1 * 2 * GIGABYTE)

    check_fits(memory, 10, None, available=2.3 * GIGABYTE)
    with pytest.raises(ValueError, match="batch_size = 64") as caught:
        check_fits(memory, 64, None, available=2.3 * GIGABYTE)

    assert str(caught.value) == (
        "[training] batch_size = 64: a step needs about 8.1 GB beside what is loaded, 2.3 GB are free; batch_size = 10 is the "
        "largest that fits, or embed fewer rows at once with mini_batch_size (exact, one forward pass more)"
    )
    check_fits(memory, 10, None, available=2.3 * GIGABYTE)
    with pytest.raises(ValueError, match="batch_size = 10 is the largest"):
        check_fits(memory, 11, None, available=2.3 * GIGABYTE)


def test_a_mini_batch_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    memory = StepMemory(fixed=GIGABYTE, per_row=GIGABYTE / 100, per_row_at_once=GIGABYTE / 10)

    check_fits(memory, 64, 4, available=2.3 * GIGABYTE)
    with pytest.raises(ValueError, match=r"batch_size = 9 is the largest .*, mini_batch_size = 4 is the largest that fits this"):
        check_fits(memory, 64, 10, available=2.3 * GIGABYTE)
    check_fits(memory, 9, 10, available=2.3 * GIGABYTE)


def test_the_batch_of_several_processes_is_named_as_the_recipe_does() -> None:
    memory = StepMemory(fixed=GIGABYTE, per_row=GIGABYTE / 10)

    with pytest.raises(ValueError, match=r"batch_size = 64: .*for each of 4 processes; batch_size = 40 is the largest that fits"):
        check_fits(memory, 16, None, available=2.3 * GIGABYTE, num_processes=4)


def test_where_not_even_a_row_fits_something_else_is_advised() -> None:
    with pytest.raises(ValueError, match=r"not even one row fits: lower \[student\] max_length or \[labels\] num_negatives"):
        check_fits(StepMemory(fixed=GIGABYTE, per_row=1e6), 16, None, available=1e6)


def test_padded_rows_are_represented_by_the_longest_packed_ones_by_their_mean() -> None:
    tokens = [100] * 90 + [50] * 9 + [900]

    assert representative_rows(tokens, 64, packed=False, count=1) == [99]
    assert tokens[representative_rows(tokens, 64, packed=True, count=1)[0]] == 100
    assert representative_rows([7], 4, packed=False, count=3) == [0, 0, 0]
    assert len(representative_rows(tokens, 64, packed=True, count=300)) == 300


def test_free_memory_is_less_than_the_machine_has() -> None:
    assert 1e6 < available_bytes(torch.device("cpu")) < math.inf


PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from sparsekd.training.memory import available_bytes
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 500_000_000, resource.RLIM_INFINITY))
print(json.dumps(available_bytes(torch.device("cpu"))))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_limit_on_the_process_counts() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)

    assert 400e6 < json.loads(done.stdout) <= 500e6


RESIDENT = """
import logging, re, sys
from pathlib import Path
import torch
from datasets import Dataset
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.students.fast import fast_student
from sparsekd.training.fit import build_trainer
from sparsekd.training.memory import check_memory

def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1000

said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("sparsekd").addHandler(Keep())
logging.getLogger("sparsekd").setLevel("INFO")
model, work, fused = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "fused"
def trainer_of(batch_size):
    recipe = Recipe.model_validate({
        "collection": {"path": "x"}, "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
        "teachers": [{"name": "t", "kind": "dense", "model": "x"}], "labels": {"num_negatives": 1},
        "student": {"model": model, "max_length": 128}, "training": {"batch_size": batch_size, "max_steps": 2},
        "run": {"threads": 1, "fused_head": fused, "packed": fused}})
    student = build_student(recipe.student, Path(model))
    words = "the cat and the dog of war in france "
    rows = Dataset.from_dict({"query": ["cat war"] * 48, "positive": [words * 20] * 48, "negative_1": [words * 18] * 48,
                              "label": [[2.0, 1.0]] * 48, "query_id": ["q"] * 48})
    return recipe, build_trainer(recipe, student, rows, num_passages=2, work_folder=work, key="key")

def run(batch_size):
    recipe, trainer = trainer_of(batch_size)
    with fast_student(trainer.model, packed=fused, fused=fused):
        check_memory(recipe, trainer)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        trainer.train()
    return resident("VmHWM") - before

run(1)  # what is loaded once
print(run(48 if fused else 8), [line for line in said if line.startswith("memory")][-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
@pytest.mark.parametrize("head", ["fused", pytest.param("library", marks=pytest.mark.long)])
def test_an_estimate_is_within_a_factor_of_2_of_what_the_process_grows_by(
    save_tiny_model: Callable[..., Path], tmp_path: Path, head: str
) -> None:
    folder = save_tiny_model("BertForMaskedLM", tmp_path / "model", vocab_size=30_522, hidden_size=128, intermediate_size=512)

    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(folder), str(tmp_path / "work"), head],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    grown, said = done.stdout.split(maxsplit=1)
    number, unit = said.rpartition("needs about ")[2].split()[:2]
    estimate = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    assert int(grown) / 2 <= estimate <= int(grown) * 2, (grown, said)


def test_the_estimate_changes_no_weight(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    recipe = make_recipe(student={"dropout": 0.1})
    table = make_table(recipe)
    rows, model = training_rows(table, collection), untrained_student(recipe, collection)
    trainer = build_trainer(recipe, model, rows, num_passages=table.num_passages, work_folder=tmp_path / "work-1", key="key")
    with fast_student(model, packed=True, fused=True):
        trainer.train()

    measured = train(recipe, table, collection, work_folder=tmp_path / "work-2", key="key").model.state_dict()

    assert all(torch.equal(tensor, measured[name]) for name, tensor in model.state_dict().items())
