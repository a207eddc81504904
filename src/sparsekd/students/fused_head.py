"""The SPLADE head without its batch x length x vocabulary logits.

``max_t log1p(relu(h_t . E^T + b))`` is computed for a few texts at a time and the maximum is taken first: log1p and relu are
monotone, so they are applied once per (text, term). The backward pass visits only active (text, term) entries, each through the
one token that won the maximum. Exact up to float rounding; peak extra memory is one block of logits, not the batch's.

Shapes: T tokens of a batch without padding, B texts, D hidden width, V vocabulary, A active terms of one text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Tokens multiplied with the vocabulary at once: 256 x 30,522 logits are 31 MB; larger blocks leave the CPU's cache for no speed.
_BLOCK_TOKENS = 256


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ranges of texts whose tokens fit one block, at least one text each."""
    first, tokens = 0, 0
    for position, length in enumerate(lengths):
        if position > first and tokens + length > _BLOCK_TOKENS:
            yield first, position
            first, tokens = position, 0
        tokens += length
    if first < len(lengths):
        yield first, len(lengths)


class _MaxLogit(torch.autograd.Function):
    """max over each text's tokens of ``hidden . embeddings^T + bias``, with the gradient through the winning token only."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, embeddings_VD: Tensor, bias_V: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        maximum_BV = hidden_TD.new_empty(len(lengths), embeddings_VD.shape[0])
        offset = 0
        for first, last in _blocks(lengths):
            tokens = sum(lengths[first:last])
            logits = hidden_TD[offset : offset + tokens] @ embeddings_VD.T
            start = 0
            for text in range(first, last):
                torch.amax(logits[start : start + lengths[text]], dim=0, out=maximum_BV[text])
                start += lengths[text]
            offset += tokens
        maximum_BV += bias_V
        ctx.save_for_backward(hidden_TD, embeddings_VD)
        ctx.lengths = lengths
        return maximum_BV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad_BV,) = grads
        hidden_TD, embeddings_VD = ctx.saved_tensors
        grad_hidden_TD = torch.zeros_like(hidden_TD)
        grad_embeddings_VD = torch.zeros_like(embeddings_VD)
        offset = 0
        for text, length in enumerate(ctx.lengths):
            active = grad_BV[text].nonzero().squeeze(1)
            if active.numel():
                hidden = hidden_TD[offset : offset + length]
                rows_AD = embeddings_VD[active]
                winner_A = (hidden @ rows_AD.T).argmax(dim=0)
                grad_A = grad_BV[text, active]
                # index_add_ on rows is several times slower than both of these on CPU; a product with the one-hot
                # winners also keeps the order of additions, so the result is deterministic.
                winners_TA = hidden.new_zeros(length, active.numel())
                winners_TA[winner_A, torch.arange(active.numel(), device=active.device)] = grad_A
                torch.mm(winners_TA, rows_AD, out=grad_hidden_TD[offset : offset + length])
                update_AD = hidden[winner_A] * grad_A.unsqueeze(1)
                grad_embeddings_VD.index_put_((active,), update_AD, accumulate=True)
            offset += length
        return grad_hidden_TD, grad_embeddings_VD, grad_BV.sum(dim=0), None


def splade_max(hidden_TD: Tensor, embeddings_VD: Tensor, bias_V: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the SPLADE-max vectors [B, V] of texts whose tokens lie one after the other in ``hidden_TD``.

    ``lengths[i]`` counts text i's tokens, all > 0, summing to T. Formal et al. 2021 (arXiv 2109.10086), equation 2 with max
    pooling: w_v = max_t log(1 + relu(h_t . E_v + b_v)). ValueError if the lengths do not add up.

    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> splade_max(hidden, torch.eye(2), torch.zeros(2), [2]).exp()
    tensor([[2., 3.]])
    """
    if sum(lengths) != hidden_TD.shape[0] or min(lengths, default=1) < 1:
        raise ValueError(f"lengths {list(lengths)} must be positive and add up to the {hidden_TD.shape[0]} rows of hidden_TD")
    maximum_BV: Tensor = _MaxLogit.apply(hidden_TD, embeddings_VD, bias_V, tuple(lengths))  # type: ignore[no-untyped-call]
    return torch.log1p(torch.relu(maximum_BV))
