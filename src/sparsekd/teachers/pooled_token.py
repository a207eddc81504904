"""Sequence classifiers that pool the first token, without padding and without what no score depends on.

All layers but the last run as the model's own code does, on one row of all tokens (``packed_body``) or on texts of one length. Of
the last layer only the first token of each text is needed: keys and values are computed for every token, the query, the output and
the feed-forward for that one, in layers built like BERT's (RoBERTa's, XLM-R's, ELECTRA's, CamemBERT's) or DistilBERT's; other
architectures compute the whole layer. The head is the model's own and finds the pooled token where it looks for it, at position 0.

Shapes: T tokens of all texts, B texts, L tokens of each or of the longest, H heads, D width of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsekd.packed_body import ATTENTION, evaluating, packable
from sparsekd.packed_body import register as register_attention

UNMASKED = "sparsekd_unmasked"
"""Name of the attention function for texts of one length."""
_PROBE_LENGTHS = (9, 4, 4, 1)


def pack(transformer: Any) -> str | None:
    """Make a sentence-transformers Transformer's classifier take packed batches (``packed_logits``) for good.

    Returns None, or why it stays padded and as it was: its structure, or outputs that differ from the padded model's on a probe.
    """
    model = transformer.model
    reason = packable(model) or _why_not_first(model)
    if reason is not None:
        return reason
    register_attention()
    offset, layer, implementation = position_offset(transformer), _layers(model)[-1], model.config._attn_implementation
    texts = _probe_texts(model)
    with evaluating(model), torch.inference_mode():
        plain = torch.cat([model(input_ids=text.unsqueeze(0)).logits for text in texts]).float()
        shorten_last_layer(model)
        model.config._attn_implementation = ATTENTION
        found = packed_logits(model, torch.cat(texts), None, [len(text) for text in texts], offset).float()
    difference, share = float((plain - found).nan_to_num().abs().max()), 1e-4 if model.dtype == torch.float32 else 0.1
    if difference <= share * max(1.0, float(plain.nan_to_num().abs().max())):
        return None
    del layer.forward  # the class's own again
    model.config._attn_implementation = implementation
    return f"{type(model).__name__}: its logits without padding differ by {difference:.2g} on a probe"


def packed_logits(model: nn.Module, ids_T: Tensor, types_T: Tensor | None, lengths: list[int], offset: int) -> Tensor:
    """Return the logits [B, labels] of texts that lie one after the other in ``ids_T``, on the model's device."""
    device = ids_T.device
    cu_seq_lens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    starts_T = torch.repeat_interleave(cu_seq_lens[:-1].long(), torch.tensor(lengths), output_size=len(ids_T))
    positions_T = torch.arange(offset, offset + len(ids_T)) - starts_T
    cu_seq_lens = cu_seq_lens.to(device, non_blocking=True)
    features: dict[str, Any] = {
        "input_ids": ids_T.unsqueeze(0),
        "position_ids": positions_T.to(device, non_blocking=True).unsqueeze(0),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    if types_T is not None:
        features["token_type_ids"] = types_T.unsqueeze(0)
    logits: Tensor = model(**features).logits
    return logits


def shorten_last_layer(model: nn.Module) -> bool:
    """Replace the last layer's forward by one that gives each text's first token only, [B, 1, width]; tell whether it computes
    no more than that.
    """
    layer: Any = _layers(model)[-1]
    parts = _bert_parts(layer) or _distilbert_parts(layer)
    whole = layer.forward

    def first_of_whole(*arguments: Any, **keywords: Any) -> Any:
        output = whole(*arguments, **keywords)
        hidden = _first(output[0] if isinstance(output, tuple) else output, keywords.get("cu_seq_lens_q"))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layer.forward = first_of_whole if parts is None else _shortened(*parts)
    return parts is not None


def position_offset(transformer: Any) -> int:
    """Return the position id of a text's first token: RoBERTa's kind counts from the one after padding's."""
    return int(transformer._infer_flatten_position_offset())


def _shortened(attention: Any, project: tuple[Any, Any, Any], num_heads: int, finish: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return a layer's forward from its projections and what it does after attention, given (context, input) of a token."""
    query, key, value = project

    def forward(hidden: Tensor, *_: Any, cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, **__: Any) -> Tensor:
        first_B1W = _first(hidden, cu_seq_lens_q)
        query_B1HD, key_SHD, value_SHD = (
            states.unflatten(-1, (num_heads, -1)) for states in (query(first_B1W), key(hidden), value(hidden))
        )
        if cu_seq_lens_q is None:
            context = scaled_dot_product_attention(
                query_B1HD.transpose(1, 2), key_SHD.transpose(1, 2), value_SHD.transpose(1, 2), scale=attention.scaling
            ).transpose(1, 2)
        else:
            context = _attend_first(query_B1HD, key_SHD[0], value_SHD[0], cu_seq_lens_q, max_length_q, attention.scaling)
        return finish(context.flatten(2), first_B1W)

    return forward


def _first(hidden: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    """Return the first token of each text, [B, 1, width], of one packed row [1, T, width] or of texts of one length."""
    return hidden[:, :1] if cu_seq_lens is None else hidden[0].index_select(0, cu_seq_lens[:-1]).unsqueeze(1)


def _attend_first(
    query_B1HD: Tensor, key_THD: Tensor, value_THD: Tensor, cu_seq_lens: Tensor, longest: int, scaling: float
) -> Tensor:
    """Attend from each text's first token to all of its tokens; returns [B, 1, H, D]."""
    query = query_B1HD.transpose(1, 2)
    if query.device.type == "cpu":
        return _attend_runs(query, key_THD, value_THD, cu_seq_lens.diff().tolist(), scaling).transpose(1, 2)
    return _attend_padded(query, key_THD, value_THD, cu_seq_lens, longest, scaling).transpose(1, 2)


def _attend_runs(query: Tensor, key_THD: Tensor, value_THD: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """No padding: one call per run of texts of one length, on views."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    texts, tokens = [count for _, count in runs], [length * count for length, count in runs]
    parts = (torch.split(query, texts), torch.split(key_THD, tokens), torch.split(value_THD, tokens))
    outputs = []
    for (length, count), own, *others in zip(runs, *parts, strict=True):
        keys, values = (torch.unflatten(other, 0, (count, length)).transpose(1, 2) for other in others)
        outputs.append(scaled_dot_product_attention(own, keys, values, scale=scaling))
    return torch.cat(outputs)


def _attend_padded(query: Tensor, key_THD: Tensor, value_THD: Tensor, cu_seq_lens: Tensor, longest: int, scaling: float) -> Tensor:
    """Keys and values padded, without a wait for the device: with one query per text that is a copy and little else."""
    num_texts, num_tokens, device = len(query), len(key_THD), query.device
    length_B, starts_B = cu_seq_lens.diff().long(), cu_seq_lens[:-1].long()
    text_T = torch.repeat_interleave(torch.arange(num_texts, device=device), length_B, output_size=num_tokens)
    place_T = torch.arange(num_tokens, device=device) - starts_B[text_T]

    def padded(states: Tensor) -> Tensor:
        blank = states.new_zeros(num_texts, longest, *states.shape[1:])
        return blank.index_put((text_T, place_T), states).transpose(1, 2)

    mask = (torch.arange(longest, device=device) < length_B.unsqueeze(1))[:, None, None]
    return scaled_dot_product_attention(query, padded(key_THD), padded(value_THD), attn_mask=mask, scale=scaling)


def _bert_parts(layer: Any) -> tuple[Any, ...] | None:
    own: Any = getattr(getattr(layer, "attention", None), "self", None)
    if not all(hasattr(own, name) for name in ("query", "key", "value", "num_attention_heads", "scaling")):
        return None
    if not all(hasattr(layer, name) for name in ("intermediate", "output")) or not hasattr(layer.attention, "output"):
        return None

    def finish(context: Tensor, first: Tensor) -> Tensor:
        attended = layer.attention.output(context, first)
        states: Tensor = layer.output(layer.intermediate(attended), attended)
        return states

    return own, (own.query, own.key, own.value), own.num_attention_heads, finish


def _distilbert_parts(layer: Any) -> tuple[Any, ...] | None:
    own: Any = getattr(layer, "attention", None)
    if not all(hasattr(own, name) for name in ("q_lin", "k_lin", "v_lin", "out_lin", "n_heads", "scaling")):
        return None

    def finish(context: Tensor, first: Tensor) -> Tensor:
        attended = layer.sa_layer_norm(own.out_lin(context) + first)
        states: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
        return states

    return own, (own.q_lin, own.k_lin, own.v_lin), own.n_heads, finish


def _layers(model: Any) -> nn.ModuleList:
    """Return the list of the model's layers, empty if there is none of the length its configuration says."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return next((module for module in lists if len(module) == model.config.num_hidden_layers), nn.ModuleList())


def _why_not_first(model: Any) -> str | None:
    if not len(_layers(model)):
        return f"{type(model).__name__}: no list of {model.config.num_hidden_layers} layers in it"
    if getattr(model.config, "classifier_pooling", "cls") != "cls":
        return f"{type(model).__name__}: its head pools the {model.config.classifier_pooling} of all tokens, not the first"
    return None


def _probe_texts(model: Any) -> list[Tensor]:
    """Return ids of a few short texts, drawn from a fixed seed and without padding's."""
    generator = torch.Generator().manual_seed(0)
    padding = model.config.pad_token_id or 0
    highest = int(model.config.vocab_size)
    texts = [torch.randint(0, highest, (length,), generator=generator) for length in _PROBE_LENGTHS]
    return [text.where(text != padding, (text + 1) % highest).to(model.device) for text in texts]


def attend_unmasked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over all tokens of texts of one length, [B, H, L, D], without a mask; the result is [B, L, H, D]."""
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=is_grouped).transpose(1, 2), None
