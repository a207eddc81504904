"""What TOML can write and no recipe means, refused by its place before any model sees it.

TOML's integers are of 64 bits, but Python's reader takes any; its strings may hold NUL, which no path and no tokenizer takes; an
override from the command line may hold bytes that are no text; and tables nest without end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 16
"""Levels of a recipe's values; its own sections have 5."""
_INT64 = range(-(2**63), 2**63)


def refuse_odd_values(document: dict[str, Any]) -> None:
    """Raise ValueError, naming the dotted key, for what no section of a recipe can hold."""
    for keys, value in _leaves(document, ()):
        problem = _problem(value)
        if problem is not None:
            raise ValueError(f"[{'.'.join(keys[:-1]) or 'top level'}] {keys[-1]}: {problem}")


def key_shown(key: str) -> str:
    """Return a key as messages write it: bare where TOML would, else escaped, so that it cannot drive a terminal, and cut.

    >>> key_shown("learning_rate"), key_shown("a\\nb")
    ('learning_rate', "'a\\\\nb'")
    """
    return key if key.isprintable() and len(key) <= 60 else repr(key[:57])


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (keys that lead there, value) of everything that is no table or list, and of what lies too deep, unopened."""
    if isinstance(value, dict | list) and len(keys) < MAX_DEPTH:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, (*keys, key_shown(str(key))))
    elif keys:
        yield keys, value


def _problem(value: Any) -> str | None:
    if isinstance(value, dict | list):
        return f"nests deeper than {MAX_DEPTH} levels; expected a value or a table of values"
    if isinstance(value, int) and value not in _INT64:
        return f"an integer of {value.bit_length():,} bits; expected at most 64, as TOML has them"
    if isinstance(value, str):
        if "\x00" in value:
            return f"a text with NUL at character {value.index(chr(0)) + 1}; expected none"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "a text that is not Unicode; expected UTF-8"
    return None
