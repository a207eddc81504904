"""The SPLADE head without its batch x length x vocabulary logits.

``max_t log1p(relu(h_t . E^T + b))`` is computed for a few texts at a time and the maximum is taken first: log1p and relu are
monotone, so they are applied once per (text, term). The backward pass visits only active (text, term) entries, each through the
one token that won the maximum. Exact up to float rounding; peak extra memory is one block of logits, not the batch's.

A CPU goes text by text, which keeps a block in its cache, and finds the winners of active terms again in the backward pass. A
CUDA device would wait for each of those small steps: it takes padded blocks of texts at once and keeps the winners.

Shapes: T tokens of a batch without padding, B texts, D hidden width, V vocabulary, A active terms of one text or of all,
C texts of one block, L tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Tokens multiplied with the vocabulary at once: 256 x 30,522 logits are 31 MB. By size, not tuned.
_BLOCK_TOKENS = 256
# 250 MB of float32 logits: a matrix product that fills a large GPU. By size, not measured.
_BATCHED_BLOCK_TOKENS = 2048


class _MaxLogit(torch.autograd.Function):
    """max over each text's tokens of ``hidden . embeddings^T + bias``, with the gradient through the winning token only.

    Logits are multiplied in ``dtype``, gradients in the dtype of the maximum; both are the inputs' own except under autocast,
    which must not reach in here: it would change the dtype of some products and not of the buffers they are written to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embeddings_VD: Tensor,
        bias_V: Tensor,
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        batched: bool,
    ) -> Tensor:
        ctx.lengths, ctx.dtype, ctx.batched = lengths, dtype, batched
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden, embeddings = hidden_TD.to(dtype), embeddings_VD.to(dtype)
            maximum_BV = hidden.new_empty(len(lengths), len(embeddings), dtype=torch.promote_types(dtype, bias_V.dtype))
            if batched:
                ctx.save_for_backward(hidden_TD, embeddings_VD, _write_maxima_batched(maximum_BV, hidden, embeddings, lengths))
            else:
                ctx.save_for_backward(hidden_TD, embeddings_VD)
                _write_maxima(maximum_BV, hidden, embeddings, lengths)
            maximum_BV += bias_V
        return maximum_BV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (grad_BV,) = grads
        hidden_TD, embeddings_VD, *winners = ctx.saved_tensors
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden, embeddings = hidden_TD.to(grad_BV.dtype), embeddings_VD.to(grad_BV.dtype)
            if ctx.batched:
                grad_hidden_TD, grad_embeddings_VD = _gradients_batched(grad_BV, hidden, embeddings, *winners)
            else:
                grad_hidden_TD, grad_embeddings_VD = _gradients(grad_BV, hidden, embeddings, ctx.lengths, ctx.dtype)
            grad_bias_V = grad_BV.sum(dim=0)
        return grad_hidden_TD.to(hidden_TD.dtype), grad_embeddings_VD.to(embeddings_VD.dtype), grad_bias_V, None, None, None


def _write_maxima(maximum_BV: Tensor, hidden_TD: Tensor, embeddings_VD: Tensor, lengths: Sequence[int]) -> None:
    offset = 0
    for first, last in _blocks(lengths):
        tokens = sum(lengths[first:last])
        logits = hidden_TD[offset : offset + tokens] @ embeddings_VD.T
        start = 0
        for text in range(first, last):
            maximum_BV[text] = torch.amax(logits[start : start + lengths[text]], dim=0)
            start += lengths[text]
        offset += tokens


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


