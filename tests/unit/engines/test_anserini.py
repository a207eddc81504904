"""The files that Anserini indexes and searches, read as Anserini reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import read_manifest


def test_impacts_are_rounded_hundredths_and_none_is_zero(export: Callable[..., Path], judged: Any) -> None:
    folder = export("anserini")
    names = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
    (path,) = (folder / "passages").iterdir()

    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    assert path.suffix == ".jsonl"
    for number, document in enumerate(documents):
        row = judged.passage_csr[number].sorted_indices()
        impacts = np.rint(row.data.astype(np.float64) * 100).astype(int).tolist()
        expected = {names[dim]: impact for dim, impact in zip(row.indices, impacts, strict=True) if impact}
        assert document == {"id": f"p{number}", "contents": "", "vector": expected}


def test_topics_repeat_a_term_as_often_as_its_impact(export: Callable[..., Path], judged: Any) -> None:
    folder = export("anserini")
    names = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
    lines = (folder / "queries.tsv").read_text(encoding="utf-8").splitlines()

    for number, line in enumerate(lines):
        query_id, text = line.split("\t")
        row = judged.query_csr[number].sorted_indices()
        impacts = np.rint(row.data.astype(np.float64) * 100).astype(int).tolist()
        assert query_id == f"q{number}"
        assert Counter(text.split()) == {names[dim]: impact for dim, impact in zip(row.indices, impacts, strict=True) if impact}


def test_a_term_with_a_space_stays_one_token(export: Callable[..., Path], judged: Any) -> None:
    terms = ["a b", "a", "b%20", *judged.terms[3:]]

    folder = export("anserini", judged.source(terms=terms))

    names = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
    assert names[:3] == ["a%20b", "a", "b%2520"]


def test_what_rounding_loses_is_in_the_manifest(export: Callable[..., Path], judged: Any) -> None:
    light = judged.passage_csr.copy()
    light.data[:4] = [0.004, 0.006, 0.005, 1.0]

    folder = export("anserini", replace(judged, passage_csr=light).source())

    weights = light.data.astype(np.float64)
    errors = np.abs(np.rint(weights * 100) / 100 - weights) / weights
    found = read_manifest(folder)["quantisation"]
    assert found["lost_to_zero"] == pytest.approx((errors == 1).sum() / len(weights))
    assert found["lost_to_zero"] >= 2 / len(weights)
    assert found["mean_relative_error"] == pytest.approx(errors.mean())


def test_a_term_that_the_tokenizer_would_cut_is_refused(export: Callable[..., Path], judged: Any) -> None:
    with pytest.raises(ValueError, match="expected at most 255 characters"):
        export("anserini", judged.source(terms=["x" * 256, *judged.terms[1:]]))
