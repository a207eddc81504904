"""A Python function as a teacher: what it is given, what is taken from it, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.recipe import CallableTeacher
from sparsekd.teachers.function import FunctionScorer
from sparsekd.teachers.identity import teacher_identity

PAIRS = [("what heat", "the heat"), ("a wave", "no water at all")]


def teacher(function: str = "my_teacher:overlap", **fields: Any) -> CallableTeacher:
    return CallableTeacher(**{"name": "mine", "kind": "callable", "function": function, "identity": {"version": "1"}, **fields})


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return ``write(source)``: makes my_teacher.py in the working directory; what was imported is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda source: (tmp_path / "my_teacher.py").write_text(source, encoding="utf-8") and None
    sys.modules.pop("my_teacher", None)


def test_a_function_of_the_working_directory_scores_in_order(write: Callable[[str], None]) -> None:
    write("def overlap(pairs):\n    return [float(len(set(q.split()) & set(p.split()))) for q, p in pairs]\n")

    scores = FunctionScorer(teacher()).score(PAIRS)

    assert scores.tolist() == [1.0, 0.0]
    assert scores.dtype == np.float32


@pytest.mark.parametrize("returned", ["[1, 2]", "(1.5, 2)", "numpy.array([1.5, 2], dtype='float64')", "(x for x in (1.5, 2))"])
def test_any_sequence_of_numbers_is_taken(write: Callable[[str], None], returned: str) -> None:
    write(f"import numpy\ndef overlap(pairs):\n    return {returned}\n")

    assert FunctionScorer(teacher()).score(PAIRS)[1] == 2.0


def test_a_tensor_is_taken(write: Callable[[str], None]) -> None:
    write("import torch\ndef overlap(pairs):\n    return torch.tensor([0.5, -2.0], dtype=torch.bfloat16)\n")

    assert FunctionScorer(teacher()).score(PAIRS).tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", r"returned an array of shape \(1,\) for 2 pairs; expected 2 floats in their order"),
        ("[[1.0], [2.0]]", r"an array of shape \(2, 1\) for 2 pairs"),
        ("[1.0, None]", r"returned '\[1.0, None\]'; expected a sequence of floats, one for each pair"),
        ("['1', '2']", "expected a sequence of floats"),
        ("[True, False]", "expected a sequence of floats"),
        ("[[1.0], [1.0, 2.0]]", "expected a sequence of floats"),
        ("3.5", "returned '3.5'; expected a sequence of floats"),
        ("None", "returned 'None'; expected a sequence of floats"),
        ("[1.0, float('nan')]", r"1 of 2 scores are not finite \(first: pair 1, 'a wave' with 'no water at all', nan\)"),
        ("[float('-inf'), 1.0]", r"first: pair 0, .*, -inf\); expected a finite float32 from my_teacher:overlap for each"),
        ("[1e300, 1.0]", r"1 of 2 scores are not finite \(first: pair 0, .*, inf\)"),
    ],
)
def test_anything_but_a_finite_number_for_each_pair_is_refused(write: Callable[[str], None], returned: str, message: str) -> None:
    write(f"def overlap(pairs):\n    return {returned}\n")

    with pytest.raises(ValueError, match=message):
        FunctionScorer(teacher()).score(PAIRS)


def test_a_module_or_function_that_is_not_there_is_refused(write: Callable[[str], None], tmp_path: Path) -> None:
    write("overlap = 3\n")

    with pytest.raises(ValueError, match=rf"function = 'nowhere:f': there is no module nowhere in {tmp_path} or installed"):
        FunctionScorer(teacher("nowhere:f")).score(PAIRS)
    with pytest.raises(ValueError, match=r"there is no module my_teacher.inner"):
        FunctionScorer(teacher("my_teacher.inner:f")).score(PAIRS)
    with pytest.raises(ValueError, match=r"my_teacher.py has no function score; expected module:function"):
        FunctionScorer(teacher("my_teacher:score")).score(PAIRS)
    with pytest.raises(ValueError, match=r"my_teacher.py has no function overlap"):
        FunctionScorer(teacher()).score(PAIRS)


def test_what_the_module_or_function_raises_is_its_own(write: Callable[[str], None]) -> None:
    write("def overlap(pairs):\n    import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        FunctionScorer(teacher()).score(PAIRS)

    write("import not_installed_anywhere\n")
    sys.modules.pop("my_teacher")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        FunctionScorer(teacher()).score(PAIRS)


def test_no_pairs_import_no_module() -> None:
    assert FunctionScorer(teacher("nowhere:f")).score([]).shape == (0,)


@pytest.mark.parametrize("fields", [{"function": "a:overlap"}, {"identity": {"version": "2"}}, {"identity": {"v": "1"}}], ids=str)
def test_what_is_stated_and_the_functions_name_are_the_key(fields: dict[str, Any]) -> None:
    key, changed, renamed = (key_of(teacher_identity(teacher(**each))) for each in ({}, fields, {"name": "x", "gate": False}))

    assert key != changed
    assert key == renamed


@pytest.mark.parametrize("fields", [{"identity": {}}, {"function": "score.py"}, {"function": "my teacher:f"}], ids=str)
def test_a_function_without_module_or_identity_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1 item|should match pattern"):
        teacher(**fields)
