"""Sides, routes and prompts of a table's columns, and the parts of a model they lead to. Only the last tests load torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.recipe import Student
from sparsekd.students.routes import check_columns, column_prompts, modules_by_side, routes, side_of, splade_route, static_route

LIST = ("query", "positive", "negative_1", "negative_2")
PAIR = ("sentence_A", "sentence_B")


def student(**settings: Any) -> Student:
    return Student(model="somewhere", **settings)


@pytest.mark.parametrize("expansion", ["passage", "query"])
@pytest.mark.parametrize("columns", [LIST, PAIR, ("query", "positive")])
def test_every_column_has_the_route_of_its_side(expansion: str, columns: tuple[str, ...]) -> None:
    found = routes(student(expansion=expansion), columns)

    assert found == {column: "document" if position else "query" for position, column in enumerate(columns)}


@pytest.mark.parametrize("settings", [{}, {"kind": "csr"}])
def test_a_student_whose_sides_are_one_has_no_routes(settings: dict[str, Any]) -> None:
    assert routes(student(**settings), LIST) == {}
    assert routes(student(**settings), ("sentence",)) == {}


def test_a_column_of_both_sides_has_no_route_where_they_differ() -> None:
    with pytest.raises(ValueError, match=r'expansion = "passage": column \'sentence\' holds queries and passages alike'):
        routes(student(expansion="passage"), ("sentence",))


@pytest.mark.parametrize(
    "column", ["question", "negative", "negative_", "negative_x", "label", "passage", "query_id", "sentence_C"]
)
def test_an_unknown_column_is_named(column: str) -> None:
    with pytest.raises(ValueError, match=rf"column '{column}': no text column of a score table; expected query, positive"):
        side_of(column)


def test_each_column_gets_the_prompt_of_its_side() -> None:
    both = student(query_prompt="q: ", passage_prompt="p: ")

    assert column_prompts(both, LIST) == {"query": "q: ", "positive": "p: ", "negative_1": "p: ", "negative_2": "p: "}
    assert column_prompts(both, PAIR) == {"sentence_A": "q: ", "sentence_B": "p: "}
    assert column_prompts(student(query_prompt="q: "), LIST) == {"query": "q: "}
    assert column_prompts(student(), LIST) == {}


def test_a_column_of_both_sides_takes_one_prompt_only() -> None:
    assert column_prompts(student(query_prompt="x: ", passage_prompt="x: "), ("sentence",)) == {"sentence": "x: "}
    with pytest.raises(
        ValueError, match=r"query_prompt = 'q: ' and passage_prompt = '': column 'sentence' holds .*make them equal"
    ):
        column_prompts(student(query_prompt="q: "), ("sentence",))


def test_routes_and_prompts_of_a_student_pass_the_check() -> None:
    asymmetric = student(expansion="passage", query_prompt="q: ")

    check_columns(LIST, prompts=column_prompts(asymmetric, LIST), routes=routes(asymmetric, LIST))
    check_columns(LIST, prompts={}, routes={})


@pytest.mark.parametrize(
    ("prompts", "routing", "message"),
    [
        ({"qeury": "q: "}, {}, r"a prompt is set for column 'qeury', which the rows do not have; they have \['query', 'positive'"),
        ({}, {"question": "query"}, r"a route is set for column 'question', which the rows do not have"),
        ({}, {"query": "query", "positive": "document"}, r"column 'negative_1' has no route; expected one for each of"),
        ({}, dict.fromkeys(LIST, "passage"), r"column 'query' has route 'passage'; expected 'query' or 'document'"),
    ],
)
def test_a_prompt_or_route_that_meets_no_column_is_refused(prompts: dict[str, str], routing: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_columns(LIST, prompts=prompts, routes=routing)


@pytest.mark.parametrize(("expansion", "splade_side"), [("both", "document"), ("passage", "document"), ("query", "query")])
def test_the_parts_of_a_model_are_found(
    student_section: Callable[..., Student], tiny_headless_folder: Path, expansion: str, splade_side: str
) -> None:
    from sparsekd.students.building import build_student

    model = build_student(student_section(tiny_headless_folder, expansion=expansion), tiny_headless_folder)

    side, transformer, pooling = splade_route(model)
    sides: dict[Any, list[Any]] = modules_by_side(model)
    assert side == splade_side
    assert sides[side][0] is transformer
    assert sides[side][1] is pooling
    static = static_route(model)
    if expansion == "both":
        assert static is None
        assert sides["query"] == sides["document"]
    else:
        assert static is not None
        assert (static[0], static[1]) == ({"passage": "query", "query": "document"}[expansion], sides[static[0]][0])


def test_a_csr_student_has_no_splade_part(student_section: Callable[..., Student], tiny_encoder_folder: Path) -> None:
    from sparsekd.students.building import build_student

    student = student_section(tiny_encoder_folder, kind="csr", k=8, k_aux=16)

    with pytest.raises(ValueError, match="no SPLADE transformer in"):
        splade_route(build_student(student, tiny_encoder_folder))