def _gradients(
    grad_BV: Tensor, hidden_TD: Tensor, embeddings_VD: Tensor, lengths: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad_hidden_TD = torch.zeros_like(hidden_TD)
    grad_embeddings_VD = torch.zeros_like(embeddings_VD)
    offset = 0
    for text, length in enumerate(lengths):
        hidden, grad_V = hidden_TD[offset : offset + length], grad_BV[text]
        active = grad_V.nonzero().squeeze(1)
        # Above 3/4, copying the active rows costs more than multiplying all of them where they lie: 3.2 times at 16 tokens and
        # 1.4 at 100 with every term active, but 0.8 at 128 tokens with 60 % active. The 3/4 lies between, not measured itself.
        if 4 * active.numel() > 3 * len(grad_V):
            winners_TV, _ = _one_hot_winners(grad_V, hidden, embeddings_VD, dtype)
            torch.mm(winners_TV, embeddings_VD, out=grad_hidden_TD[offset : offset + length])
            grad_embeddings_VD.addmm_(winners_TV.T, hidden)
        elif active.numel():
            rows_AD = embeddings_VD[active]
            grad_A = grad_V[active]
            winners_TA, winner_A = _one_hot_winners(grad_A, hidden, rows_AD, dtype)
            # index_add_ on rows is several times slower than both of these on CPU; a product with the one-hot
            # winners also keeps the order of additions, so the result is deterministic.
            torch.mm(winners_TA, rows_AD, out=grad_hidden_TD[offset : offset + length])
            grad_embeddings_VD.index_put_((active,), hidden[winner_A] * grad_A.unsqueeze(1), accumulate=True)
        offset += length
    return grad_hidden_TD, grad_embeddings_VD


def _one_hot_winners(grad_A: Tensor, hidden: Tensor, rows_AD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return one text's gradients [tokens, A], each at the token that won its term and zero elsewhere, and those tokens [A]."""
    winner_A = (hidden.to(dtype) @ rows_AD.to(dtype).T).argmax(dim=0)
    winners_TA = hidden.new_zeros(len(hidden), len(rows_AD))
    return winners_TA.scatter_(0, winner_A.unsqueeze(0), grad_A.unsqueeze(0)), winner_A


def _write_maxima_batched(maximum_BV: Tensor, hidden_TD: Tensor, embeddings_VD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Write the maxima and return the row of ``hidden_TD`` that won each, int32 [B, V]."""
    winner_BV = maximum_BV.new_empty(maximum_BV.shape, dtype=torch.int32)
    first_token = 0
    for first, last in _padded_blocks(lengths):
        length_C = torch.tensor(lengths[first:last])
        start_C = first_token + length_C.cumsum(0) - length_C
        # A text shorter than its block's longest repeats its last token: that changes no maximum and needs no mask.
        place_CL = torch.minimum(torch.arange(int(length_C.max())), length_C.unsqueeze(1) - 1)
        row_CL = (start_C.unsqueeze(1) + place_CL).to(hidden_TD.device)
        maximum_BV[first:last], place_CV = (hidden_TD[row_CL] @ embeddings_VD.T).max(dim=1)
        winner_BV[first:last] = row_CL.gather(1, place_CV)
        first_token += int(length_C.sum())
    return winner_BV


def _padded_blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ranges of texts whose tokens fit one block when padded to its longest, at least one text each."""
    first, longest = 0, 0
    for position, length in enumerate(lengths):
        longest = max(longest, length)
        if position > first and longest * (position + 1 - first) > _BATCHED_BLOCK_TOKENS:
            yield first, position
            first, longest = position, length
    if first < len(lengths):
        yield first, len(lengths)


def _gradients_batched(
    grad_BV: Tensor, hidden_TD: Tensor, embeddings_VD: Tensor, winner_BV: Tensor
) -> tuple[Tensor, Tensor]:
    """Two products with the sparse [T, V] matrix of gradients, one entry per active term at its winning token."""
    active = grad_BV.nonzero(as_tuple=True)
    # Sparse products exist in float32 and float64 on every device and version; half precision is promoted to float32.
    dtype = torch.promote_types(grad_BV.dtype, torch.float32)
    grad_TV = torch.sparse_coo_tensor(
        torch.stack((winner_BV[active].long(), active[1])),
        grad_BV[active].to(dtype),
        (len(hidden_TD), len(embeddings_VD)),
        check_invariants=False,
    )
    return torch.sparse.mm(grad_TV, embeddings_VD.to(dtype)), torch.sparse.mm(grad_TV.t(), hidden_TD.to(dtype))


def splade_max(hidden_TD: Tensor, embeddings_VD: Tensor, bias_V: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the SPLADE-max vectors [B, V] of texts whose tokens lie one after the other in ``hidden_TD``.

    ``lengths[i]`` counts text i's tokens, all > 0, summing to T. Formal et al. 2021 (arXiv 2109.10086), equation 2 with max
    pooling: w_v = max_t log(1 + relu(h_t . E_v + b_v)). Under autocast the logits are in its dtype, everything after them in
    that of ``bias_V``. ValueError if the lengths do not add up.

    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> splade_max(hidden, torch.eye(2), torch.zeros(2), [2]).exp()
    tensor([[2., 3.]])
    """
    if sum(lengths) != hidden_TD.shape[0] or min(lengths, default=1) < 1:
        raise ValueError(f"lengths {list(lengths)} must be positive and add up to the {hidden_TD.shape[0]} rows of hidden_TD")
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    maximum_BV: Tensor = _MaxLogit.apply(  # type: ignore[no-untyped-call]
        hidden_TD, embeddings_VD, bias_V, tuple(lengths), dtype, hidden_TD.is_cuda
    )
    return torch.log1p(torch.relu(maximum_BV))
