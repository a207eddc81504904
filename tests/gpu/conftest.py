"""The device of the GPU tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    """The CUDA device; without one a test selected by -m gpu fails, it does not pass unrun."""
    import torch

    assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device; run make test, or use a machine with one"
    return "cuda"
