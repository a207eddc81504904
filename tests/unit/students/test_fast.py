"""The fast forward pass against the plain one, for every kind of SparseEncoder; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekd.recipe import Student
from sparsekd.students.building import build_student
from sparsekd.students.fast import decoder_of, fast_student, splade_parts

Section = Callable[..., Student]
PATHS = [(True, True), (True, False), (False, True)]


@pytest.fixture
def splade(tiny_masked_lm_folder: Path, student_section: Section) -> Any:
    return build_student(student_section(tiny_masked_lm_folder, dropout=0.0), tiny_masked_lm_folder).train()


@pytest.fixture
def router(splade: Any) -> Any:
    """A static table for queries, SPLADE for passages."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    routes = Router.for_query_document(
        [SparseStaticEmbedding(splade.tokenizer)], [splade[0], splade[1]], default_route=None, allow_empty_key=False
    )
    return SparseEncoder(modules=[routes], device="cpu").train()


@pytest.fixture
def csr(tiny_headless_folder: Path) -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, Transformer

    torch.manual_seed(0)
    body = Transformer(str(tiny_headless_folder))
    modules = [body, Pooling(32, "mean"), SparseAutoEncoder(32, hidden_dim=64, k=8, k_aux=8)]
    return SparseEncoder(modules=modules, device="cpu").eval()


def step(model: Any, texts: list[str], task: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return vectors and each parameter's gradient of a fixed weighted sum of them."""
    model.zero_grad(set_to_none=True)
    route = {} if task is None else {"task": task}
    vectors = model(model.preprocess(texts, **route), **route)["sentence_embedding"]
    (vectors * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return vectors.detach(), {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    # Of the largest gradient of all: that of a key's bias is zero but for rounding.
    tolerance = 1e-5 * max(1.0, *(float(gradient.abs().max()) for gradient in expected[1].values()))
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.parametrize(("packed", "fused"), PATHS)
def test_splade_vectors_and_gradients_are_the_plain_ones(splade: Any, texts: list[str], packed: bool, fused: bool) -> None:
    expected = step(splade, texts)

    with fast_student(splade, packed=packed, fused=fused):
        found = step(splade, texts)
        is_packed = "cu_seq_lens_q" in splade.preprocess(texts)

    assert_equal(found, expected)
    assert is_packed == packed


@pytest.mark.parametrize(("packed", "fused"), PATHS)
@pytest.mark.parametrize("task", ["query", "document"])
def test_each_route_of_a_router_gives_its_plain_vectors(
    router: Any, texts: list[str], packed: bool, fused: bool, task: str
) -> None:
    expected = step(router, texts, task)

    with fast_student(router, packed=packed, fused=fused):
        found = step(router, texts, task)

    assert_equal(found, expected)


def test_two_routes_of_one_transformer_are_both_fast(splade: Any, texts: list[str]) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    second = SpladePooling("max", embedding_dimension=splade[1].embedding_dimension)
    model = SparseEncoder(modules=[Router.for_query_document([splade[0], splade[1]], [splade[0], second])], device="cpu").train()
    expected = {task: step(model, texts, task) for task in ("query", "document")}

    with fast_student(model, packed=True, fused=True):
        for task, plain in expected.items():
            assert_equal(step(model, texts, task), plain)

    assert len(list(splade_parts(model))) == 2
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_csr_student_runs_without_padding_and_has_no_head_to_fuse(csr: Any, texts: list[str]) -> None:
    expected = csr.encode_document(texts, convert_to_sparse_tensor=False)

    with fast_student(csr, packed=True, fused=True):
        found = csr.encode_document(texts, convert_to_sparse_tensor=False)
        assert "cu_seq_lens_q" in csr.preprocess(texts)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has no SPLADE head"):
        decoder_of(csr)


def test_cached_loss_has_the_plain_losss_gradients(splade: Any, texts: list[str]) -> None:
    from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SparseMarginMSELoss, SpladeLoss

    columns, labels = [texts, texts[::-1], [*texts[2:], *texts[:2]]], torch.linspace(-3, 3, len(texts))
    settings = {"document_regularizer_weight": 0.1, "query_regularizer_weight": 0.1}
    gradients = []
    for loss, fast in (
        (SpladeLoss(splade, SparseMarginMSELoss(splade), **settings), False),
        (CachedSpladeLoss(splade, SparseMarginMSELoss(splade), mini_batch_size=2, **settings), True),
    ):
        splade.zero_grad(set_to_none=True)
        with fast_student(splade, packed=fast, fused=fast):
            sum(loss([splade.preprocess(column) for column in columns], labels).values()).backward()
        gradients.append({name: value.grad.clone() for name, value in splade.named_parameters() if value.grad is not None})

    assert_equal((labels, gradients[1]), (labels, gradients[0]))


def test_gradient_checkpointing_gives_the_plain_gradients(splade: Any, texts: list[str]) -> None:
    expected = step(splade, texts)
    splade[0].model.activation_checkpointing_enable({"use_reentrant": False})

    with fast_student(splade, packed=True, fused=True):
        found = step(splade, texts)

    assert_equal(found, expected)


def test_the_student_is_as_before_after_the_context(splade: Any, texts: list[str]) -> None:
    expected = step(splade, texts)
    splade[0].eval()  # one part alone

    with pytest.raises(RuntimeError, match="stop"), fast_student(splade, packed=True, fused=True):
        raise RuntimeError("stop")

    assert splade.training
    assert not any(module.training for module in splade[0].modules())
    assert not [module for module in splade.modules() if "forward" in vars(module)]
    splade.train()
    assert_equal(step(splade, texts), expected)


def test_an_inner_context_leaves_the_outer_one_fast(splade: Any, texts: list[str]) -> None:
    with fast_student(splade, packed=True, fused=True):
        forwards = [vars(module).get("forward") for module in splade.modules()]

        with fast_student(splade, packed=True, fused=True):
            inner = step(splade, texts)

        assert [vars(module).get("forward") for module in splade.modules()] == forwards
        assert splade[0].can_flatten_inputs
        assert_equal(step(splade, texts), inner)

    assert not [module for module in splade.modules() if "forward" in vars(module)]


def test_a_student_saved_inside_the_context_is_plain(splade: Any, texts: list[str], tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder

    with fast_student(splade, packed=True, fused=True):
        splade.save_pretrained(str(tmp_path), create_model_card=False)

    again = SparseEncoder(str(tmp_path), device="cpu").train()
    assert_equal(step(again, texts), step(splade, texts))


def test_other_poolings_are_refused(splade: Any) -> None:
    splade[1].pooling_strategy = "sum"

    with pytest.raises(ValueError, match=r"pools by \('sum', 'relu'\); .* set \[run\] fused_head = false"):
        fast_student(splade, packed=True, fused=True).__enter__()


def test_an_output_layer_with_more_than_a_product_is_refused(splade: Any) -> None:
    class Adapted(torch.nn.Linear):
        """As adapters' layers are: more than weight and bias."""

    decoder = decoder_of(splade)
    adapted = Adapted(decoder.in_features, decoder.out_features)
    adapted.weight = decoder.weight
    splade[0].model.set_output_embeddings(adapted)

    with pytest.raises(ValueError, match="output layer is a Adapted; the fused head takes a plain Linear"):
        fast_student(splade, packed=False, fused=True).__enter__()
