"""What is computed again instead of kept: less is kept, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekd.recipe import Student
from sparsekd.students import recomputation
from sparsekd.students.building import build_student
from sparsekd.students.fast import fast_student
from sparsekd.students.recomputation import recomputed
from sparsekd.training.memory import _CountingAllocations


@pytest.fixture(params=["padded", "packed"])
def student(request: pytest.FixtureRequest, tiny_headless_folder: Path, student_section: Callable[..., Student]) -> Any:
    model = build_student(student_section(tiny_headless_folder, dropout=0.1), tiny_headless_folder).train()
    with fast_student(model, packed=request.param == "packed", fused=True):
        yield model


def gradients(model: Any, texts: list[str]) -> dict[str, Tensor]:
    torch.manual_seed(3)  # of dropout
    model.zero_grad(set_to_none=True)
    vectors = model(model.preprocess(texts))["sentence_embedding"]
    (vectors * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def kept_bytes(model: Any, texts: list[str]) -> int:
    """Bytes of all tensors that a forward pass makes and that live on after it: its vectors, and what its graph keeps."""
    with _CountingAllocations() as counting:
        vectors = model(model.preprocess(texts))["sentence_embedding"]
    assert vectors.requires_grad
    return counting.living


def test_gradients_are_the_same_to_the_bit(student: Any, texts: list[str]) -> None:
    expected = gradients(student, texts)

    with recomputed(student):
        found = gradients(student, texts)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_gelu_and_layer_norm_give_is_not_kept(student: Any, texts: list[str]) -> None:
    whole = kept_bytes(student, texts)
    width, wide, layers = 32, student[0].model.config.intermediate_size, 2
    tokens = int(student[0].tokenizer(texts, padding=True, return_tensors="pt")["attention_mask"].sum())

    with recomputed(student):
        fewer = kept_bytes(student, texts)

    # Of each layer: the GELU's output, and the LayerNorm's before the feed-forward at least; padding only adds to it.
    assert whole - fewer >= 4 * tokens * layers * (wide + width)


def test_what_several_layers_want_is_computed_once(student: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(self: Any) -> Tensor:
        calls.append(self.node.name())
        return computed(self)

    computed = recomputation._Output._computed
    monkeypatch.setattr(recomputation._Output, "_computed", counted)

    with recomputed(student):
        gradients(student, texts)

    # One LayerNorm's output for query, key and value together, one for the feed-forward layer; two more around the layers.
    layers = 2
    assert calls.count("NativeLayerNormBackward0") <= 2 * layers + 2
    assert layers <= calls.count("GeluBackward0") <= layers + 1


def test_a_second_backward_pass_has_them_again(student: Any, texts: list[str]) -> None:
    with recomputed(student):
        torch.manual_seed(3)
        loss = student(student.preprocess(texts))["sentence_embedding"].sum()
        parameters = [value for value in student.parameters() if value.requires_grad]
        first, second = (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2)
        )

    for ours, again in zip(first, second, strict=True):
        assert (ours is None) == (again is None)
        assert ours is None or torch.equal(ours, again)
    assert sum(ours is not None for ours in first) > 10


def test_after_the_context_everything_is_kept_again(student: Any, texts: list[str]) -> None:
    kept_bytes(student, texts)  # what is made once
    before = kept_bytes(student, texts)

    with recomputed(student):
        pass

    assert kept_bytes(student, texts) == pytest.approx(before, rel=0.01)  # dropout changes how many terms are active
