"""The [student] section of a tiny model, and texts whose lengths differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.recipe import Student

TEXTS = (
    "a cat",
    "the river and the old bridge in the snow",
    "x",
    "heart disease: which treatment, and at what risk for the patient",
    "two words two words two words",
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def student_section() -> Callable[..., Student]:
    """Return ``make(folder, **settings)``: the section of a student that starts from ``folder``."""

    def make(folder: Path, **settings: Any) -> Student:
        return Student(model=str(folder), **{"max_length": 64, **settings})

    return make
