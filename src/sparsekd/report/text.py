"""Texts as a page may show them: nothing that acts, nothing that says where the machine keeps its files.

Escaping is the templates'; this is what escaping leaves: control characters, which browsers drop or draw as boxes, characters that
turn the direction of what follows, and paths in commands and settings.
"""

from __future__ import annotations

import re
import socket
import unicodedata
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

_CONTROL_PICTURES = 0x2400  # U+2400 SYMBOL FOR NULL and the 31 that follow; U+2421 for DELETE
_KEPT = "\n\t"
# Explicit marks, embeddings, overrides and isolates: right-to-left letters need none of them to be shown in their order.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Two or more components after a root, a home or a drive: `/a/b`, `~/a`, `C:\a\b`. Not inside a word, a URL or a relative path.
_ABSOLUTE = re.compile(r"(?<![\w.:/\\…-])(?:~|[A-Za-z]:(?=\\))?[/\\](?:[^\s/\\'\",;:()\[\]{}=]+[/\\])*([^\s/\\'\",;:()\[\]{}=]*)")


def visible(text: str, limit: int | None = None) -> str:
    """Return ``text`` with control and direction characters made visible, cut to ``limit`` characters with its length said.

    >>> visible("a\\x00b\\u202ec")
    'a␀b⟨U+202E⟩c'
    >>> visible("abcdef", 3)
    'abc… (6 characters)'
    """
    cut = text if limit is None or len(text) <= limit else text[:limit]
    shown = "".join(character if character.isprintable() or character in _KEPT else _picture(character) for character in cut)
    return shown if cut is text else f"{shown}… ({len(text):,} characters)"


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    if code == 0x7F:
        return "\u2421"
    if character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn"):
        return f"⟨U+{code:04X}⟩"
    if character in "\u2028\u2029":
        return "\n"
    return character  # spaces of other widths, joiners that scripts need


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """Return ``text`` with every absolute path cut to its last component, and without this machine's name.

    Where a path ends is a guess if it holds a space; those that are ``known`` are cut whole.

    >>> without_paths("python x.py --set collection.path=/home/me/data/nf a/b ~/c/d.toml")
    'python x.py --set collection.path=…/nf a/b …/d.toml'
    >>> without_paths("read /my data/nf twice", ["/my data/nf"])
    'read …/nf twice'
    """
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, f"…/{PurePath(path).name}")
    shown = _ABSOLUTE.sub(lambda match: f"…/{match[1]}" if len(match[0]) > 1 else match[0], text)
    host = socket.gethostname()
    return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "…", shown) if host else shown


def paths_in(value: Any) -> set[str]:
    """Return the strings of a JSON-able value that are absolute paths.

    >>> sorted(paths_in({"collection": {"path": "/my data/nf"}, "models": ["/m", "a/b"], "note": "of /c"}))
    ['/m', '/my data/nf']
    """
    if isinstance(value, str):
        return {value} if PurePath(value).is_absolute() else set()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {path for part in parts for path in paths_in(part)}


def without_paths_in(value: Any, known: Iterable[str] = ()) -> Any:
    """Return a JSON-able value with ``without_paths`` on every string in it.

    >>> without_paths_in({"path": "/home/me/nf", "note": ["from /a/b"], "n": 1})
    {'path': '…/nf', 'note': ['from …/b'], 'n': 1}
    """
    if isinstance(value, str):
        return without_paths(value, known)
    if isinstance(value, dict):
        return {name: without_paths_in(each, known) for name, each in value.items()}
    return [without_paths_in(each, known) for each in value] if isinstance(value, list | tuple) else value
