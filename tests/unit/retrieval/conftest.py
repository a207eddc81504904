"""Saved students of each kind, and a small collection that has ties, an empty passage and a passage that comes twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.recipe import Student

WORDS = "the heat of a boundary layer is not old flow river school party queen england oxygen number wave blood".split()


def draw_passages(count: int) -> dict[str, str]:
    """Return texts whose ids are not in their order; every seventh has the first one's text, so scores tie."""
    generator = np.random.default_rng(0)
    drawn = [" ".join(generator.choice(WORDS, size=generator.integers(1, 25))) for _ in range(count)]
    return {f"p{(number * 37) % count}": drawn[0 if number % 7 == 0 else number] for number in range(count)} | {"empty": ""}


@pytest.fixture(scope="session")
def passages() -> dict[str, str]:
    return draw_passages(60)


@pytest.fixture
def collection_folder(tmp_path: Path, passages: dict[str, str]) -> Path:
    """A folder with ``corpus.jsonl``, a blank line and a repeated passage in it."""
    folder = tmp_path / "collection"
    folder.mkdir()
    lines = [json.dumps({"_id": passage_id, "title": "", "text": text}) for passage_id, text in passages.items()]
    (folder / "corpus.jsonl").write_text("\n".join([lines[0], "", lines[0], *lines[1:]]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def save_student(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``save(body, similarity="dot", **section)``: the folder of an untrained student made of that body."""

    def save(body: Path, *, similarity: str = "dot", **section: Any) -> Path:
        from sparsekd.students.building import build_student

        folder = tmp_path_factory.mktemp("student")
        model: Any = build_student(Student(model=str(body), max_length=32, **section), body)
        model.similarity_fn_name = similarity
        model.save_pretrained(str(folder), create_model_card=False)
        return folder

    return save


@pytest.fixture(scope="session")
def student_folder(save_student: Callable[..., Path], tiny_masked_lm_folder: Path) -> Path:
    return save_student(tiny_masked_lm_folder, query_prompt="what is the ")
