"""Teachers on a CUDA device score as on the CPU, within what float32 products differ by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsekd.recipe import EncoderSpec, Run, Teacher
from sparsekd.teachers.cross_encoder import CrossEncoderScorer
from sparsekd.teachers.dense import DenseEncoder

pytestmark = pytest.mark.gpu

WORDS = "the heat of a boundary layer is not old flow river school party queen england oxygen number wave".split()


def texts(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(1, 60))) for _ in range(count)]


def test_dense_encoder_on_cuda_equals_cpu(tiny_encoder_folder: Path, device: str) -> None:
    spec = EncoderSpec(model=str(tiny_encoder_folder))
    passages = texts(64, seed=0)
    expected = DenseEncoder(spec, Run()).encode(passages, role="passage")

    found = DenseEncoder(spec, Run(device=device, batch_tokens=256)).encode(passages, role="passage")

    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_cross_encoder_on_cuda_equals_cpu(tiny_cross_encoder_folder: Path, device: str) -> None:
    teacher = Teacher(name="tiny", kind="cross-encoder", model=str(tiny_cross_encoder_folder))
    pairs = list(zip(texts(64, seed=1), texts(64, seed=2), strict=True))
    expected = CrossEncoderScorer(teacher, Run()).score(pairs)

    found = CrossEncoderScorer(teacher, Run(device=device, batch_tokens=256)).score(pairs)

    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert float(np.ptp(expected)) > 0.01
