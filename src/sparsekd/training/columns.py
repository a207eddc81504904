"""A row's texts through the model: its passages in one forward pass, whether padded or packed.

sentence-transformers runs packed columns one by one; here they are laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from torch import Tensor, nn

Features = dict[str, Any]


def embed_columns(model: nn.Module, columns: Sequence[Features]) -> list[Features]:
    """Return each column's features after ``model``: the first column in a forward pass of its own, the others in one together.

    Columns that cannot be merged are embedded one by one.
    """
    first, *rest = columns
    merged = merge_columns(rest)
    if merged is None:
        return [model(column) for column in columns]
    outputs = [model(first)]
    embedded = model(merged)
    num_rows = len(embedded["sentence_embedding"])
    # Tensors by row are cut into the columns again; token-level ones belong to no column and are left out.
    by_row = {
        key: value.chunk(len(rest))
        for key, value in embedded.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == num_rows
    }
    # None stays: the autoencoder says so where it has no auxiliary reconstruction.
    nothing = {key: None for key, value in embedded.items() if value is None}
    outputs += [{key: parts[number] for key, parts in by_row.items()} | nothing for number in range(len(rest))]
    return outputs


def merge_columns(columns: Sequence[Features]) -> Features | None:
    """Return the columns as one batch, the first column's rows first; None if there are fewer than two or they do not agree.

    Packed columns (``cu_seq_lens_q``) are laid end to end, padded ones padded to the widest by the library.
    """
    if len(columns) < 2:
        return None
    if all("cu_seq_lens_q" in column for column in columns):
        return _merge_packed(columns)
    merged: Features | None = merge_feature_batches(list(columns))
    return merged


def _merge_packed(columns: Sequence[Features]) -> Features | None:
    first = columns[0]
    if any(column.keys() != first.keys() for column in columns):
        return None
    merged: Features = {}
    for key, value in first.items():
        values = [column[key] for column in columns]
        if key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            ends = torch.cat([lengths.diff() for lengths in values]).cumsum(0, dtype=value.dtype)
            merged[key] = torch.cat([ends.new_zeros(1), ends])
        elif key in ("max_length_q", "max_length_k"):
            merged[key] = max(values)
        elif isinstance(value, Tensor) and value.ndim >= 1 and value.shape[-1] == first["input_ids"].shape[-1]:
            merged[key] = torch.cat(values, dim=-1)  # by token
        elif isinstance(value, Tensor) or any(other != value for other in values):
            return None
        else:
            merged[key] = value
    return merged
