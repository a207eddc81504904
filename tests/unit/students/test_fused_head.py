"""The fused head against autograd through the whole T x V logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers.sparse_encoder.modules import SpladePooling

from sparsekd.recipe import Student
from sparsekd.students import fused_head as fused_head_module
from sparsekd.students.building import build_student
from sparsekd.students.fast import _pool, decoder_of, fused_head
from sparsekd.students.fused_head import splade_max

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
# Of the largest gradient: upstream gradients, weights and sums are rounded to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def plain_max(hidden: torch.Tensor, embeddings: torch.Tensor, bias: torch.Tensor | None, lengths: Sequence[int]) -> torch.Tensor:
    """All logits, log1p and relu on each, then the maximum: SPLADE-max as the papers write it; zeros for a text without tokens."""
    weights = torch.log1p(torch.relu(torch.nn.functional.linear(hidden, embeddings, bias)))
    nothing = weights.sum(dim=0) * 0
    return torch.stack([part.max(dim=0).values if len(part) else nothing for part in weights.split(list(lengths))])


def vectors_and_gradients(head: Callable[..., torch.Tensor], inputs: Inputs, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Vectors, then the gradients of hidden, embeddings and bias for an upstream gradient that differs everywhere."""
    arguments = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    vectors = head(*arguments, lengths)
    upstream = torch.linspace(-1.0, 2.0, vectors.numel(), dtype=torch.float64).to(vectors.dtype).view_as(vectors)
    leaves = [tensor for tensor in arguments if tensor is not None]
    return [vectors.detach(), *torch.autograd.grad(vectors, leaves, upstream)]


def draw(lengths: Sequence[int], width: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(lengths), width), (vocabulary, width), (vocabulary,))
    hidden, embeddings, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden, embeddings, bias


