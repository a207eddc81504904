"""Where a SPLADE student starts: an output bias that makes no term active everywhere, and so many terms active on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.students.fast import decoder_of, hidden_instead_of_logits, to_device
from sparsekd.students.routes import splade_route

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder


def calibrate_bias(model: SparseEncoder, passages: Sequence[str], active_dims: int, *, batch_size: int = 16) -> float:
    """Set the output bias so that ``passages`` have ``active_dims`` active terms on average; return its mean.

    First each term's mean maximum logit over the passages is brought to the mean of all terms: some word embeddings lie near every
    hidden state, and would be active in every text. Then one shift for all: minus the maximum logit that ranks
    ``len(passages) * active_dims``-th over all (passage, term). The passages get the prompt of the side that passes through the
    transformer.
    """
    side, transformer, _ = splade_route(model)
    decoder = decoder_of(model)
    if active_dims >= decoder.out_features:
        raise ValueError(f"[student] initial_active_dims = {active_dims}: the vocabulary has {decoder.out_features}; lower it")
    prompt = model.prompts.get(side) or None
    with torch.inference_mode(), hidden_instead_of_logits(model):
        rows = []
        for start in range(0, len(passages), batch_size):
            features = transformer.preprocess(list(passages[start : start + batch_size]), prompt=prompt)
            features = transformer({name: to_device(value, model.device) for name, value in features.items()})
            rows.append(_max_logits(features, decoder).cpu())
    logits_BV = torch.cat(rows)
    mean_V = logits_BV.mean(dim=0)
    centring_V = mean_V.mean() - mean_V
    logits_BV += centring_V
    kept = len(passages) * active_dims
    bias = -float(torch.topk(logits_BV.flatten(), kept + 1).values[-1])
    with torch.no_grad():
        decoder.bias.add_(centring_V.to(decoder.bias.device) + bias)
    return bias


def _max_logits(features: dict[str, Any], decoder: torch.nn.Linear) -> torch.Tensor:
    mask = features["attention_mask"].bool()
    rows = [(hidden[keep] @ decoder.weight.T).amax(dim=0) for hidden, keep in zip(features["token_embeddings"], mask, strict=True)]
    return torch.stack(rows)
