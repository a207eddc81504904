"""The figures of metrics.json as a plain text table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Digits after the point. Measures to the fourth, as papers print them; FLOPS of a good student can be below 0.01.
_DIGITS_BY_COLUMN = {"nDCG@10": 4, "RR@10": 4, "R@100": 4, "query_active_dims": 1, "passage_active_dims": 1, "FLOPS": 3}


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return one line per system, without a newline at the end: bm25, the teachers, the student untrained, after each round before
    the last, and trained; others.

    ``metrics["systems"]``: name -> figure -> number; a figure that a system does not have is shown as ``-``.

    >>> print(metrics_table({"systems": {"bm25": {"nDCG@10": 0.5}}}))
    system  nDCG@10  RR@10  R@100  query_active_dims  passage_active_dims  FLOPS
    bm25     0.5000      -      -                  -                    -      -
    """
    systems: Mapping[str, Mapping[str, float]] = metrics["systems"]
    rows = [["system", *_DIGITS_BY_COLUMN]]
    rows += [[name, *_cells(systems[name])] for name in sorted(systems, key=_place)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _place(name: str) -> tuple[int, str]:
    known = ("bm25", "teacher:", "student:untrained", "student:round-", "student")
    group = next((each for each in ("teacher:", "student:round-") if name.startswith(each)), name)
    return (known.index(group) if group in known else len(known), name)


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [f"{figures[name]:.{digits}f}" if name in figures else "-" for name, digits in _DIGITS_BY_COLUMN.items()]


def _line(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells)