def draw_whole(lengths: Sequence[int], width: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers up to 2: sums of up to 60 products are exact in halves too, and most tokens tie."""
    hidden, embeddings, bias = ((tensor * 4).round().clamp(-2, 2) for tensor in draw(lengths, width, vocabulary, seed))
    return hidden, embeddings, bias


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values at other places in memory."""
    if layout == "gaps":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.mT.contiguous().mT if layout == "transposed" and tensor.dim() == 2 else tensor


def assert_near(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        largest = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest)


def assert_equal_heads(inputs: Inputs, lengths: Sequence[int], tolerance: float = 1e-12) -> None:
    fused = vectors_and_gradients(splade_max, inputs, lengths)
    plain = vectors_and_gradients(plain_max, inputs, lengths)
    for name, ours, theirs in zip(("vectors", "hidden", "embeddings", "bias"), fused, plain, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=["blocked", "blocked-small", "blocked-threads", "batched", "batched-small"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CPU's way, and that of devices without kernels, which runs on a CPU too; each also with texts and terms cut often."""
    threads = torch.get_num_threads()
    if request.param.startswith("batched"):
        monkeypatch.setattr(fused_head_module, "_write_maxima", fused_head_module._write_maxima_batched)
    if not request.param.endswith("ed"):
        for name, size in (("_BLOCK_TOKENS", 3), ("_BLOCK_TERMS", 4), ("_BATCHED_TOKENS", 8), ("_BATCHED_LOGITS", 20)):
            monkeypatch.setattr(fused_head_module, name, size)
    if request.param == "blocked-threads":
        monkeypatch.setattr(fused_head_module, "_WORTH_WORKERS", 0)
        torch.set_num_threads(3)
    yield str(request.param)
    torch.set_num_threads(threads)


# The fixture is the same for all examples of a parameter.
lawful = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@lawful
def test_vectors_and_gradients_equal_autograd(
    path: str, lengths: list[int], width: int, vocabulary: int, has_bias: bool, seed: int
) -> None:
    hidden, embeddings, bias = draw(lengths, width, vocabulary, seed)

    assert_equal_heads((hidden, embeddings, bias if has_bias else None), lengths)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@lawful
def test_float32_vectors_are_bit_equal_and_gradients_within_1e_5_where_products_are_exact(
    path: str, lengths: list[int], width: int, vocabulary: int, has_bias: bool, seed: int
) -> None:
    # Multiples of 1/4 up to 2: float32 adds their products without rounding, in any order, and many tokens tie.
    hidden, embeddings, bias = (
        (tensor * 4).round().clamp(-8, 8).div(4).float() for tensor in draw(lengths, width, vocabulary, seed)
    )
    inputs = (hidden, embeddings, bias if has_bias else None)

    fused, plain = (vectors_and_gradients(head, inputs, lengths) for head in (splade_max, plain_max))

    assert torch.equal(fused[0], plain[0])
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    has_bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "gaps", "transposed"])] * 3),
    seed=st.integers(0, 2**31),
)
@lawful
def test_every_dtype_and_layout_equals_autograd_where_tokens_tie(
    path: str,
    lengths: list[int],
    width: int,
    vocabulary: int,
    has_bias: bool,
    dtype: torch.dtype,
    layouts: tuple[str, ...],
    seed: int,
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    hidden, embeddings, bias = (tensor.to(wide) for tensor in draw_whole(lengths, width, vocabulary, seed))
    exact = (hidden, embeddings, bias if has_bias else None)
    inputs = [None if each is None else lay_out(each.to(dtype), layout) for each, layout in zip(exact, layouts, strict=True)]

    found = vectors_and_gradients(splade_max, inputs, lengths)
    expected = vectors_and_gradients(plain_max, exact, lengths)

    assert {tensor.dtype for tensor in found} == {dtype}
    assert torch.equal(found[0], expected[0].to(dtype))
    assert_near(found[1:], expected[1:], dtype)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@lawful
def test_autocast_rounds_operands_and_where_no_bias_says_otherwise_vectors(
    path: str, lengths: list[int], width: int, vocabulary: int, has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    hidden, embeddings, bias = (tensor.float() for tensor in draw_whole(lengths, width, vocabulary, seed))
    inputs = (hidden, embeddings, bias / 3 if has_bias else None)  # thirds, which no half holds

    with torch.autocast("cpu", dtype):
        found = vectors_and_gradients(splade_max, inputs, lengths)
    expected = vectors_and_gradients(plain_max, inputs, lengths)

    rounded = torch.float32 if has_bias else dtype
    assert [tensor.dtype for tensor in found] == [rounded] + [torch.float32] * (len(found) - 1)
    assert_near(found, expected, rounded)


@given(
    mask=st.integers(1, 9).flatmap(
        lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=5)
    ),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@lawful
def test_any_mask_has_the_vectors_and_gradients_of_the_librarys_pooling(
    path: str, mask: list[list[bool]], width: int, vocabulary: int, has_bias: bool, seed: int
) -> None:
    mask_BL = torch.tensor(mask)
    hidden_TD, *weights = draw([mask_BL.numel()], width, vocabulary, seed)
    decoder = torch.nn.Linear(width, vocabulary, bias=has_bias)
    for parameter, values in zip(decoder.parameters(), weights, strict=False):
        parameter.data = values
    hidden_BLD = hidden_TD.view(*mask_BL.shape, width).requires_grad_()

    plain = SpladePooling().train()({"token_embeddings": decoder(hidden_BLD), "attention_mask": mask_BL})["sentence_embedding"]
    fused = _pool(decoder)({"token_embeddings": hidden_BLD, "attention_mask": mask_BL})["sentence_embedding"]

    upstream = torch.linspace(-1.0, 2.0, plain.numel(), dtype=torch.float64).view_as(plain)
    leaves = [hidden_BLD, *decoder.parameters()]
    found, expected = (torch.autograd.grad(vectors, leaves, upstream) for vectors in (fused, plain))
    assert_near([fused, *found], [plain, *expected], torch.float64)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    vocabulary=st.integers(1, 6),
    cells=st.lists(st.integers(-2, 2), min_size=80, max_size=80),
)
@lawful
def test_equal_tokens_give_the_gradient_to_the_one_that_autograd_chooses(
    path: str, lengths: list[int], vocabulary: int, cells: list[int]
) -> None:
    # Small whole numbers: many tokens tie, and ties are exact.
    numbers = torch.tensor(cells, dtype=torch.float64)
    hidden = numbers[: sum(lengths) * 2].reshape(-1, 2)
    embeddings = numbers[40 : 40 + vocabulary * 2].reshape(-1, 2)

    assert_equal_heads((hidden, embeddings, numbers[60 : 60 + vocabulary]), lengths)


@pytest.mark.parametrize("bias", [-1e3, 1e3], ids=["no-term-active", "every-term-active"])
def test_extreme_biases_equal_autograd(path: str, bias: float) -> None:
    lengths = [1, 4, 1, 7]
    hidden, embeddings, _ = draw(lengths, 5, 9)

    assert_equal_heads((hidden, embeddings, torch.full((9,), bias, dtype=torch.float64)), lengths)


def test_inactive_terms_have_no_weight_and_no_gradient(path: str) -> None:
    hidden, embeddings, _ = draw([3], 4, 6)

    vectors, *gradients = vectors_and_gradients(splade_max, (hidden, embeddings, torch.full((6,), -1e3).double()), [3])

    assert not vectors.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 2, 0]])
