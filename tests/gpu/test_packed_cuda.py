"""Attention without padding on a CUDA device: variable-length attention in half precision, padded SDPA else, against float64."""

from __future__ import annotations

import inspect
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekd import packed_body
from sparsekd.packed_body import packed, packed_attention

LENGTHS = [3, 77, 1, 40, 40, 128, 25, 2, 33]
TEXTS = ["a cat", "the river and the old bridge in the snow", "x", "two words two words two words", "heart disease " * 30]
# Half precision keeps 11 or 8 bits; sums of 128 weighted values of size 1.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def attend(device: str, dtype: torch.dtype, window: int | None, num_key_heads: int, dropout: float = 0.0) -> list[Tensor]:
    """Return the output of attention over texts of LENGTHS and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, sum(LENGTHS), heads, 32, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
        for heads in (4, num_key_heads, num_key_heads)
    ]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    output, _ = packed_attention(
        torch.nn.Module(),
        *states,
        None,
        dropout=dropout,
        sliding_window=window,
        cu_seq_lens_q=ends,
        max_length_q=max(LENGTHS),
    )
    weights = torch.randn(output.shape, generator=generator)
    (output * weights.to(output)).sum().backward()
    return [output.detach(), *(state.grad for state in states if state.grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_attention_and_gradients_equal_those_of_a_cpu(
    device: str, dtype: torch.dtype, window: int | None, num_key_heads: int
) -> None:
    from torch.nn.attention.varlen import varlen_attn

    if num_key_heads != 4 and dtype != torch.float32 and "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        pytest.skip(f"torch {torch.__version__}, older than pyproject.toml's: varlen_attn has no grouped queries")
    expected = attend("cpu", torch.float64, window, num_key_heads)

    found = attend(device, dtype, window, num_key_heads)

    for ours, reference in zip(found, expected, strict=True):
        difference = float((ours.cpu().double() - reference).abs().max())
        assert difference <= TOLERANCE[dtype] * max(1.0, float(reference.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "dropout", "expected"), [(torch.bfloat16, 0.0, 1), (torch.bfloat16, 0.1, 0), (torch.float32, 0.0, 0)]
)
def test_variable_length_attention_runs_in_half_precision_without_dropout(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dropout: float, expected: int
) -> None:
    calls: list[int] = []
    varlen = packed_body._attend_varlen

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return varlen(*arguments)

    monkeypatch.setattr(packed_body, "_attend_varlen", counted)

    attend(device, dtype, None, 4, dropout)

    assert len(calls) == expected


@pytest.mark.gpu
def test_attention_does_not_wait_for_the_device(device: str) -> None:
    attend(device, torch.float32, None, 4)  # what is set up once may wait
    states = [torch.randn(1, 4, sum(LENGTHS), 32, device=device) for _ in range(3)]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        for dtype in (torch.float32, torch.bfloat16):
            own = [state.to(dtype) for state in states]
            packed_attention(torch.nn.Module(), *own, None, cu_seq_lens_q=ends, max_length_q=max(LENGTHS))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_an_encoder_gives_its_padded_vectors(
    device: str, tiny_encoder_folder: Path, tmp_path: Path, autocast: torch.dtype | None
) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")), device=device)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        plain = model.encode(TEXTS, convert_to_tensor=True)
        with packed(model) as reasons:
            vectors = model.encode(TEXTS, convert_to_tensor=True)

    assert reasons == {}
    tolerance = TOLERANCE[autocast or torch.float32]
    torch.testing.assert_close(vectors.float(), plain.float(), rtol=tolerance, atol=tolerance * float(plain.abs().max()))
