"""Imported scores as a teacher: whose they are, and that nothing stands in for a missing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.recipe import BM25Teacher, FileTeacher
from sparsekd.teachers.file import FileScorer, require_imported
from sparsekd.teachers.identity import bm25_identity, file_identity


def teacher(**fields: Any) -> FileTeacher:
    return FileTeacher(**{"name": "them", "kind": "file", "imported": "bert-ensemble", **fields})


def test_identity_is_what_was_stated_under_a_stage_of_its_own() -> None:
    identity = FileScorer(teacher(name="another", fields={"revision": "2"})).identity

    assert identity == {"stage": "teachers/file v1", "kind": "file", "name": "bert-ensemble", "fields": {"revision": "2"}}
    assert json.loads(json.dumps(identity)) == identity


def test_no_statement_equals_another_teachers_identity() -> None:
    other = bm25_identity(BM25Teacher(name="b", kind="bm25"), ["a cat"])

    stated = file_identity("bm25", {name: str(value) for name, value in other.items()})

    assert key_of(stated) != key_of(other)
    assert (stated["stage"], stated["kind"]) == ("teachers/file v1", "file")


def test_name_and_every_field_enter_the_key() -> None:
    statements = [("a", {}), ("b", {}), ("a", {"x": "1"}), ("a", {"x": "2"}), ("a", {"y": "1"}), ("a", {"x": "1", "y": "1"})]

    assert len({key_of(file_identity(name, fields)) for name, fields in statements}) == len(statements)
    assert key_of(file_identity("a", {"x": "1", "y": "2"})) == key_of(file_identity("a", {"y": "2", "x": "1"}))


def test_a_pair_that_was_not_imported_is_never_scored() -> None:
    with pytest.raises(
        ValueError, match=r"^teacher 'them': 2 pairs were not imported \(first: query 'q', passage 'p'\); import their"
    ):
        FileScorer(teacher()).score([("q", "p"), ("q", "r")])


def test_missing_pairs_are_named_with_how_many_and_the_first() -> None:
    gold_sim = np.array([1, np.nan, 2, np.nan, np.nan, np.nan], dtype=np.float32)
    query_ids, passage_ids = list("aabbcc"), list("uvwxyz")

    with pytest.raises(ValueError, match="have no score") as caught:
        require_imported(teacher(fields={"v": "2"}), Path("cache/bank/scores/KEY"), gold_sim, query_ids, passage_ids)

    assert str(caught.value) == (
        "teacher 'them': 4 of 6 pairs have no score among those imported as --name bert-ensemble --field v=2 "
        "(cache/bank/scores/KEY; first: query 'a', passage 'v'; query 'b', passage 'x'; query 'c', passage 'y'); import a file "
        "that has them with sparsekd import ... --name bert-ensemble --field v=2, or mine passages that it has scored"
    )


def test_a_teacher_that_knows_every_pair_is_taken() -> None:
    require_imported(teacher(), Path("bank"), np.zeros(2, dtype=np.float32), ["a", "b"], ["u", "v"])
