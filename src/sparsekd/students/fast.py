"""The fast forward pass of a student while a context lasts: a body without padding, SPLADE heads computed block by block.

State, parameters and saved files stay those of the plain sentence-transformers model. Any SparseEncoder: SPLADE, routers with
SPLADE routes, CSR (which has no such head). Models whose attention cannot run without padding keep it and say so in the log.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekd import packed_body
from sparsekd.students.fused_head import splade_max

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

_PROBE = ("a short text", "a second text that is somewhat longer than the first")


@contextlib.contextmanager
def fast_student(model: SparseEncoder, *, packed: bool, fused: bool) -> Iterator[None]:
    """Run the student's transformers without padding and its SPLADE heads block by block while the context lasts, each where asked.

    The body is checked by ``packed_body.packed``, the heads here, on two short texts. Raises ValueError if the vectors of these are
    not finite, if a head cannot be computed block by block (sum pooling, a second log1p, adapters on the output layer), or if
    vectors differ by more than 1e-4.
    """
    # Without such a head the body's own check is enough; an autoencoder's k-th and next largest may change places by rounding.
    parts = list(splade_parts(model)) if fused else []
    plain = _encode(model, _PROBE) if parts else []
    if not all(bool(torch.isfinite(vectors).all()) for vectors in plain):
        raise ValueError("the student's vectors of a probe are not finite: its weights hold NaN or infinity; take other weights")
    with packed_body.packed(model) if packed else contextlib.nullcontext(), _fused(model, parts):
        for vectors, expected in zip(_encode(model, _PROBE) if parts else [], plain, strict=True):
            difference = float((vectors - expected).abs().max())
            if not difference <= 1e-4:
                raise ValueError(
                    f"the fast and the plain forward pass of {type(parts[0][0].model).__name__} differ by {difference:.2g} "
                    "on a probe; set [run] fused_head = false"
                )
        yield


def fused_head(model: SparseEncoder) -> contextlib.AbstractContextManager[None]:
    """Compute the SPLADE heads block by block on padded texts while the context lasts."""
    return fast_student(model, packed=False, fused=True)


def decoder_of(model: SparseEncoder) -> nn.Linear:
    """Return the layer from hidden states to vocabulary logits, of the first SPLADE route; ValueError if there is none."""
    for transformer, _ in splade_parts(model):
        decoder: nn.Linear = transformer.model.get_output_embeddings()
        return decoder
    raise ValueError(f"the student {[type(module).__name__ for module in model]} has no SPLADE head")


def splade_parts(modules: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (Transformer, SpladePooling) of a model or of a sequence of modules, those of routes included."""
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    modules = list(modules)
    for first, second in itertools.pairwise([*modules, None]):
        if isinstance(first, Transformer) and isinstance(second, SpladePooling):
            yield first, second
        elif isinstance(first, Router):
            for route in first.sub_modules.values():
                yield from splade_parts(route)


@contextlib.contextmanager
def hidden_instead_of_logits(model: SparseEncoder) -> Iterator[None]:
    """Let each masked-LM return what would enter its output layer, whatever the architecture."""
    with contextlib.ExitStack() as stack:
        for transformer, _ in splade_parts(model):
            stack.enter_context(_forward(transformer.model.get_output_embeddings(), lambda input: input))
        yield


@contextlib.contextmanager
def _fused(model: SparseEncoder, parts: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    for transformer, pooling in parts:
        _refuse_other_heads(transformer, pooling)
    with hidden_instead_of_logits(model) if parts else contextlib.nullcontext(), contextlib.ExitStack() as stack:
        for transformer, pooling in parts:
            stack.enter_context(_forward(pooling, _pool(transformer.model.get_output_embeddings())))
        yield


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put ``forward`` in place of the module's own, or of what an outer context put there, which comes back after it."""
    outer = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


def _refuse_other_heads(transformer: Any, pooling: Any) -> None:
    decoder = transformer.model.get_output_embeddings()
    found = (pooling.pooling_strategy, pooling.activation_function)
    if found != ("max", "relu"):
        raise ValueError(f"the student pools by {found}; the fused head computes ('max', 'relu'); set [run] fused_head = false")
    if type(decoder) is not nn.Linear:  # adapters of it start at zero, so a probe would not show that they are passed over
        raise ValueError(
            f"the student's output layer is a {type(decoder).__name__}; the fused head takes a plain Linear; "
            "leave it out of the adapters or set [run] fused_head = false"
        )


def _pool(decoder: nn.Linear) -> Any:
    def forward(features: dict[str, Any]) -> dict[str, Any]:
        if "cu_seq_lens_q" in features:
            hidden_TD, lengths = features["token_embeddings"][0], features["cu_seq_lens_q"].diff().tolist()
        else:
            mask = features["attention_mask"].bool()
            hidden_TD, lengths = features["token_embeddings"][mask], mask.sum(dim=1).tolist()
        features["sentence_embedding"] = splade_max(hidden_TD, decoder.weight, decoder.bias, lengths)
        return features

    return forward


def _encode(model: SparseEncoder, texts: Sequence[str]) -> list[Tensor]:
    """Return the vectors of ``texts`` by each route; one, if the model has no router."""
    from sentence_transformers.base.modules import Router

    router = model[0] if isinstance(model[0], Router) else None
    tasks: list[dict[str, Any]] = [{"task": route} for route in router.sub_modules] if router is not None else [{}]
    vectors = []
    with packed_body.evaluating(model), torch.no_grad():  # no inference tensors: a model may keep some
        for task in tasks:
            features = {name: to_device(value, model.device) for name, value in model.preprocess(list(texts), **task).items()}
            vectors.append(model(features, **task)["sentence_embedding"])
    return vectors


def to_device(value: Any, device: torch.device) -> Any:
    """Return a tensor on ``device``, anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value
