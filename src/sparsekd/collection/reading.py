"""Lines, JSON objects and TSV rows of a UTF-8 text file, with the line number each came from.

Promises: a line ends at ``\\n`` only (U+2028 stays in the text); CRLF, a byte-order mark and blank lines are accepted; TSV has
no quoting; values arrive as written. Anything else is a ValueError ``file:line: found ..., expected ...; what to do``, never a
repaired or skipped line. Streams: one line in memory at a time.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from json.decoder import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, NoReturn, TypeVar

MAX_DEPTH = 64
"""Nesting of a JSON line; real metadata stays below 10, and a parser recursing 10,000 deep overflows the C stack."""

MAX_BITS = 10_000
"""Length of an integer that is written out: Python refuses decimals beyond 4,300 digits, which take 14,285 bits."""

_Record = TypeVar("_Record", dict[str, Any], list[Any])

_BLANK = " \t"
# A string (possessive, the closing quote optional: linear on any input) or one bracket.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _Malformed(ValueError):
    """What is wrong with a line; the place is added where it is known."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy


def refusal(path: Path, line: int, found: str, expected: str, remedy: str) -> ValueError:
    """Return the error for one malformed line.

    >>> str(refusal(Path("qrels/dev.tsv"), 7, "grade 'x'", "an integer", "correct the line"))
    "qrels/dev.tsv:7: found grade 'x', expected an integer; correct the line"
    """
    return ValueError(f"{path}:{line}: found {found}, expected {expected}; {remedy}")


def shown(value: object) -> str:
    """Return ``value`` for a message: escaped, so it cannot drive a terminal, and cut to 60 characters, whatever it holds."""
    text = repr(value[:80]) if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of every line that is not blank.

    Raises FileNotFoundError if there is no such file, ValueError at the first line that is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a UTF-8 text file")
    with path.open("rb") as stream:  # binary: a text stream would also split at a lone \r
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                text = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{raw[error.start]:02x} at position {error.start} of the line ({error.reason})"
                raise refusal(path, number, found, "UTF-8", "convert the file, e.g. with iconv -t UTF-8") from error
            if text.strip(_BLANK):
                yield number, text


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON Lines file; ValueError at the first line that is not one sound object.

    Refused beyond broken syntax: a key given twice in one object, NaN and infinite numbers (``1e999`` too), lone surrogates,
    nesting deeper than MAX_DEPTH (checked before parsing), and a file without rows.
    """
    yield from _json_lines(path, dict, "object", "{...}")


def json_arrays(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """Yield (line number, array) of a file with one JSON array per line; refuses what ``json_objects`` refuses."""
    yield from _json_lines(path, list, "array", "[...]")


def tsv_rows(path: Path, header: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of a tab-separated file after its header; a quote is a character like any other.

    Raises ValueError if the header is not ``header``, a row has another number of columns, or there are no rows.
    """
    rows, has_header = 0, False
    for number, text in text_lines(path):
        columns = text.split("\t")
        if not has_header:
            if tuple(columns) != header:
                raise refusal(path, number, shown(text), f"the header {'<TAB>'.join(header)}", "add it as the first line")
            has_header = True
            continue
        if len(columns) != len(header):
            found = f"{len(columns)} tab-separated columns in {shown(text)}"
            raise refusal(path, number, found, f"{len(header)} ({', '.join(header)})", "correct the line")
        rows += 1
        yield number, columns
    if rows == 0:
        raise ValueError(f"{path}: 0 rows, expected at least one below the header {'<TAB>'.join(header)}; write the file again")


def _json_lines(path: Path, kind: type[_Record], name: str, brackets: str) -> Iterator[tuple[int, _Record]]:
    number = 0
    for number, text in text_lines(path):
        try:
            record = _parsed(text, name)
            if not isinstance(record, kind):
                found = f"a JSON {type(record).__name__} {shown(record)}"
                raise _Malformed(found, f"a JSON {name}", f"put each row in {brackets}")
        except _Malformed as error:
            raise refusal(path, number, error.found, error.expected, error.remedy) from error
        yield number, record
    if number == 0:
        raise ValueError(f"{path}: 0 rows, expected one JSON {name} per line; write the file again")


def _parsed(text: str, name: str) -> Any:
    """The one value of a JSON line, which is to be an object or array (``name``); _Malformed if it is broken."""
    if _depth(text) > MAX_DEPTH:
        raise _Malformed(f"nesting deeper than {MAX_DEPTH}", f"at most {MAX_DEPTH} levels", "flatten the object")
    try:
        record = _DECODER.decode(text)
    except JSONDecodeError as error:
        found = f"broken JSON ({error.msg} at character {error.pos + 1}: {shown(text[error.pos :])})"
        raise _Malformed(found, f"one JSON {name} per line", "correct or remove the line") from error
    except _Malformed:
        raise
    except ValueError as error:  # an integer beyond Python's limit of 4,300 digits
        raise _Malformed(str(error), "a number of at most 4300 digits", "write it as a string") from error
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(record)
    return record


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, or an upper bound no larger than MAX_DEPTH, without recursion."""
    brackets = text.count("{") + text.count("[")
    if brackets <= MAX_DEPTH:  # nearly every line: two counts instead of a scan
        return brackets
    depth = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = text[match.start()]
        if first in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "}]":
            depth -= 1
    return deepest


def _refuse_lone_surrogates(record: Any) -> None:
    """An escaped pair (an emoji) is one character after parsing; half a pair cannot be written as UTF-8."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"lone surrogate U+{ord(error.object[error.start]):04X}"
        raise _Malformed(found, "whole characters", "write both halves of the pair or remove the escape") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Malformed(f"key {shown(twice)} twice in one object", "each key once", "keep the right one")
    return record


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise _Malformed(f"number {shown(literal)} beyond float64", "a finite number", "correct or remove it")
    return number


def _no_constant(literal: str) -> NoReturn:
    raise _Malformed(f"number {literal}", "a finite number", "correct or remove it")


class _Repr(reprlib.Repr):
    """repr that ends: of 10,000 levels, of a container that holds itself twice a level, of an integer too long for decimals."""

    def __init__(self) -> None:
        super().__init__()
        # No more than the 60 characters of a message can show.
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset, self.maxfrozenset = 3, 12, 12, 12, 12, 12
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= MAX_BITS else f"an integer of {x.bit_length():,} bits"


_REPR = _Repr()
_DECODER = JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)
