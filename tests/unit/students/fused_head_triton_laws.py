"""Laws of the Triton kernels, under triton's interpreter: test_fused_head_triton.py runs this file in a process of its own.

The interpreter has no bfloat16: it multiplies the bits as whole numbers (triton-lang/triton#11584). Operands of its products are
widened first, so what is tested of bfloat16 is all around the products. Tiles are small here, so that small tensors have many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers.sparse_encoder.modules import SpladePooling

from sparsekd.students import fused_head, head_triton
from sparsekd.students.fast import _pool
from sparsekd.students.fused_head import splade_max

Head = Callable[..., torch.Tensor]
SMALL = {"TOKENS": 16, "TERMS": 16, "WIDTH": 16, "num_warps": 4, "num_stages": 1}
# Of the largest gradient: sums are float32, but upstream gradients, weights and results are rounded to the dtype, once each.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=3)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors of a CPU to the kernels, float64 excepted, as a card does; in small tiles."""
    monkeypatch.setattr(fused_head, "_has_kernels", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(head_triton, "maximum_tiles", lambda longest, dtype: SMALL)


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter multiply the values of bfloat16."""
    import triton.language as tl  # here: --doctest-modules imports this file where there may be none
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def of_values(builder, a, b, *others):  # type: ignore[no-untyped-def]
        operands = [builder.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b)]
        return multiply(builder, *operands, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_values)


def plain_max(hidden: torch.Tensor, embeddings: torch.Tensor, bias: torch.Tensor | None, lengths: Sequence[int]) -> torch.Tensor:
    """All logits, log1p and relu on each, then the maximum; zeros for a text without tokens."""
    weights = torch.log1p(torch.relu(torch.nn.functional.linear(hidden, embeddings, bias)))
    nothing = weights.sum(dim=0) * 0
    return torch.stack([part.max(dim=0).values if len(part) else nothing for part in weights.split(list(lengths))])


def vectors_and_gradients(head: Head, inputs: Sequence[torch.Tensor | None], lengths: Sequence[int]) -> list[torch.Tensor]:
    arguments = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    vectors = head(*arguments, lengths)
    upstream = torch.linspace(-1.0, 2.0, vectors.numel()).to(vectors.dtype).view_as(vectors)
    leaves = [tensor for tensor in arguments if tensor is not None]
    return [vectors.detach(), *torch.autograd.grad(vectors, leaves, upstream)]


def draw(lengths: Sequence[int], width: int, vocabulary: int, seed: int = 0) -> list[torch.Tensor]:
    """Multiples of 1/4 up to 2: float32 adds their products without rounding, in any order, and many tokens tie."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(lengths), width), (vocabulary, width), (vocabulary,))
    return [(torch.randn(shape, generator=generator) * 4).round().clamp(-8, 8) / 4 for shape in shapes]


def draw_whole(lengths: Sequence[int], width: int, vocabulary: int, seed: int = 0) -> list[torch.Tensor]:
    """Whole numbers up to 2: sums of up to 60 products are exact in halves too, and most tokens tie."""
    return [(tensor * 4).clamp(-2, 2) for tensor in draw(lengths, width, vocabulary, seed)]


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values at other places in memory."""
    if layout == "gaps":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.mT.contiguous().mT if layout == "transposed" and tensor.dim() == 2 else tensor


def assert_equal_heads(inputs: Sequence[torch.Tensor | None], lengths: Sequence[int]) -> None:
    fused, plain = (vectors_and_gradients(head, inputs, lengths) for head in (splade_max, plain_max))
    assert torch.equal(fused[0], plain[0])
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_near(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        largest = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours.float(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest)


@given(
    lengths=LENGTHS,
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 20),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vectors_are_bit_equal_and_gradients_within_1e_5(
    lengths: list[int], width: int, vocabulary: int, has_bias: bool, seed: int
) -> None:
    hidden, embeddings, bias = draw(lengths, width, vocabulary, seed)

    assert_equal_heads((hidden, embeddings, bias if has_bias else None), lengths)


@given(
    lengths=LENGTHS,
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 20),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "gaps", "transposed"])] * 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_dtype_and_layout_equals_autograd_where_tokens_tie(
    lengths: list[int], width: int, vocabulary: int, has_bias: bool, dtype: torch.dtype, layouts: tuple[str, ...], seed: int
) -> None:
    hidden, embeddings, bias = draw_whole(lengths, width, vocabulary, seed)
    exact = (hidden, embeddings, bias if has_bias else None)
    inputs = [None if each is None else lay_out(each.to(dtype), layout) for each, layout in zip(exact, layouts, strict=True)]

    found = vectors_and_gradients(splade_max, inputs, lengths)
    expected = vectors_and_gradients(plain_max, exact, lengths)

    assert {tensor.dtype for tensor in found} == {dtype}
    assert torch.equal(found[0], expected[0].to(dtype))
    assert_near(found[1:], expected[1:], dtype)


@given(
    lengths=LENGTHS,
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 20),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_autocast_rounds_operands_and_where_no_bias_says_otherwise_vectors(
    lengths: list[int], width: int, vocabulary: int, has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    hidden, embeddings, bias = draw_whole(lengths, width, vocabulary, seed)
    inputs = (hidden, embeddings, bias / 3 if has_bias else None)  # thirds, which no half holds

    with torch.autocast("cpu", dtype):
        found = vectors_and_gradients(splade_max, inputs, lengths)
    expected = vectors_and_gradients(plain_max, inputs, lengths)

    rounded = torch.float32 if has_bias else dtype
    assert [tensor.dtype for tensor in found] == [rounded] + [torch.float32] * (len(found) - 1)
    assert_near(found, expected, rounded)


@given(
    mask=st.integers(1, 20).flatmap(
        lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3)
    ),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mask_has_the_vectors_and_gradients_of_the_librarys_pooling(mask: list[list[bool]], has_bias: bool, seed: int) -> None:
    mask_BL = torch.tensor(mask)
    hidden_TD, *weights = draw([mask_BL.numel()], 6, 20, seed)
    decoder = torch.nn.Linear(6, 20, bias=has_bias)
    for parameter, values in zip(decoder.parameters(), weights, strict=False):
        parameter.data = values
    hidden_BLD = hidden_TD.view(*mask_BL.shape, 6).requires_grad_()

    plain = SpladePooling().train()({"token_embeddings": decoder(hidden_BLD), "attention_mask": mask_BL})["sentence_embedding"]
    fused = _pool(decoder)({"token_embeddings": hidden_BLD, "attention_mask": mask_BL})["sentence_embedding"]

    assert torch.equal(fused, plain)
    upstream, leaves = torch.linspace(-1.0, 2.0, plain.numel()).view_as(plain), [hidden_BLD, *decoder.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(each, leaves, upstream) for each in (fused, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[40, 1, 0, 17], [], [0, 0], [1]])
def test_texts_longer_than_a_tile_empty_ones_and_none(lengths: list[int]) -> None:
    inputs = draw(lengths, 20, 33)

    vectors, *gradients = vectors_and_gradients(splade_max, inputs, lengths)

    if lengths:
        assert_equal_heads(inputs, lengths)
    assert [bool(vector.any()) for vector in vectors] == [length > 0 for length in lengths]
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]


@pytest.mark.parametrize("shift", [-1e3, -9.0, 1e3], ids=["no-term-active", "some", "every-term-active"])
def test_shares_of_active_terms(shift: float) -> None:
    lengths = [5, 33, 2]
    hidden, embeddings, bias = draw(lengths, 24, 20)

    assert_equal_heads((hidden, embeddings, bias + shift), lengths)


def test_views_with_strides() -> None:
    lengths = [2, 5, 3]
    hidden, embeddings, bias = draw(lengths, 6, 8)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]

    assert_equal_heads((strided, embeddings.T.contiguous().T, torch.stack([bias, bias], dim=1)[:, 1]), lengths)


def test_two_runs_give_the_same_bits_and_near_the_cpu() -> None:
    lengths, generator = [30, 1, 17], torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((48, 40), (33, 40), (33,))]

    first, second = (vectors_and_gradients(splade_max, [tensor.float() for tensor in inputs], lengths) for _ in range(2))
    exact = vectors_and_gradients(plain_max, inputs, lengths)

    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))
    for ours, theirs in zip(first, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 64])
def test_ties_across_tiles_go_to_the_earliest_token(tokens: int) -> None:
    hidden = torch.ones(200, 3)

    maximum, winner = head_triton.maxima(hidden, torch.ones(20, 3), torch.zeros(20), [50, 150], True, {**SMALL, "TOKENS": tokens})

    assert winner is not None
    assert torch.equal(maximum, torch.full((2, 20), 3.0))
    assert torch.equal(winner, torch.tensor([[0], [50]], dtype=torch.int32).expand(2, 20))


def test_winners_are_left_out_where_nobody_asks() -> None:
    hidden, embeddings, bias = draw([7, 20], 12, 33)

    maximum, winner = head_triton.maxima(hidden, embeddings, -bias, [7, 20], False)

    assert winner is None
    assert torch.equal(maximum, head_triton.maxima(hidden, embeddings, -bias, [7, 20], True)[0])


def test_values_that_are_not_numbers_stay_visible() -> None:
    hidden, embeddings, bias = draw([3, 3, 3], 4, 6)
    hidden[4, 2] = torch.nan

    vectors = splade_max(hidden, embeddings, bias, [3, 3, 3])

    assert [bool(vector.isfinite().any()) for vector in vectors] == [True, False, True]


def test_half_precision_accumulates_in_float32() -> None:
    lengths = [5, 20]
    inputs = draw(lengths, 64, 40)

    found = vectors_and_gradients(splade_max, [tensor.half() for tensor in inputs], lengths)
    expected = vectors_and_gradients(plain_max, inputs, lengths)

    assert [tensor.dtype for tensor in found] == [torch.float16] * 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=2e-3)


def test_rows_in_bfloat16_are_summed_in_float32() -> None:
    matrix = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.25, 8.0]]).bfloat16()
    weights = torch.tensor([1.0, 2.0, 256.0, 1.0, 1.0]).bfloat16()
    rows, bounds = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1, 0, 0, 0], [0, 2, 2, 5]))

    sums = head_triton.weighted_row_sums(matrix, weights, rows, bounds)

    # 256 + 1 is 256 in bfloat16: the last row says 258, as only a float32 sum does.
    assert sums.tolist() == [[2.0, 2.5, 15.0], [0.0, 0.0, 0.0], [258.0, 516.0, -258.0]]


def test_the_tiles_of_a_card_give_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [130, 3]
    hidden, embeddings, bias = draw(lengths, 70, 150)
    small = head_triton.maxima(hidden, embeddings, -bias, lengths, True)
    monkeypatch.undo()

    for longest in (16, 64, 128):
        tiles = head_triton.maximum_tiles(longest, torch.float32)
        large = head_triton.maxima(hidden, embeddings, -bias, lengths, True, tiles)

        active = small[0] > -bias
        assert torch.equal(large[0], small[0])
        assert torch.equal(large[1][active], small[1][active])
