"""Laws of the rows a cross-encoder is trained on. No torch."""

from __future__ import annotations

from typing import Any

import pytest

from sparsekd.collection.beir import Collection
from sparsekd.mining.candidates import CandidateRow
from sparsekd.recipe import TrainTeacher
from sparsekd.teacher_training.rows import teacher_rows


def row(query_id: str, positive_ids: list[str], passage_ids: list[str]) -> CandidateRow:
    number = len(passage_ids)
    return CandidateRow(query_id, positive_ids, passage_ids, ["bm25"] * number, [1.0] * number, list(range(1, number + 1)))


def section(**settings: Any) -> TrainTeacher:
    return TrainTeacher(**{"name": "own", "model": "m", "num_negatives": 2, **settings})


def test_each_positive_makes_a_row_with_its_query_s_candidates() -> None:
    rows = teacher_rows(section(), [row("q", ["p", "r"], ["a", "b"])])

    assert rows.query_ids == ["q", "q"]
    assert [ids[0] for ids in rows.passage_ids] == ["p", "r"]
    assert all(sorted(ids[1:]) == ["a", "b"] for ids in rows.passage_ids)
    assert rows.num_dropped == 0


def test_a_query_with_too_few_candidates_is_dropped_and_its_judgements_counted() -> None:
    rows = teacher_rows(section(), [row("short", ["p", "r"], ["a"]), row("q", ["p"], ["a", "b"])])

    assert (rows.query_ids, rows.num_dropped) == (["q"], 2)


def test_no_row_left_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[train_teacher\] num_negatives = 2: none of 1 train judgements has as many candidates"):
        teacher_rows(section(), [row("q", ["p"], ["a"])])


def test_another_query_changes_no_draw() -> None:
    passage_ids = [f"p{number}" for number in range(20)]
    alone = teacher_rows(section(), [row("q", ["p"], passage_ids)])

    beside = teacher_rows(section(), [row("another", ["p"], passage_ids), row("q", ["p"], passage_ids)])

    assert beside.passage_ids[1] == alone.passage_ids[0]
    assert beside.passage_ids[0] != alone.passage_ids[0]


def test_another_seed_draws_others() -> None:
    rows = [row("q", ["p"], [f"p{number}" for number in range(20)])]

    assert teacher_rows(section(), rows) != teacher_rows(section(seed=1), rows)


def test_the_positive_is_labelled_1_and_stands_first() -> None:
    collection = Collection({"p": "text of p", "a": "text of a", "b": "text of b"}, {"q": "query"}, {}, {})
    rows = teacher_rows(section(), [row("q", ["p"], ["a", "b"])])

    columns = rows.columns(collection)

    assert list(columns) == ["query", "passages", "labels"]
    assert (columns["query"], columns["labels"]) == (["query"], [[1.0, 0.0, 0.0]])
    assert columns["passages"][0][0] == "text of p"
