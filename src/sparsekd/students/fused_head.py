"""The SPLADE head without its batch x length x vocabulary logits.

``max_t log1p(relu(h_t . E^T + b))`` is computed block by block and the maximum is taken first: log1p and relu are monotone, so they
are applied once per (text, term). The forward pass also notes which token won each active term, and the backward pass visits only
these (text, term, token) entries, each with one row of E and one of h. Exact up to float rounding, where two tokens' logits are
equal the earlier one wins; deterministic. Memory beyond results and gradients: one block of logits, 20 bytes per active entry.

A CPU multiplies blocks that fit its cache. A CUDA device of compute capability 8.0 and later with triton uses the kernels of
``head_triton``; any other, and float64, larger blocks of padded texts.

Shapes: T tokens of a batch without padding, B texts, D hidden width, V vocabulary, A active (text, term) entries, L tokens of one
piece of a text or of a block's longest text, N terms of one block, C texts of one block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tokens x terms multiplied at once: 2 MB of float32. Of 128 to 512 x 1,024 to 8,192 (64 texts of up to 128 tokens, width 384, both
# cores of an EPYC) this was the fastest at 1 % of the terms active and at 100 %; the whole range lies within 20 %.
_BLOCK_TOKENS = 256
_BLOCK_TERMS = 2048
# Fewer terms where it takes fewer to give each thread four ranges of them, down to this many.
_LEAST_BLOCK_TERMS = 512
# Threads that share the interpreter's lock between their steps of milliseconds. By size, not measured.
_MOST_WORKERS = 16
# Multiplications below which starting threads, 0.1 ms each, would show: about 5 ms of one core.
_WORTH_WORKERS = 200_000_000
# On other devices: tokens of one block, padding included, and its logits, 256 MB of float32. By size, not measured.
_BATCHED_TOKENS = 2048
_BATCHED_LOGITS = 1 << 26


class _Piece(NamedTuple):
    """Consecutive tokens of one text, no more than a block holds."""

    text: int
    start: int
    length: int


class _SpladeMax(torch.autograd.Function):
    """SPLADE-max vectors, with the gradient through each active term's winning token only.

    Logits are multiplied in ``dtype``, everything after them is in the vectors' dtype; both are the inputs' own except under
    autocast, which must not reach in here: it would change the dtype of some products and not of the buffers they are written to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embeddings_VD: Tensor,
        bias_V: Tensor | None,
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        needs_winners: bool,
    ) -> Tensor:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden, embeddings = hidden_TD.to(dtype), embeddings_VD.to(dtype)
            # What a logit must exceed to be active. As the start of the running maximum it is relu.
            floor_V = -bias_V if bias_V is not None else hidden.new_zeros(len(embeddings))
            vectors_dtype = torch.promote_types(dtype, floor_V.dtype)
            vectors_BV, winner_BV = _maxima(hidden, embeddings, floor_V, lengths, needs_winners)
            vectors_BV -= floor_V
            if winner_BV is not None:
                cell_A = vectors_BV.view(-1).nonzero().squeeze(1)
                slope_A = vectors_BV.view(-1)[cell_A].add_(1).reciprocal_()
                ctx.save_for_backward(hidden_TD, embeddings_VD, cell_A, winner_BV.view(-1)[cell_A], slope_A)
            return vectors_BV.log1p_().to(vectors_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # torch's once_differentiable lets pass what depends on the saved inputs only
            raise RuntimeError(
                "the fused SPLADE head has no second derivative, which create_graph = True asks for; set [run] fused_head = false"
            )
        (grad_BV,) = grads
        hidden_TD, embeddings_VD, cell_A, winner_A, slope_A = ctx.saved_tensors
        needs_hidden, needs_embeddings, needs_bias, *_ = ctx.needs_input_grad
        num_tokens, num_terms = len(hidden_TD), len(embeddings_VD)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weight_A = (grad_BV.reshape(-1)[cell_A] * slope_A).to(grad_BV.dtype)
            term_A = (cell_A % num_terms).to(torch.int32)
            grad_hidden_TD = grad_embeddings_VD = grad_bias_V = None
            if needs_hidden:
                by_token = _groups(winner_A, num_tokens)
                grad_hidden_TD = _weighted_row_sums(embeddings_VD, weight_A, term_A, by_token).to(hidden_TD.dtype)
            if needs_embeddings or needs_bias:
                by_term = _groups(term_A, num_terms)
            if needs_embeddings:
                grad_embeddings_VD = _weighted_row_sums(hidden_TD, weight_A, winner_A, by_term).to(embeddings_VD.dtype)
            if needs_bias:
                ones_T1 = weight_A.new_ones(num_tokens, 1)
                grad_bias_V = _weighted_row_sums(ones_T1, weight_A, winner_A, by_term).squeeze(1)
        return grad_hidden_TD, grad_embeddings_VD, grad_bias_V, None, None, None


def _has_kernels(tensor: Tensor) -> bool:
    if not tensor.is_cuda or tensor.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return False
    # Older cards have no TF32 and no bfloat16: there the kernels would multiply without tensor cores, torch's libraries do not.
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _maxima(
    hidden_TD: Tensor, embeddings_VD: Tensor, floor_V: Tensor, lengths: Sequence[int], needs_winners: bool
) -> tuple[Tensor, Tensor | None]:
    """Return each text's largest logits without bias, at least ``floor_V``, [B, V] in float32 or float64.

    And the rows of ``hidden_TD`` that won, int32 [B, V], where asked for; they mean something only above the floor.
    """
    if _has_kernels(hidden_TD):
        from sparsekd.students.head_triton import maxima

        return maxima(hidden_TD, embeddings_VD, floor_V, lengths, needs_winners)
    dtype = torch.promote_types(torch.promote_types(hidden_TD.dtype, floor_V.dtype), torch.float32)
    maximum_BV = floor_V.to(dtype).repeat(len(lengths), 1)
    winner_BV = torch.empty_like(maximum_BV, dtype=torch.int32) if needs_winners else None
    write = _write_maxima if hidden_TD.device.type == "cpu" else _write_maxima_batched
    write(maximum_BV, winner_BV, hidden_TD, embeddings_VD, lengths)
    return maximum_BV, winner_BV


def _write_maxima(
    maximum_BV: Tensor, winner_BV: Tensor | None, hidden_TD: Tensor, embeddings_VD: Tensor, lengths: Sequence[int]
) -> None:
    """Raise ``maximum_BV`` to the largest logits: ranges of terms side by side, one thread each.

    Torch would split each of the many small steps over its threads and wait for the slowest after each: up to three times as long
    beside other work on the same cores. Here they meet once, at the end.
    """
    num_terms, threads = len(embeddings_VD), torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS) if hidden_TD.numel() * num_terms >= _WORTH_WORKERS else 1
    block_terms = min(_BLOCK_TERMS, max(-(-num_terms // (4 * workers)), min(_LEAST_BLOCK_TERMS, _BLOCK_TERMS)))
    ranges = [slice(first, first + block_terms) for first in range(0, num_terms, block_terms)]
    inference = torch.is_inference_mode_enabled()  # of this thread alone, as is no_grad

    def write(terms: slice) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            winner_BN = None if winner_BV is None else winner_BV[:, terms]
            _write_block_maxima(maximum_BV[:, terms], winner_BN, hidden_TD, embeddings_VD[terms], lengths)

    if workers == 1:
        for terms in ranges:
            write(terms)
        return
    try:
        # set_num_threads counts for the thread that calls it and for threads that start later: hence the second call.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            list(pool.map(write, ranges))
    finally:
        torch.set_num_threads(threads)


def _write_block_maxima(
    maximum_BN: Tensor, winner_BN: Tensor | None, hidden_TD: Tensor, embeddings_ND: Tensor, lengths: Sequence[int]
) -> None:
    """Raise ``maximum_BN`` to the largest logits of some terms, a block of tokens after another."""
    num_terms, most_tokens = len(embeddings_ND), min(_BLOCK_TOKENS, len(hidden_TD))
    logits = hidden_TD.new_empty(most_tokens * num_terms)
    descending = torch.arange(most_tokens, 0, -1, dtype=torch.float32)
    for pieces in _blocks(lengths):
        start, tokens = pieces[0].start, sum(piece.length for piece in pieces)
        # Terms x tokens: a maximum along the contiguous side takes half the time of one across it.
        logits_NL = torch.mm(embeddings_ND, hidden_TD[start : start + tokens].T, out=logits[: num_terms * tokens].view(-1, tokens))
        for piece in pieces:
            part_NL = logits_NL[:, piece.start - start : piece.start - start + piece.length]
            found_N, maximum_N = part_NL.amax(dim=1), maximum_BN[piece.text]
            if winner_BN is not None:
                _write_winners(winner_BN[piece.text], part_NL, found_N, maximum_N, piece.start, descending)
            torch.maximum(maximum_N, found_N, out=maximum_N)


def _write_winners(winner_N: Tensor, part_NL: Tensor, found_N: Tensor, maximum_N: Tensor, start: int, descending: Tensor) -> None:
    """Write the winning row of each term whose maximum rises."""
    rises_N = found_N > maximum_N
    rows_A = rises_N.nonzero().squeeze(1)
    # Copying rows out pays while they are few. By the cost of the two steps, not tuned.
    if 3 * len(rows_A) > len(found_N):
        torch.where(rises_N, _first_equal(part_NL, found_N, descending) + start, winner_N, out=winner_N)
    elif len(rows_A):
        winner_N[rows_A] = _first_equal(part_NL[rows_A], found_N[rows_A], descending) + start


def _first_equal(values_NL: Tensor, maximum_N: Tensor, descending: Tensor) -> Tensor:
    """Return the first column that holds each row's maximum, int32 [N]; ``descending`` ends in L, L - 1, ... 1.

    Three vectorised passes, 0.4 ns a value; torch.argmax goes value by value at 1.5.
    """
    length = values_NL.shape[1]
    equal_NL = torch.empty(values_NL.shape, dtype=torch.float32)
    torch.eq(values_NL, maximum_N.unsqueeze(1), out=equal_NL)
    return length - equal_NL.mul_(descending[-length:]).amax(dim=1).to(torch.int32)


def _blocks(lengths: Sequence[int]) -> Iterator[list[_Piece]]:
    """Yield the pieces of each block of consecutive tokens. Texts that fit a block are not cut; empty ones appear nowhere."""
    block: list[_Piece] = []
    tokens, start = 0, 0
    for text, length in enumerate(lengths):
        for offset in range(0, length, _BLOCK_TOKENS):
            piece = _Piece(text, start + offset, min(_BLOCK_TOKENS, length - offset))
            if block and tokens + piece.length > _BLOCK_TOKENS:
                yield block
                block, tokens = [], 0
            block.append(piece)
            tokens += piece.length
        start += length
    if block:
        yield block


def _write_maxima_batched(
    maximum_BV: Tensor, winner_BV: Tensor | None, hidden_TD: Tensor, embeddings_VD: Tensor, lengths: Sequence[int]
) -> None:
    """Raise ``maximum_BV`` to the largest logits, some padded texts at a time: few large steps for a device that waits for each."""
    start_B = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    for texts in _padded_blocks(lengths):
        length_C = torch.tensor([lengths[text] for text in texts])
        # A text shorter than its block's longest repeats its last token: that changes no maximum and needs no mask.
        place_CL = torch.minimum(torch.arange(int(length_C.max())), length_C.unsqueeze(1) - 1)
        row_CL = (start_B[texts].unsqueeze(1) + place_CL).to(hidden_TD.device)
        text_C = torch.tensor(texts, device=hidden_TD.device)
        hidden_CLD = hidden_TD[row_CL]
        num_terms = max(_BATCHED_LOGITS // row_CL.numel(), 1)
        for first in range(0, len(embeddings_VD), num_terms):
            terms = slice(first, first + num_terms)
            found_CN, place_CN = (hidden_CLD @ embeddings_VD[terms].T).max(dim=1)
            if winner_BV is not None:
                winner_BV[text_C, terms] = row_CL.gather(1, place_CN).to(torch.int32)
            maximum_BV[text_C, terms] = torch.maximum(maximum_BV[text_C, terms], found_CN)


def _padded_blocks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield texts whose tokens fit one block when padded to its longest, at least one text each; empty ones appear nowhere."""
    block: list[int] = []
    longest = 0
    for text, length in enumerate(lengths):
        if length:
            longest = max(longest, length)
            if block and longest * (len(block) + 1) > _BATCHED_TOKENS:
                yield block
                block, longest = [], length
            block.append(text)
    if block:
        yield block


class _Groups(NamedTuple):
    """Entries by group, in their order within it: ``order_A[bounds[s]:bounds[s + 1]]`` are those of group s."""

    order_A: Tensor
    bounds: Tensor


def _groups(group_A: Tensor, num_groups: int) -> _Groups:
    """Return where the entries of each group are."""
    sorted_A, order_A = torch.sort(group_A, stable=True)
    every = torch.arange(num_groups + 1, dtype=torch.int32, device=group_A.device)
    return _Groups(order_A, torch.searchsorted(sorted_A, every).to(torch.int32))


def _weighted_row_sums(matrix: Tensor, weight_A: Tensor, of_A: Tensor, groups: _Groups) -> Tensor:
    """Return [groups, D]: row s is the sum of ``weight * matrix[of]`` over the entries of group s, in their order."""
    order_A, bounds = groups
    of_A, weight_A, matrix = of_A[order_A], weight_A[order_A], matrix.to(weight_A.dtype)
    if _has_kernels(matrix):
        from sparsekd.students.head_triton import weighted_row_sums

        return weighted_row_sums(matrix, weight_A, of_A, bounds)
    # One sum after another, several at once, no two writers to a row: deterministic, and on x86 compiled for the width at hand.
    return torch.nn.functional.embedding_bag(
        of_A, matrix, bounds, mode="sum", per_sample_weights=weight_A, include_last_offset=True
    )


def splade_max(hidden_TD: Tensor, embeddings_VD: Tensor, bias_V: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Return the SPLADE-max vectors [B, V] of texts whose tokens lie one after the other in ``hidden_TD``.

    ``lengths[i]`` counts text i's tokens, summing to T; a text of none has a vector of zeros. Formal et al. 2021
    (arXiv 2109.10086), equation 2 with max pooling: w_v = max_t log(1 + relu(h_t . E_v + b_v)); no ``bias_V`` is a bias of 0.
    Under autocast the logits are in its dtype, everything after them in that of ``bias_V``. ValueError if the lengths do not add
    up; RuntimeError where a second derivative is asked for (create_graph).

    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> splade_max(hidden, torch.eye(2), torch.zeros(2), [2]).exp()
    tensor([[2., 3.]])
    """
    if sum(lengths) != hidden_TD.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"lengths {list(lengths)} must be at least 0 and add up to the {hidden_TD.shape[0]} rows of hidden_TD")
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    # Asked here: inside the function gradients are off, and its needs_input_grad is true under no_grad as well.
    needs_winners = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_TD, embeddings_VD, bias_V))
    vectors_BV: Tensor = _SpladeMax.apply(  # type: ignore[no-untyped-call]
        hidden_TD, embeddings_VD, bias_V, tuple(lengths), dtype, needs_winners
    )
    return vectors_BV
