"""Whatever a file holds, a reader gives rows of finite scores or a ValueError that begins with the file."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsekd.exchange.layouts import LAYOUTS
from sparsekd.exchange.readers import read_rows

WORDS = [
    "query",
    "query_id",
    "pos",
    "neg",
    "pos_scores",
    "neg_scores",
    "positive_passages",
    "docid",
    "text",
    "score",
    "scores",
    "a",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4), max_leaves=12
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(layout: str, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    rows, said = [], str(path)
    try:
        rows = list(read_rows(LAYOUTS[layout], path))
    except ValueError as error:
        said = str(error)
    assert said.startswith(str(path))
    for row in rows:
        assert row.query
        assert len(row.scores) in (0, len(row.passages), len(row.passages) - 1)
        assert all(math.isfinite(score) for score in row.scores)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pylate"])
@FEW
@given(content=st.binary(max_size=60))
def test_any_bytes(layout: str, content: bytes, tmp_path: Path) -> None:
    check(layout, tmp_path / f"a{LAYOUTS[layout].endings[-1]}", content)


@pytest.mark.parametrize("layout", ["n-tuples", "margins", "flagembedding", "tevatron", "colbert"])
@FEW
@given(values=st.lists(VALUES, max_size=3))
def test_any_json(layout: str, values: list[Any], tmp_path: Path) -> None:
    check(layout, tmp_path / "a.jsonl", "".join(json.dumps(value) + "\n" for value in values).encode())


WHOLE: dict[str, dict[str, Any]] = {
    "n-tuples": {"anchor": "q", "positive": "p", "negative": "n", "scores": [7.5, -1.25]},
    "margins": {"query_id": "q", "positive_id": "p", "negative_id": "n", "score": 8.75},
    "flagembedding": {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [7.5], "neg_scores": [-1.25]},
    "tevatron": {
        "query": "q",
        "positive_passages": [{"docid": "p", "title": "t", "text": "p", "score": 7.5}],
        "negative_passages": [{"docid": "n", "text": "n", "score": -1.25}],
    },
}


@pytest.mark.parametrize("layout", WHOLE)
@FEW
@given(draw=st.data(), value=VALUES)
def test_any_value_in_place_of_a_right_one(layout: str, draw: st.DataObject, value: Any, tmp_path: Path) -> None:
    record = json.loads(json.dumps(WHOLE[layout]))
    place: Any = record
    while True:
        key = draw.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or draw.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value

    check(layout, tmp_path / "a.jsonl", json.dumps(record).encode())


@FEW
@given(value=VALUES, protocol=st.integers(0, 5), cut=st.integers(0, 40))
def test_any_pickle(value: Any, protocol: int, cut: int, tmp_path: Path) -> None:
    content = pickle.dumps(value, protocol=protocol)

    check("score-dict", tmp_path / "a.pkl", content)
    check("score-dict", tmp_path / "a.pkl", content[: max(0, len(content) - cut)])
