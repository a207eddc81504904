"""Each regularizer against hand-worked numbers and a second formula in numpy; and what it remembers of its batch."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sparse_encoder.losses import FlopsLoss

from sparsekd.training.regularizers import (
    DF_DECAY,
    DFFlopsRegularizer,
    DocumentFrequency,
    FlopsRegularizer,
    IDFFlopsRegularizer,
    Regularizer,
    build_regularizer,
)

# Two rows, three terms: means 1/2, 0, 5/4; row 0 has 2 active dims, row 1 has one.
ROWS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.5]])


class Encoder(torch.nn.Module):
    """A model of three terms; nothing else of it is asked."""

    def get_embedding_dimension(self) -> int:
        return 3


def build(name: str, **settings: Any) -> Regularizer:
    return build_regularizer(name, Encoder(), **{"threshold": None, **settings})


def test_flops_is_the_sum_of_squared_means() -> None:
    assert float(build("FLOPS").compute_loss_from_embeddings(ROWS)) == pytest.approx(1 / 4 + 25 / 16)


def test_l1_is_the_mean_sum_of_weights() -> None:
    assert float(build("L1").compute_loss_from_embeddings(ROWS)) == pytest.approx(3.5 / 2)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), threshold=st.none() | st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_flops_and_its_threshold_equal_the_librarys(seed: int, rows: int, threshold: int | None) -> None:
    embeddings = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, 4))).relu().requires_grad_()
    theirs = FlopsLoss(torch.nn.Identity(), threshold=threshold)  # type: ignore[arg-type]

    ours = FlopsRegularizer(threshold).compute_loss_from_embeddings(embeddings)

    expected = theirs.compute_loss_from_embeddings(embeddings)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(value, embeddings)[0] for value in (ours, expected)]
    torch.testing.assert_close(*gradients)


def test_half_precision_vectors_are_summed_in_float32() -> None:
    # 2,049 ones: bfloat16 cannot count beyond 256, float16 not beyond 2,048.
    for dtype in (torch.bfloat16, torch.float16):
        value = build("L1").compute_loss_from_embeddings(torch.ones(2049, 3, dtype=dtype))

        assert value.dtype == torch.float32
        assert float(value) == 3.0


def test_df_flops_weights_are_those_of_the_paper_at_its_three_points() -> None:
    regularizer = DFFlopsRegularizer(3)
    regularizer.document_frequency_V.copy_(torch.tensor([1.0, 0.1, 0.0]))
    regularizer.seen.fill_(1.0)

    weight_V = regularizer.weight_V()

    # x = 1: 1; x = α: 1/2; x = 0: 0.
    assert weight_V.tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def test_df_flops_equals_its_formula_over_a_running_document_frequency() -> None:
    regularizer, generator = DFFlopsRegularizer(5), np.random.default_rng(0)
    weight = total = np.zeros(5)

    for _ in range(3):
        rows = np.maximum(generator.normal(-0.5, 1.0, (6, 5)), 0)
        value = regularizer.compute_loss_from_embeddings(torch.from_numpy(rows))

        total = DF_DECAY * total + (1 - DF_DECAY) * (rows > 0).mean(axis=0)
        weight = DF_DECAY * weight + (1 - DF_DECAY)
        x = np.clip(total / weight, 1e-8, 1)
        w = 1 / (1 + (x ** (math.log(2) / math.log(0.1)) - 1) ** 10)
        assert float(value) == pytest.approx(np.square(w * rows.mean(axis=0)).sum(), rel=1e-5)


def test_df_flops_presses_a_stop_word_and_spares_a_rare_term() -> None:
    rows = torch.zeros(100, 3)
    rows[:, 0], rows[0, 1] = 1.0, 100.0  # equal means, in every vector and in one
    rows.requires_grad_()

    build("DF-FLOPS").compute_loss_from_embeddings(rows).backward()

    assert rows.grad is not None
    assert float(rows.grad[0, 0]) == pytest.approx(2 / 100)
    assert float(rows.grad[0, 1]) < 1e-6


def test_evaluation_does_not_count_document_frequency() -> None:
    regularizer = DFFlopsRegularizer(3)
    with torch.no_grad():
        regularizer.compute_loss_from_embeddings(ROWS)

    assert float(regularizer.seen) == 0.0


def test_a_threshold_leaves_rows_out_of_df_flops_but_not_out_of_its_count() -> None:
    regularizer = DFFlopsRegularizer(3, threshold=1)

    value = regularizer.compute_loss_from_embeddings(ROWS)

    # Row 1 is left out of the means: 1/2, 0, 1. Term 2 is active in both rows, so w = 1 there; term 0 in half of them.
    w0 = 1 / (1 + (0.5 ** (math.log(2) / math.log(0.1)) - 1) ** 10)
    assert float(value) == pytest.approx((w0 / 2) ** 2 + 1.0)


def test_idf_flops_divides_each_mean_by_the_terms_idf() -> None:
    # Of 3 passages term 0 is in all, term 1 in one, term 2 in none: idf 1, 1 + ln 2, 1 + ln 4.
    frequency = DocumentFrequency.of([[0, 0], [0, 1], [0]], 3)

    value = build("IDF-FLOPS", document_frequency=frequency).compute_loss_from_embeddings(ROWS)

    assert (frequency.counts_V.tolist(), frequency.num_passages) == ([3, 1, 0], 3)
    assert float(value) == pytest.approx((1 / 2) ** 2 + (5 / 4 / (1 + math.log(4))) ** 2)


def test_idf_flops_never_presses_harder_than_flops() -> None:
    regularizer = IDFFlopsRegularizer(DocumentFrequency(torch.arange(11), 10))

    assert float(regularizer.idf_V.min()) == 1.0


@pytest.mark.parametrize(("frequency", "found"), [(None, "None"), (DocumentFrequency(torch.ones(2), 1), "2")])
def test_idf_flops_without_its_vocabularys_document_frequency_is_refused(frequency: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"IDF-FLOPS.* needs the document frequency of 3 terms in the collection, found {found};"):
        build("IDF-FLOPS", document_frequency=frequency)


@pytest.mark.parametrize("name", ["FLOPS", "L1", "DF-FLOPS"])
def test_a_regularizer_remembers_its_last_batch(name: str) -> None:
    regularizer = build(name)
    assert (regularizer.active_dims, regularizer.zero_rows, regularizer.full_share) == (0.0, 0.0, 0.0)

    regularizer.compute_loss_from_embeddings(ROWS)
    assert (regularizer.active_dims, regularizer.zero_rows, regularizer.full_share) == (1.5, 0.0, 0.0)

    regularizer.compute_loss_from_embeddings(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert (regularizer.active_dims, regularizer.zero_rows, regularizer.full_share) == (1.0, 0.5, 0.25)


@pytest.mark.parametrize("name", ["FLOPS", "L1", "DF-FLOPS"])
def test_a_row_of_zeros_gives_zero_and_finite_gradients(name: str) -> None:
    rows = torch.zeros(2, 3, requires_grad=True)

    value = build(name).compute_loss_from_embeddings(rows)
    value.backward()

    assert value.item() == 0.0
    assert rows.grad is not None
    assert bool(torch.isfinite(rows.grad).all())


# One's own


class Square(torch.nn.Module):
    """Mean squared weight."""

    citation = "@misc{square}"

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()

    def compute_loss_from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.square().mean()

    def get_config_dict(self) -> dict[str, Any]:
        return {"power": 2}


class Needy(Square):
    def __init__(self, model: torch.nn.Module, scale: float) -> None:
        super().__init__(model)


class Constant(Square):
    def compute_loss_from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.ones(())


class Vector(Square):
    def compute_loss_from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.mean(dim=0)


class Broken(Square):
    def compute_loss_from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        raise KeyError("sentence_embedding")


class Plain:
    def __init__(self, model: torch.nn.Module) -> None:
        pass


class Silent(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module that holds the classes of this file."""
    module = types.ModuleType("own_regularizers")
    module.__dict__.update({kind.__name__: kind for kind in (Square, Needy, Constant, Vector, Broken, Plain, Silent)})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_regularizer_of_ones_own_is_used_and_remembers_its_batch(own_module: str) -> None:
    regularizer = build(f"{own_module}:Square")

    value = regularizer.compute_loss_from_embeddings(ROWS)

    assert float(value) == pytest.approx(5.25 / 6)
    assert regularizer.active_dims == 1.5
    assert regularizer.get_config_dict() == {"threshold": None, "power": 2}
    assert regularizer.citation == "@misc{square}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere_at_all:Square", r"cannot import nowhere_at_all \(.*\); put its folder on PYTHONPATH"),
        ("own_regularizers:Circle", "own_regularizers has no Circle; expected module:Class"),
        ("own_regularizers:Needy", r"Needy\(model\) fails \(.*scale.*\); give every other argument a default"),
        ("own_regularizers:Plain", r"is a Plain, expected a subclass of torch.nn.Module"),
        ("own_regularizers:Silent", r"has no compute_loss_from_embeddings\(embeddings\); add it"),
        ("own_regularizers:Broken", "fails on a two-row batch: KeyError: 'sentence_embedding'"),
        ("own_regularizers:Constant", r"gives tensor\(1.\) on a two-row batch; expected a finite scalar tensor that depends on"),
        ("own_regularizers:Vector", r"gives shape \(3,\) on a two-row batch; expected a finite scalar tensor that depends on"),
    ],
)
def test_a_regularizer_that_breaks_the_contract_is_refused(own_module: str, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[student\] regularizer = '{name}'[: ].*{reason}"):
        build(name)
