"""The fused head against autograd through the whole T x V logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparsekd.recipe import Student
from sparsekd.students.fused_head import splade_max
from sparsekd.students.splade import build_student, decoder_of, fused_head

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plain_max(hidden: torch.Tensor, embeddings: torch.Tensor, bias: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """All logits, log1p and relu on each, then the maximum: SPLADE-max as the papers write it."""
    weights = torch.log1p(torch.relu(hidden @ embeddings.T + bias))
    return torch.stack([part.max(dim=0).values for part in weights.split(list(lengths))])


def vectors_and_gradients(head: Callable[..., torch.Tensor], inputs: Inputs, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Vectors, then the gradients of hidden, embeddings and bias for an upstream gradient that differs everywhere."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    vectors = head(*leaves, lengths)
    upstream = torch.linspace(-1.0, 2.0, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    return [vectors.detach(), *torch.autograd.grad(vectors, leaves, upstream)]


def draw(lengths: Sequence[int], width: int, vocabulary: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(lengths), width), (vocabulary, width), (vocabulary,))
    hidden, embeddings, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden, embeddings, bias


def assert_equal_heads(inputs: Inputs, lengths: Sequence[int]) -> None:
    fused = vectors_and_gradients(splade_max, inputs, lengths)
    plain = vectors_and_gradients(plain_max, inputs, lengths)
    for name, ours, theirs in zip(("vectors", "hidden", "embeddings", "bias"), fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_vectors_and_gradients_equal_autograd(lengths: list[int], width: int, vocabulary: int, seed: int) -> None:
    assert_equal_heads(draw(lengths, width, vocabulary, seed), lengths)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    vocabulary=st.integers(1, 6),
    cells=st.lists(st.integers(-2, 2), min_size=80, max_size=80),
)
@settings(max_examples=60, deadline=None)
def test_equal_tokens_give_the_gradient_to_the_one_that_autograd_chooses(
    lengths: list[int], vocabulary: int, cells: list[int]
) -> None:
    # Small whole numbers: many tokens tie, and ties are exact.
    numbers = torch.tensor(cells, dtype=torch.float64)
    hidden = numbers[: sum(lengths) * 2].reshape(-1, 2)
    embeddings = numbers[40 : 40 + vocabulary * 2].reshape(-1, 2)

    assert_equal_heads((hidden, embeddings, numbers[60 : 60 + vocabulary]), lengths)


@pytest.mark.parametrize("bias", [-1e3, 1e3], ids=["no-term-active", "every-term-active"])
def test_extreme_biases_equal_autograd(bias: float) -> None:
    lengths = [1, 4, 1, 7]
    hidden, embeddings, _ = draw(lengths, 5, 9)

    assert_equal_heads((hidden, embeddings, torch.full((9,), bias, dtype=torch.float64)), lengths)


def test_inactive_terms_have_no_weight_and_no_gradient() -> None:
    hidden, embeddings, _ = draw([3], 4, 6)

    vectors, *gradients = vectors_and_gradients(splade_max, (hidden, embeddings, torch.full((6,), -1e3).double()), [3])

    assert not vectors.any()
    assert not any(gradient.any() for gradient in gradients)


def test_views_with_strides_equal_autograd() -> None:
    lengths = [2, 5, 3]
    hidden, embeddings, bias = draw(lengths, 6, 8)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    transposed = embeddings.T.contiguous().T

    assert_equal_heads((strided, transposed, torch.stack([bias, bias], dim=1)[:, 1]), lengths)


def test_texts_longer_than_a_block_and_many_blocks_equal_autograd() -> None:
    lengths = [300, 1, 255, 2, 256, 257, 40]

    assert_equal_heads(draw(lengths, 4, 13), lengths)


def test_hand_worked_numbers() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, -1.0]])

    vectors = splade_max(hidden, torch.eye(2), torch.tensor([0.5, 0.0]), [2, 1])

    # Text 0: max(1, 0) + .5 and max(0, 2); text 1: 3 + .5 and -1, which relu takes away.
    torch.testing.assert_close(vectors.exp(), torch.tensor([[2.5, 3.0], [4.5, 1.0]]))


@pytest.mark.parametrize("lengths", [[1, 1], [2, 2], [3, 0], [4, -1]])
def test_lengths_that_do_not_cover_the_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must be positive and add up to the 3 rows of hidden_TD"):
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
