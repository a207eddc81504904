"""The fused head on a CUDA device, against the eager head on it; and the arithmetic of its CUDA path on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsekd.students import fused_head
from sparsekd.students.fused_head import splade_max

LENGTHS = [3, 17, 1, 40, 40, 8, 25, 2, 33, 12, 5, 29]
VOCABULARY, WIDTH = 1000, 48

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, embeddings: Tensor, bias: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, embeddings, bias)
    return torch.stack([torch.log1p(torch.relu(rows)).amax(dim=0) for rows in logits.split(LENGTHS)])


def fused(hidden: Tensor, embeddings: Tensor, bias: Tensor) -> Tensor:
    return splade_max(hidden, embeddings, bias, LENGTHS)


def batched(hidden: Tensor, embeddings: Tensor, bias: Tensor) -> Tensor:
    maximum: Tensor = fused_head._MaxLogit.apply(hidden, embeddings, bias, tuple(LENGTHS), hidden.dtype, True)
    return torch.log1p(torch.relu(maximum))


def step(head: Head, device: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Return the vectors and the gradients of hidden states, embeddings and bias, about 2 % of the terms active."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(LENGTHS), WIDTH, generator=generator),
        torch.randn(VOCABULARY, WIDTH, generator=generator),
        torch.randn(VOCABULARY, generator=generator) - 22,
    ]
    leaves = [value.to(device, dtype).requires_grad_() for value in inputs]
    weights = torch.randn(len(LENGTHS), VOCABULARY, generator=generator).to(device)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        vectors = head(*leaves)
    (vectors.float() * weights).sum().backward()
    return [vectors.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected) == 4
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_cuda_equals_the_eager_head(device: str) -> None:
    expected = step(eager, device, torch.float64)

    found = step(fused, device, torch.float64)

    assert largest_difference(found, expected) < 1e-12


@pytest.mark.gpu
def test_cuda_equals_the_cpu(device: str) -> None:
    expected = [value.to(device) for value in step(fused, "cpu", torch.float32)]

    found = step(fused, device, torch.float32)

    assert largest_difference(found, expected) < 1e-4


@pytest.mark.gpu
def test_autocast_on_cuda_stays_within_bfloat16_of_the_eager_head(device: str) -> None:
    expected = step(eager, device, torch.float32, torch.bfloat16)

    found = step(fused, device, torch.float32, torch.bfloat16)

    assert [value.dtype for value in found] == [torch.float32] * 4
    # Logits are about 22 here; bfloat16 keeps 8 bits, so log1p of logit - bias differs by up to 22 / 256.
    assert float((found[0] - expected[0]).abs().max()) < 0.1


@pytest.mark.parametrize("block_tokens", [1, 80, 2048])
def test_batched_path_equals_the_eager_head(block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "_BATCHED_BLOCK_TOKENS", block_tokens)
    expected = step(eager, "cpu", torch.float64)

    found = step(batched, "cpu", torch.float64)

    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("head", [fused, batched])
def test_batch_without_an_active_term_has_no_gradient(head: Head) -> None:
    hidden = torch.ones(sum(LENGTHS), 2, requires_grad=True)
    embeddings = torch.ones(5, 2, requires_grad=True)

    head(hidden, embeddings, torch.full((5,), -9.0)).sum().backward()

    assert hidden.grad is not None
    assert embeddings.grad is not None
    assert not hidden.grad.any()
    assert not embeddings.grad.any()


def test_autocast_changes_logits_and_not_the_dtype_of_gradients() -> None:
    expected = step(fused, "cpu", torch.float32)

    found = step(fused, "cpu", torch.float32, torch.bfloat16)

    assert [value.dtype for value in found] == [torch.float32] * 4
    assert 0 < float((found[0] - expected[0]).abs().max()) < 0.1
