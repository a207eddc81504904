"""Vespa's feed and schema, held to the documented JSON format: no Vespa runs here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekd.artifact import read_manifest


def test_every_line_is_a_put_of_a_mapped_tensor_with_its_weights(export: Callable[..., Path], judged: Any) -> None:
    lines = (export("vespa") / "feed.jsonl").read_text(encoding="utf-8").split("\n")

    assert lines.pop() == ""
    assert len(lines) == 60
    for number, line in enumerate(lines):
        row = judged.passage_csr[number].sorted_indices()
        cells = dict(zip([judged.terms[dim] for dim in row.indices], row.data.tolist(), strict=True))
        fields = {"id": f"p{number}", "tokens": {"cells": cells}}
        assert json.loads(line) == {"put": f"id:sparsekd:passage::p{number}", "fields": fields}


def test_the_schema_has_the_fields_of_the_feed(export: Callable[..., Path]) -> None:
    folder = export("vespa")
    schema = (folder / "passage.sd").read_text(encoding="utf-8")
    first = json.loads((folder / "feed.jsonl").read_text(encoding="utf-8").split("\n", 1)[0])

    assert re.findall(r"field (\w+) type (\S+) \{", schema) == [("id", "string"), ("tokens", "tensor<float>(token{})")]
    assert set(first["fields"]) == {"id", "tokens"}
    assert schema.startswith("schema passage {")
    assert schema.count("{") == schema.count("}")


def test_nothing_is_lost(export: Callable[..., Path], judged: Any) -> None:
    assert read_manifest(export("vespa"))["quantisation"] == {
        "passages": 60,
        "empty_passages": 1,
        "weights": judged.passage_csr.nnz,
        "lost_to_zero": 0.0,
        "mean_relative_error": 0.0,
        "max_relative_error": 0.0,
    }