def test_texts_without_tokens_have_vectors_of_zeros_whatever_the_bias(path: str, lengths: list[int]) -> None:
    hidden, embeddings, _ = draw(lengths, 4, 6)

    vectors = splade_max(hidden, embeddings, torch.full((6,), 1e3).double(), lengths)

    assert [bool(vector.any()) for vector in vectors] == [length > 0 for length in lengths]


def test_no_texts_have_no_vectors(path: str) -> None:
    hidden, embeddings, bias = draw([], 4, 6)

    vectors, *gradients = vectors_and_gradients(splade_max, (hidden, embeddings, bias), [])

    assert vectors.shape == (0, 6)
    assert not any(gradient.any() for gradient in gradients)


def test_views_with_strides_equal_autograd(path: str) -> None:
    lengths = [2, 5, 3]
    hidden, embeddings, bias = draw(lengths, 6, 8)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    transposed = embeddings.T.contiguous().T

    assert_equal_heads((strided, transposed, torch.stack([bias, bias], dim=1)[:, 1]), lengths)


def test_texts_longer_than_a_block_and_many_blocks_equal_autograd() -> None:
    lengths = [600, 1, 511, 2, 512, 513, 40]

    assert_equal_heads(draw(lengths, 4, 4100), lengths)


def test_few_active_terms_equal_autograd() -> None:
    lengths = [100, 412, 37]
    hidden, embeddings, bias = draw(lengths, 4, 5000)

    assert_equal_heads((hidden, embeddings, bias - 18), lengths)


def test_hand_worked_numbers(path: str) -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, -1.0]])

    vectors = splade_max(hidden, torch.eye(2), torch.tensor([0.5, 0.0]), [2, 1])

    # Text 0: max(1, 0) + .5 and max(0, 2); text 1: 3 + .5 and -1, which relu takes away.
    torch.testing.assert_close(vectors.exp(), torch.tensor([[2.5, 3.0], [4.5, 1.0]]))


def test_two_runs_give_the_same_bits(path: str) -> None:
    lengths = [30, 1, 64, 17]
    hidden, embeddings, bias = (tensor.float() for tensor in draw(lengths, 48, 300))

    first, second = (vectors_and_gradients(splade_max, (hidden, embeddings, bias), lengths) for _ in range(2))

    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


def test_threads_change_no_vector_and_are_as_many_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [30, 1, 64, 17]
    inputs = [tensor.float() for tensor in draw(lengths, 48, 3000)]
    threads, found = torch.get_num_threads(), []
    monkeypatch.setattr(fused_head_module, "_WORTH_WORKERS", 0)

    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with torch.inference_mode():
                found.append(splade_max(*inputs, lengths))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)

    for vectors in found[1:]:
        torch.testing.assert_close(vectors, found[0], rtol=1e-6, atol=1e-6)


def test_vectors_are_the_same_with_and_without_gradients(path: str) -> None:
    lengths = [3, 8]
    inputs = [tensor.requires_grad_() for tensor in draw(lengths, 4, 9)]

    with torch.no_grad():
        without = splade_max(*inputs, lengths)

    assert not without.requires_grad
    assert torch.equal(without, splade_max(*inputs, lengths).detach())


@pytest.mark.parametrize("trained", [0, 1, 2], ids=["hidden", "embeddings", "bias"])
def test_one_trained_input_gets_the_gradient_it_gets_among_three(path: str, trained: int) -> None:
    lengths = [3, 8]
    inputs = draw(lengths, 4, 9)
    _, *expected = vectors_and_gradients(splade_max, inputs, lengths)
    inputs[trained].requires_grad_()

    vectors = splade_max(*inputs, lengths)
    (found,) = torch.autograd.grad(vectors, inputs[trained], torch.linspace(-1.0, 2.0, 18, dtype=torch.float64).view(2, 9))

    assert torch.equal(found, expected[trained])


def test_a_second_derivative_is_refused() -> None:
    hidden, embeddings, bias = draw([3], 4, 6)
    vectors = splade_max(hidden.requires_grad_(), embeddings, bias, [3])

    with pytest.raises(RuntimeError, match=r"no second derivative, .* set \[run\] fused_head = false"):
        torch.autograd.grad(vectors.sum(), hidden, create_graph=True)


def test_values_that_are_not_numbers_stay_visible(path: str) -> None:
    hidden, embeddings, bias = draw([3, 3, 3], 4, 6)
    hidden[4, 2] = torch.nan

    vectors = splade_max(hidden, embeddings, bias, [3, 3, 3])

    assert [bool(vector.isnan().all()) for vector in vectors] == [False, True, False]
    assert bool(vectors[[0, 2]].isfinite().all())


