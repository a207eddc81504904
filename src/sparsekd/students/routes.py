"""Which way a text goes through a student: side by column, prompt and route of each, and the SPLADE part of a model.

A student whose sides differ has a sentence-transformers Router without a default: a column that no route names is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sparsekd.recipe import Student

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling, Transformer

Side = Literal["query", "document"]
QUERY: Side = "query"
"""Route and prompt name of queries, as sentence-transformers' encode_query asks for them."""
DOCUMENT: Side = "document"
"""Route and prompt name of passages, as encode_document asks for them."""
_QUERY_COLUMNS = ("query", "sentence_A")
_PASSAGE_COLUMNS = ("positive", "sentence_B")
_EITHER_COLUMN = "sentence"


def side_of(column: str) -> Side | None:
    """Return whose side a text column of a score table is on, None for ``sentence``, which holds both.

    >>> side_of("query"), side_of("negative_3"), side_of("sentence")
    ('query', 'document', None)
    """
    if column in _QUERY_COLUMNS:
        return QUERY
    if column in _PASSAGE_COLUMNS or (column.startswith("negative_") and column.removeprefix("negative_").isdigit()):
        return DOCUMENT
    if column == _EITHER_COLUMN:
        return None
    raise ValueError(
        f"column {column!r}: no text column of a score table; expected query, positive, negative_1 ..., sentence_A, sentence_B "
        "or sentence"
    )


def routes(student: Student, columns: Sequence[str]) -> dict[str, str]:
    """Return the route of each text column, for the trainer's ``router_mapping``; empty for a student whose sides are one.

    Raises ValueError for a column that no route can take.
    """
    sides = {column: side_of(column) for column in columns}
    if student.kind == "csr" or student.expansion == "both":
        return {}
    for column, side in sides.items():
        if side is None:
            raise ValueError(
                f'[student] expansion = "{student.expansion}": column {column!r} holds queries and passages alike, and this '
                'student sends them different ways; choose expansion = "both", or [labels] of another kind'
            )
    return {column: str(side) for column, side in sides.items()}


def column_prompts(student: Student, columns: Sequence[str]) -> dict[str, str]:
    """Return the prompt of each text column that has one: what encode_query or encode_document will put before it.

    Raises ValueError if one column would need two prompts.
    """
    prompts = {QUERY: student.query_prompt, DOCUMENT: student.passage_prompt}
    found = {}
    for column in columns:
        side = side_of(column)
        if side is None and student.query_prompt != student.passage_prompt:
            raise ValueError(
                f"[student] query_prompt = {student.query_prompt!r} and passage_prompt = {student.passage_prompt!r}: column "
                f"{column!r} holds queries and passages alike; make them equal, or choose [labels] of another kind"
            )
        found[column] = prompts[side or DOCUMENT]
    return {column: prompt for column, prompt in found.items() if prompt}


def check_columns(columns: Sequence[str], *, prompts: Mapping[str, str], routes: Mapping[str, str]) -> None:
    """Raise ValueError unless every prompt and route is of a real text column, and every column has a route if any has.

    sentence-transformers ignores a prompt of an unknown column and sends an unnamed column through the default route.
    """
    for what, mapping in (("prompt", prompts), ("route", routes)):
        strange = [column for column in mapping if column not in columns]
        if strange:
            raise ValueError(f"a {what} is set for column {strange[0]!r}, which the rows do not have; they have {list(columns)}")
    for column, route in routes.items():
        if route not in (QUERY, DOCUMENT):
            raise ValueError(f"column {column!r} has route {route!r}; expected {QUERY!r} or {DOCUMENT!r}")
    left_out = [column for column in columns if routes and column not in routes]
    if left_out:
        raise ValueError(f"column {left_out[0]!r} has no route; expected one for each of {list(columns)}")


def modules_by_side(model: SparseEncoder) -> dict[Side, list[Any]]:
    """Return the modules that queries and passages pass through, in order; the same ones where the sides are one."""
    from sentence_transformers.sparse_encoder.modules import Router

    router: Any = next((module for module in model.children() if isinstance(module, Router)), None)
    if router is None:
        return {QUERY: list(model.children()), DOCUMENT: list(model.children())}
    return {QUERY: list(router.sub_modules[QUERY]), DOCUMENT: list(router.sub_modules[DOCUMENT])}


def splade_route(model: SparseEncoder) -> tuple[Side, Transformer, SpladePooling]:
    """Return the side that passes through the SPLADE transformer (``document`` if both do), with its modules."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    sides = modules_by_side(model)
    for side in (DOCUMENT, QUERY):
        modules = sides[side]
        if len(modules) == 2 and isinstance(modules[1], SpladePooling):
            return side, modules[0], modules[1]
    raise ValueError(f"no SPLADE transformer in {[type(module).__name__ for module in model.modules()][:4]}")


def static_route(model: SparseEncoder) -> tuple[Side, SparseStaticEmbedding] | None:
    """Return the side without a transformer and its table; None if both sides have one."""
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    for side, modules in modules_by_side(model).items():
        if isinstance(modules[0], SparseStaticEmbedding):
            return side, modules[0]
    return None
