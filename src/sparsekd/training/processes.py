"""Sums and rows over all processes that train together, with the gradient that makes DDP's averaged one the global batch's.

Each process computes the same global value R from its own part x_r and the others', and DDP averages the W gradients that come
back: (1/W) Σ_r g_r. The gradient of R is Σ_r ∂R/∂x_r · ∂x_r/∂θ, so g_r has to be W · ∂R/∂x_r · ∂x_r/∂θ: hence the factor W of
both backward passes, which exchange nothing.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Say whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_across_processes(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over processes, without gradient."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def global_sum(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over processes, with the gradient that DDP's averaging turns into the global one."""
    return cast(Tensor, _GlobalSum.apply(values)) if is_distributed() else values  # type: ignore[no-untyped-call]


def global_rows(rows: Tensor) -> Tensor:
    """Return [W·B, ...], the rows of all W processes in rank order, with the gradient that DDP's averaging makes the global one.

    Raises ValueError where processes bring different numbers of rows.
    """
    if not is_distributed():
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    if len({int(count) for count in counts}) > 1:
        raise ValueError(f"processes bring {[int(count) for count in counts]} rows to one step; they must bring equally many")
    return cast(Tensor, _GlobalRows.apply(rows))  # type: ignore[no-untyped-call]


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_across_processes(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * dist.get_world_size()


class _GlobalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()
