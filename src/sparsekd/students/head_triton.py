"""CUDA kernels of the fused SPLADE head, in Triton: maxima of logits with their winners, and weighted sums of rows.

One program multiplies one tile of terms with one text's tokens, block after block, and keeps the running maximum: logits live in
registers and padding does not exist. The backward pass sums rows entry by entry, one program per output row and slice of its width.
No atomics: two runs give the same bits. Products accumulate in float32; float32 inputs are multiplied as three TF32 products (about
float32's own error), as one where torch.set_float32_matmul_precision allows less. Logits that are NaN come out as infinity, so a
guard against values that are not finite sees them. Imports without triton; then nothing here can be called: fused_head.splade_max
decides when it is.

Shapes: T tokens of a batch without padding, B texts, D hidden width, V vocabulary, A entries, S sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # builds of torch for a CPU come without
    triton = tl = None


def _jit(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _maximum_kernel(
    hidden_TD: tl.tensor,
    embeddings_VD: tl.tensor,
    floor_V: tl.tensor,
    bounds_B: tl.tensor,
    maximum_BV: tl.tensor,
    winner_BV: tl.tensor,
    num_terms: tl.tensor,
    width: tl.tensor,
    hidden_stride_t: tl.tensor,
    hidden_stride_d: tl.tensor,
    embeddings_stride_v: tl.tensor,
    embeddings_stride_d: tl.tensor,
    NEEDS_WINNERS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    # Texts are the fastest axis of the grid: all of them meet a tile of terms while it lies in the cache.
    text = tl.program_id(0)
    start = tl.load(bounds_B + text)
    end = tl.load(bounds_B + text + 1)
    terms = tl.program_id(1) * TERMS + tl.arange(0, TERMS)
    places = tl.arange(0, WIDTH)
    term_rows = embeddings_VD + terms[:, None].to(tl.int64) * embeddings_stride_v
    # A logit at or below the floor is inactive: the running maximum starts there, which is relu.
    best = tl.load(floor_V + terms, mask=terms < num_terms, other=0.0).to(tl.float32)
    winner = tl.full([TERMS], 0, tl.int32)
    for first in range(start, end, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        token_rows = hidden_TD + tokens[None, :].to(tl.int64) * hidden_stride_t
        logits = tl.zeros([TERMS, TOKENS], tl.float32)
        for offset in range(0, width, WIDTH):
            columns = offset + places
            inside = columns < width
            e = tl.load(
                term_rows + columns[None, :] * embeddings_stride_d, mask=(terms < num_terms)[:, None] & inside[None, :], other=0.0
            )
            h = tl.load(token_rows + columns[:, None] * hidden_stride_d, mask=inside[:, None] & (tokens < end)[None, :], other=0.0)
            logits = tl.dot(e, h, logits, input_precision=PRECISION)
        # The maximum below would leave NaN out.
        logits = tl.where(logits != logits, float("inf"), logits)
        logits = tl.where((tokens < end)[None, :], logits, float("-inf"))
        if NEEDS_WINNERS:
            # Strictly greater, and the first of equals: a tie goes to the earliest token, whatever the block size.
            largest, place = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
            winner = tl.where(largest > best, first + place, winner)
        else:
            largest = tl.max(logits, axis=1)
        best = tl.maximum(best, largest)
    cells = text.to(tl.int64) * num_terms + terms
    tl.store(maximum_BV + cells, best, mask=terms < num_terms)
    if NEEDS_WINNERS:
        tl.store(winner_BV + cells, winner, mask=terms < num_terms)


@_jit
def _row_sum_kernel(
    matrix: tl.tensor,
    weight_A: tl.tensor,
    of_A: tl.tensor,
    bounds_S: tl.tensor,
    sums_SD: tl.tensor,
    width: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(bounds_S + row)
    end = tl.load(bounds_S + row + 1)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        inside = entries < end
        of = tl.load(of_A + entries, mask=inside, other=0).to(tl.int64)
        weight = tl.load(weight_A + entries, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(
            matrix + of[:, None] * stride_row + columns[None, :] * stride_column,
            mask=inside[:, None] & (columns < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(values * weight[:, None], axis=0)
    tl.store(sums_SD + row.to(tl.int64) * width + columns, total, mask=columns < width)


def maximum_tiles(longest: int, dtype: torch.dtype) -> dict[str, int]:
    """Return tile sizes, warps and stages of the maximum kernel for texts of up to ``longest`` tokens.

    Tokens a tile holds beyond a text's are multiplied for nothing, so short texts (queries) take narrow ones. At 128 tokens on an
    H200 these are within 10 % (float32) and 3 % (bfloat16) of the fastest of 16; float32's fastest needs more shared memory than an
    A100 has.
    """
    tokens = next((size for size in (16, 32, 64) if longest <= size), 128)
    width = 32 if dtype == torch.float32 else 64
    return {"TOKENS": tokens, "TERMS": 128, "WIDTH": width, "num_warps": 8 if tokens >= 64 else 4, "num_stages": 3}


def product_precision(dtype: torch.dtype) -> str:
    """Return how tiles are multiplied: halves as they are, float32 as ``tf32`` where torch allows that, else ``tf32x3``."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def maxima(
    hidden_TD: Tensor,
    embeddings_VD: Tensor,
    floor_V: Tensor,
    lengths: Sequence[int],
    needs_winners: bool,
    tiles: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return each text's largest logits without bias, at least ``floor_V``, float32 [B, V].

    And the rows of ``hidden_TD`` that won, int32 [B, V], where asked for; they mean something only above the floor. ``tiles``
    overrides ``maximum_tiles``.
    """
    num_terms, width = embeddings_VD.shape
    maximum_BV = hidden_TD.new_empty(len(lengths), num_terms, dtype=torch.float32)
    winner_BV = torch.empty_like(maximum_BV, dtype=torch.int32) if needs_winners else None
    tiles = maximum_tiles(max(lengths, default=0), hidden_TD.dtype) if tiles is None else tiles
    if maximum_BV.numel():
        bounds_B = torch.tensor([0, *lengths]).cumsum(0).to(hidden_TD.device, torch.int32)
        _maximum_kernel[len(lengths), triton.cdiv(num_terms, tiles["TERMS"])](
            hidden_TD,
            embeddings_VD,
            floor_V.contiguous(),
            bounds_B,
            maximum_BV,
            maximum_BV if winner_BV is None else winner_BV,
            num_terms,
            width,
            *hidden_TD.stride(),
            *embeddings_VD.stride(),
            NEEDS_WINNERS=needs_winners,
            PRECISION=product_precision(hidden_TD.dtype),
            enable_fp_fusion=True,  # said here because triton 3.10 will turn it off where nothing is said
            **tiles,
        )
    return maximum_BV, winner_BV


def weighted_row_sums(matrix: Tensor, weight_A: Tensor, of_A: Tensor, bounds: Tensor) -> Tensor:
    """Return [S, D]: row s is the sum of ``weight * matrix[of]`` over entries ``bounds[s]`` to ``bounds[s + 1]``.

    ``of_A`` and ``bounds`` int32; sums are float32, results in ``matrix``'s dtype.
    """
    num_sums, width = len(bounds) - 1, matrix.shape[1]
    sums = matrix.new_empty(num_sums, width)
    block = min(max(triton.next_power_of_2(width), 16), 128)
    if sums.numel():
        _row_sum_kernel[num_sums, triton.cdiv(width, block)](
            matrix,
            weight_A,
            of_A,
            bounds,
            sums,
            width,
            *matrix.stride(),
            ENTRIES=32,
            WIDTH=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sums