def test_autocast_is_within_bfloat16_of_the_eager_head_and_keeps_float32_gradients(path: str) -> None:
    lengths = [3, 17, 8]
    inputs = tuple(tensor.float() for tensor in draw(lengths, 16, 40))

    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = (vectors_and_gradients(head, inputs, lengths) for head in (splade_max, plain_max))

    assert [tensor.dtype for tensor in fused] == [torch.float32] * 4
    # Logits up to about 10 with 8 bits; a winner may change where two tokens come within that, so gradients are not compared.
    torch.testing.assert_close(fused[0], plain[0].float(), rtol=0.02, atol=0.02)


def test_weights_in_half_precision_give_vectors_and_gradients_in_it(path: str) -> None:
    lengths = [3, 17, 8]
    inputs = tuple(tensor.bfloat16() for tensor in draw(lengths, 16, 40))

    fused, plain = (vectors_and_gradients(head, inputs, lengths) for head in (splade_max, plain_max))

    assert [tensor.dtype for tensor in fused] == [torch.bfloat16] * 4
    torch.testing.assert_close(fused[0], plain[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("lengths", [[1, 1], [2, 2], [4, -1]])
def test_lengths_that_do_not_cover_the_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0 and add up to the 3 rows of hidden_TD"):
        splade_max(torch.ones(3, 2), torch.eye(2), torch.zeros(2), lengths)


@pytest.fixture(params=["tiny_masked_lm_folder", "tiny_headless_folder"])
def student(request: pytest.FixtureRequest, student_section: Callable[..., Student]) -> Any:
    folder: Path = request.getfixturevalue(request.param)
    return build_student(student_section(folder, dropout=0.0), folder)


def embed(model: Any, texts: list[str]) -> torch.Tensor:
    features = model.preprocess(texts)
    vectors: torch.Tensor = model(features)["sentence_embedding"]
    return vectors


def test_a_model_under_the_fused_head_gives_the_plain_vectors_and_gradients(student: Any, texts: list[str]) -> None:
    student.train()  # without dropout; in eval mode the library's pooling works in place and has no gradient
    plain = embed(student, texts)
    parameters = dict(student.named_parameters())
    expected = torch.autograd.grad(plain.square().sum(), list(parameters.values()), allow_unused=True)

    with fused_head(student):
        fused = embed(student, texts)
        found = torch.autograd.grad(fused.square().sum(), list(parameters.values()), allow_unused=True)

    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    # A key's bias has a gradient of 0, of which rounding leaves something: the largest gradient sets the scale.
    scale = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def test_padding_changes_no_vector(student: Any, texts: list[str]) -> None:
    with fused_head(student):
        together = embed(student, texts)
        alone = torch.cat([embed(student, [text]) for text in texts])

    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_state_and_saved_files_are_the_plain_ones_inside_and_after(student: Any, texts: list[str], tmp_path: Path) -> None:
    embed(student, texts)  # a tokenizer saves the padding it was last called with
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.save_pretrained(str(tmp_path / "before"), create_model_card=False)

    with fused_head(student):
        student.save_pretrained(str(tmp_path / "inside"), create_model_card=False)
        inside = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    assert list(inside) == list(before) == list(student.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in inside.items())
    for path in sorted(path for path in (tmp_path / "before").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "inside" / path.relative_to(tmp_path / "before")).read_bytes(), path.name
    assert load_file(tmp_path / "inside" / "model.safetensors")


@pytest.mark.parametrize("training", [True, False])
def test_forward_and_mode_are_as_before_also_after_an_exception(student: Any, texts: list[str], training: bool) -> None:
    student.eval()
    expected = embed(student, texts)
    student.train(training)

    def fail() -> None:
        with fused_head(student):
            raise KeyError("in the middle of a step")

    with pytest.raises(KeyError):
        fail()

    assert all("forward" not in vars(module) for module in student.modules())
    assert all(module.training is training for module in student.modules())
    assert torch.equal(embed(student.eval(), texts), expected)


def test_a_head_that_is_more_than_a_linear_layer_is_refused_and_left_as_it_was(student: Any, texts: list[str]) -> None:
    expected = embed(student, texts)
    decoder = decoder_of(student)
    handle = decoder.register_forward_hook(lambda module, given, logits: logits * 0.5 + 3.0)

    with pytest.raises(ValueError, match=r"differ by .* on a probe; set \[run\] fused_head = false"), fused_head(student):
        pytest.fail("the probe must not pass")

    handle.remove()
    assert torch.equal(embed(student, texts), expected)


def test_weights_that_are_not_finite_are_named_as_such(student: Any) -> None:
    with torch.no_grad():
        decoder_of(student).bias[3] = torch.nan

    with pytest.raises(ValueError, match="its weights hold NaN or infinity"), fused_head(student):
        pytest.fail("the probe must not pass")
