"""One row of any layout, with its place in the file, and the checks that every reader makes of ids and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekd.collection.reading import MAX_BITS, shown

_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Row:
    """A query and passages, by id or by text as the layout has it."""

    place: str
    """``file:line`` (or row), for messages."""
    query: str
    passages: list[str]
    """The positive first, where the layout knows one."""
    scores: list[float]
    """One per passage; for margins one per negative; empty where the layout carries none."""


def refused(place: str, found: str, expected: str, remedy: str) -> ValueError:
    """Return the error for one row.

    >>> str(refused("a.jsonl:3", "no scores", "one per passage", "score them first"))
    'a.jsonl:3: found no scores, expected one per passage; score them first'
    """
    # A column's name is the file's, and may hold what drives a terminal.
    printable = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in found)
    return ValueError(f"{place}: found {printable}, expected {expected}; {remedy}")


def checked_id(place: str, name: str, value: Any) -> str:
    """Return an id as the string it is in a collection; integers are written out exactly."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= MAX_BITS:
        return str(value)
    if not isinstance(value, str) or not value:
        raise refused(place, f"{name} {shown(value)}", "a non-empty string or an integer", "write the collection's own id")
    return value


def checked_text(place: str, name: str, value: Any, *, may_be_empty: bool = False) -> str:
    """Return a text. A query is never empty; a passage may be, as in a collection."""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise refused(place, f"{name} {shown(value)}", "a text", "write the text, or remove the row")
    return value


def checked_list(place: str, name: str, value: Any) -> list[Any]:
    """Return a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise refused(place, f"{name} {shown(value)}", "a list of at least one item", "write the list, or remove the row")
    return value


def checked_score(place: str, of: str, value: Any) -> float:
    """Return a score that float32 can hold; ``of`` says whose it is. A missing one is refused, whatever stands for it."""
    if value is None:
        raise refused(place, f"no score of {of}", "one for each passage", "score it first; a missing score is never 0 here")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
        raise refused(place, f"score {shown(value)} of {of}", "a finite float32", "correct the score, or remove the row")
    return float(value)


def checked_scores(place: str, name: str, values: Any, passages: Sequence[str]) -> list[float]:
    """Return one score per passage, in order; ValueError if one is missing, left over or not finite."""
    if values is None:
        raise refused(place, f"no {name}", "one score for each passage", "score them first; a missing score is never 0 here")
    if not isinstance(values, list) or len(values) != len(passages):
        found = f"{len(values)} {name}" if isinstance(values, list) else f"{name} {shown(values)}"
        raise refused(place, f"{found} for {len(passages)} passages", "one for each", "score the missing ones first")
    return [checked_score(place, f"passage {shown(passage)}", value) for passage, value in zip(passages, values, strict=True)]
