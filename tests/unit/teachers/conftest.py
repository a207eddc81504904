"""Texts of many lengths, drawn from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

WORDS = "the heat of a boundary layer is not old flow river school party queen england oxygen number wave xylem 42 q-z".split()


@pytest.fixture(scope="session")
def draw_texts() -> Callable[..., list[str]]:
    """Return ``draw(count, longest=60, seed=0)``: texts of 1 to ``longest`` words."""

    def draw(count: int, *, longest: int = 60, seed: int = 0) -> list[str]:
        generator = np.random.default_rng(seed)
        return [" ".join(generator.choice(WORDS, size=generator.integers(1, longest + 1))) for _ in range(count)]

    return draw
