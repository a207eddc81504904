"""Figures and rows as text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FIGURE = re.compile(r"([\d,.]+( [kMGT]?B)?)?")


def size(num_bytes: int) -> str:
    """Return bytes with three significant digits.

    >>> size(1_234_567)
    '1.23 MB'
    """
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def printable(text: str) -> str:
    """Return ``text`` with what a terminal would obey escaped: names in a shared bank are other people's.

    >>> printable("é\\x1b[31m")
    'é\\\\x1b[31m'
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned, printable columns; columns of figures align right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    is_figure = [all(_FIGURE.fullmatch(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, is_figure, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
