"""The fused head on a CUDA device, by kernels and by batched blocks, against the eager head on it and against the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sparsekd.students import fused_head
from sparsekd.students.fused_head import splade_max

pytestmark = pytest.mark.gpu

LENGTHS = [3, 17, 1, 0, 40, 40, 8, 25, 2, 150, 33, 12, 5, 29]
VOCABULARY, WIDTH = 1000, 48

Head = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def eager(hidden: Tensor, embeddings: Tensor, bias: Tensor, lengths: Sequence[int]) -> Tensor:
    weights = torch.log1p(torch.relu(torch.nn.functional.linear(hidden, embeddings, bias)))
    nothing = weights.sum(dim=0) * 0
    return torch.stack([rows.max(dim=0).values if len(rows) else nothing for rows in weights.split(list(lengths))])


@pytest.fixture(params=["kernels", "batched"])
def path(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a card; the kernels are skipped where there is no triton or the card is older than they are made for."""
    if request.param == "kernels" and not fused_head._has_kernels(torch.ones(1, device=device)):
        pytest.skip("no kernels: triton is not installed or the card's compute capability is below 8.0")
    if request.param == "batched":
        monkeypatch.setattr(fused_head, "_has_kernels", lambda tensor: False)
    return str(request.param)


def step(
    head: Head,
    device: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    lengths: Sequence[int] = LENGTHS,
    vocabulary: int = VOCABULARY,
) -> list[Tensor]:
    """Return the vectors and the gradients of hidden states, embeddings and bias, about 2 % of the terms active.

    Hidden states and embeddings are numbers that bfloat16 has, so every dtype is given the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), WIDTH, generator=generator).bfloat16(),
        torch.randn(vocabulary, WIDTH, generator=generator).bfloat16(),
        torch.randn(vocabulary, generator=generator).bfloat16() - 22,
    ]
    leaves = [value.to(device, dtype).requires_grad_() for value in inputs]
    weights = torch.randn(len(lengths), vocabulary, generator=generator).to(device)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        vectors = head(*leaves, lengths)
    (vectors.float() * weights).sum().backward()
    return [vectors.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs.double().cpu(), rtol=tolerance, atol=tolerance)


def test_float64_equals_the_eager_head(device: str) -> None:
    assert_near(step(splade_max, device, torch.float64), step(eager, device, torch.float64), 1e-12)


def test_float32_is_within_1e_5_of_float64(path: str, device: str) -> None:
    assert_near(step(splade_max, device, torch.float32), step(eager, device, torch.float64), 1e-5)


def test_float32_is_within_1e_5_of_the_cpu(path: str, device: str) -> None:
    assert_near(step(splade_max, device, torch.float32), step(splade_max, "cpu", torch.float32), 1e-5)


def test_float32_products_keep_more_than_tf32(path: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, embeddings = (torch.randn(rows, 384, generator=generator) for rows in (sum(LENGTHS), VOCABULARY))
    leaves = [hidden, embeddings, torch.full((VOCABULARY,), -40.0)]
    expected = eager(*(leaf.double() for leaf in leaves), LENGTHS)

    found = splade_max(*(leaf.to(device) for leaf in leaves), LENGTHS)

    # A single TF32 product, 11 bits, errs by .01 here: 40 / 2^12.
    assert float((found.cpu().double() - expected).abs().max()) < 1e-4
    assert 0.02 < float((expected > 0).double().mean()) < 0.5


def test_a_vocabulary_of_a_quarter_million(path: str, device: str) -> None:
    lengths = [70, 0, 5, 128]
    found, expected = (step(head, device, torch.float32, None, lengths, 250_002) for head in (splade_max, eager))

    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    # Among a million maxima some lie within rounding of the runner-up, whose gradient goes elsewhere then.
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float(((ours - theirs).abs() > 1e-4).float().mean()) < 1e-4


def test_two_runs_give_the_same_bits(path: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (step(splade_max, device, dtype) for _ in range(2))
        assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


def test_autocast_is_within_bfloat16_of_the_eager_head(path: str, device: str) -> None:
    expected = step(eager, device, torch.float32, torch.bfloat16)

    found = step(splade_max, device, torch.float32, torch.bfloat16)

    assert [value.dtype for value in found] == [torch.float32] * 4
    # Logits are about 22 here; bfloat16 keeps 8 bits, so log1p of logit - bias differs by up to 22 / 256.
    assert float((found[0] - expected[0]).abs().max()) < 0.1


def test_kernels_accumulate_bfloat16_in_float32(device: str) -> None:
    if not fused_head._has_kernels(torch.ones(1, device=device)):
        pytest.skip("no kernels: triton is not installed or the card's compute capability is below 8.0")
    found = step(splade_max, device, torch.float32, torch.bfloat16)

    # The inputs are bfloat16 numbers: nothing is rounded but float32 sums.
    assert_near(found[:1] * 4, step(eager, device, torch.float64)[:1] * 4, 1e-4)


def test_weights_in_bfloat16_give_vectors_and_gradients_in_it(path: str, device: str) -> None:
    found = step(splade_max, device, torch.bfloat16)

    assert [value.dtype for value in found] == [torch.bfloat16] * 4
    assert float((found[0].double() - step(eager, device, torch.float64)[0]).abs().max()) < 0.1


def test_a_batch_without_an_active_term_has_no_gradient(path: str, device: str) -> None:
    hidden = torch.ones(sum(LENGTHS), 2, device=device, requires_grad=True)
    embeddings = torch.ones(5, 2, device=device, requires_grad=True)

    splade_max(hidden, embeddings, torch.full((5,), -9.0, device=device), LENGTHS).sum().backward()

    assert hidden.grad is not None
    assert embeddings.grad is not None
    assert not hidden.grad.any()
    assert not embeddings.grad.any()
