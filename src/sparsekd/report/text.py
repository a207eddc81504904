"""Texts as a page may show them: nothing that acts, nothing that says where the machine keeps its files.

Escaping is the templates'; this is what escaping leaves: control characters, which browsers drop or draw as boxes, characters that
turn the direction of what follows, and paths in commands and settings.
"""

from __future__ import annotations

import re
import socket
import unicodedata

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


def without_paths(text: str) -> str:
    """Return ``text`` with every absolute path cut to its last component, and without this machine's name.

    >>> without_paths("python x.py --set collection.path=/home/me/data/nf a/b ~/c/d.toml")
    'python x.py --set collection.path=…/nf a/b …/d.toml'
    """
    shown = _ABSOLUTE.sub(lambda match: f"…/{match[1]}" if len(match[0]) > 1 else match[0], text)
    host = socket.gethostname()
    return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "…", shown) if host else shown
