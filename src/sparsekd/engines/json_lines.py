"""Rows as lines of JSON. Numbers are written with all digits of the float32 in float64: who reads them has the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekd.engines.vectors import Row

TERMS_FILE = "terms.json"
"""Name of each dim, in order: what a query's vector must call it."""


def json_line(value: Any) -> str:
    """Return ``value`` on one line, without a newline."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def named(row: Row, names: Sequence[str]) -> dict[str, float]:
    """Return {name of the dim: weight}."""
    return {names[dim]: weight for dim, weight in zip(row.dims.tolist(), row.weights.tolist(), strict=True)}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, each with its newline, the last too."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def write_terms(folder: Path, names: Sequence[str]) -> None:
    """Write the dims' names."""
    write_lines(folder / TERMS_FILE, [json_line(list(names))])


def write_queries(path: Path, rows: Iterable[Row], names: Sequence[str]) -> None:
    """Write ``{"id": …, "vector": {name: weight}}`` lines."""
    write_lines(path, (json_line({"id": row.text_id, "vector": named(row, names)}) for row in rows))


def write_numbered(folder: Path, stem: str, suffix: str, pieces: Iterable[str], max_bytes: int) -> None:
    """Write pieces, each one or more whole lines, to ``stem-00000suffix`` and on, a new file before ``max_bytes`` are passed."""
    for number, group in enumerate(_groups(pieces, max_bytes)):
        write_lines(folder / f"{stem}-{number:05}{suffix}", group)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, indented, for a person to read before it is sent."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _groups(pieces: Iterable[str], max_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for piece in pieces:
        num_bytes = len(piece.encode("utf-8")) + 1
        if group and size + num_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += num_bytes
    if group:
        yield group
