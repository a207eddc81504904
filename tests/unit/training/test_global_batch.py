"""One lambda, one batch of 64 rows, however it is split: 1 × 64, 2 × 32, 4 × 16, and in mini-batches: same loss, same gradients.

Processes are real gloo ranks under DistributedDataParallel, which averages their gradients as in training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from sparsekd.recipe import Recipe
from sparsekd.training.losses import build_loss

ROWS, TERMS, FEATURES, PASSAGES = 64, 40, 8, 3
IN_BATCH = "SparseMultipleNegativesRankingLoss"
CASES: dict[str, dict[str, Any]] = {
    "kl-flops": {},
    "margin-l1-threshold": {
        "training": {"loss": "SparseMarginMSELoss"},
        "student": {"regularizer": "L1", "threshold_query": 18, "threshold_passage": 20},
    },
    "sum-df-flops": {
        "training": {"loss": {"SparseDistillKLDivLoss": 1.0, "SparseMarginMSELoss": 0.05, IN_BATCH: 0.1}},
        "student": {"regularizer": "DF-FLOPS"},
    },
    "in-batch-flops": {"training": {"loss": IN_BATCH}, "labels": {"kind": "none", "num_negatives": PASSAGES - 1}},
    "cosent-own": {
        "training": {"loss": "SparseCoSENTLoss"},
        "labels": {"kind": "similarity"},
        "student": {"regularizer": "test_global_batch:LargestMean"},
    },
    "triplet-flops": {
        "training": {"loss": "SparseTripletLoss"},
        "labels": {"kind": "none", "num_negatives": 2, "layout": "triplets"},
    },
}


class LargestMean(nn.Module):
    """A regularizer of one's own that no sum over processes could give: the largest mean weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        return embeddings.mean(dim=0).max()


class Encoder(nn.Module):
    """The smallest student: a matrix product and SPLADE's activation."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(FEATURES, TERMS, generator=generator, dtype=torch.float64))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": torch.log1p(torch.relu(features["input_ids"] @ self.weight))}

    def get_embedding_dimension(self) -> int:
        return TERMS


def recipe_of(case: str, **training: Any) -> Recipe:
    sections = CASES[case]
    return Recipe.model_validate(
        {
            "collection": {"path": "c"},
            "mining": {"miners": [{"kind": "bm25", "quota": 8}]},
            "teachers": [{"name": "t", "kind": "dense", "model": "m"}],
            "labels": {"num_negatives": PASSAGES - 1, **sections.get("labels", {})},
            "student": {"model": "s", "lambda_query": 0.7, "lambda_passage": 0.3, **sections.get("student", {})},
            "training": {**sections.get("training", {}), **training},
        }
    )


def batch_of(recipe: Recipe, rank: int, world_size: int) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    """One process's share of the 64 rows."""
    generator = torch.Generator().manual_seed(1)
    kind = recipe.labels.kind
    num_columns = 2 if kind == "similarity" else 3 if recipe.labels.layout == "triplets" else PASSAGES + 1
    columns = [torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64) for _ in range(num_columns)]
    scores = torch.rand(ROWS, PASSAGES, generator=generator, dtype=torch.float64)
    labels = {"score_list": scores, "similarity": scores[:, 0]}.get(kind)
    share = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return [{"input_ids": column[share]} for column in columns], None if labels is None else labels[share]


def step(model: nn.Module, encoder: Encoder, recipe: Recipe, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Two steps' worth of losses and gradients; the first lets a running statistic take in a batch."""
    loss = build_loss(encoder, recipe)  # type: ignore[arg-type]
    loss.model = model  # as the trainer does with the wrapped model
    features, labels = batch_of(recipe, rank, world_size)
    for _ in range(2):
        encoder.weight.grad = None
        components = loss(features, labels)
        total = torch.stack(list(components.values())).sum()
        total.backward()
    assert encoder.weight.grad is not None
    mean = total.detach().clone()
    if world_size > 1:
        dist.all_reduce(mean)
    sides = (loss.query_regularizer, loss.document_regularizer)
    return {
        "loss": mean / world_size,
        "gradient": encoder.weight.grad.clone(),
        "active": torch.tensor([(side.active_dims, side.zero_rows, side.full_share) for side in sides]),
        "regularizers": torch.tensor([loss.log_components()[f"{side}_regularizer_loss"] for side in ("query", "document")]),
    }


def run_rank(rank: int, folder: str) -> None:
    """Train as one of 4 processes, then the first two as one of 2."""
    # "module:Class" is imported by name, and this file is not on the path of a spawned process.
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    for world_size in (4, 2):
        if rank >= world_size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/of-{world_size}", rank=rank, world_size=world_size)
        results = {}
        for case in CASES:
            for name, training in (("whole", {}), ("cached", {"mini_batch_size": 5})):
                encoder = Encoder()
                model = nn.parallel.DistributedDataParallel(encoder)
                results[case, name] = step(model, encoder, recipe_of(case, **training), rank, world_size)
        torch.save(results, f"{folder}/rank-{rank}-of-{world_size}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, fork_server: None) -> dict[int, list[dict[tuple[str, str], dict[str, Any]]]]:
    """Results of every rank, by number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(run_rank, args=(str(folder),), nprocs=4, start_method="forkserver")
    return {size: [torch.load(folder / f"rank-{rank}-of-{size}.pt") for rank in range(size)] for size in (2, 4)}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``alone(case, **training)``: the one process with all 64 rows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(case: str, **training: Any) -> dict[str, Any]:
        encoder = Encoder()
        return step(encoder, encoder, recipe_of(case, **training))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "cached"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_split_over_processes_has_the_loss_and_gradients_of_the_whole(
    alone: Any, split: dict[int, Any], case: str, world_size: int, name: str
) -> None:
    expected = alone(case)

    for rank in range(world_size):
        found = split[world_size][rank][case, name]

        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-8, check_dtype=False)
        torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["regularizers"], expected["regularizers"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found["active"], expected["active"])


@pytest.mark.parametrize("mini_batch_size", [5, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_mini_batches_have_the_loss_and_gradients_of_the_whole(alone: Any, case: str, mini_batch_size: int) -> None:
    expected = alone(case)

    found = alone(case, mini_batch_size=mini_batch_size)

    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-8, check_dtype=False)
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["active"], expected["active"])


@pytest.mark.parametrize("case", CASES)
def test_the_regularizer_is_what_depends_on_the_split(alone: Any, case: str) -> None:
    """Without the sum over processes the test above would see a difference: the mean over 4 shares is another number."""
    recipe, whole = recipe_of(case), alone(case)
    shares = []
    for rank in range(4):
        loss = build_loss(Encoder(), recipe)  # type: ignore[arg-type]
        loss(*batch_of(recipe, rank, 4))
        shares.append(loss.log_components()["document_regularizer_loss"])

    if recipe.student.regularizer == "L1":  # linear in the rows: the one that a split cannot change
        assert sum(shares) / 4 == pytest.approx(float(whole["regularizers"][1]))
    else:
        assert abs(sum(shares) / 4 / float(whole["regularizers"][1]) - 1) > 1e-3
