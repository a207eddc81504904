"""The table of layouts in docs/formats.md says what the code does; its example lines are read."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekd.exchange.layouts import LAYOUTS
from sparsekd.exchange.readers import read_rows

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "formats.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (ids|texts) \| (\w+) \| (bank|table) \| (`.*`): ([a-z_, ]+) \| `(.*)` \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """Cells by layout."""
    return {name: cells for name, *cells in ROW.findall(DOCUMENT.read_text(encoding="utf-8"))}


def test_every_layout_has_its_row(rows: dict[str, list[str]]) -> None:
    assert list(rows) == list(LAYOUTS)
    for name, (refers_to, carries, goes_to, files, kinds, _) in rows.items():
        layout = LAYOUTS[name]
        assert (refers_to, carries) == (layout.refers_to, layout.carries)
        assert goes_to == ("bank" if layout.carries == "scores" else "table")
        assert f"`{layout.file_name}`" in files
        assert tuple(kinds.split(", ")) == layout.kinds


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_example_line_is_read(name: str, rows: dict[str, list[str]], tmp_path: Path) -> None:
    example, layout = rows[name][-1], LAYOUTS[name]
    write: dict[str, Callable[[Path], object]] = {
        "score-dict": lambda folder: (folder / "scores.pkl").write_bytes(pickle.dumps(json.loads(example))),
        "trec-run": lambda folder: (folder / "run.trec").write_text(example + "\n", encoding="utf-8"),
        "msmarco-triples": lambda folder: (folder / "triples.tsv").write_text(example.replace("<TAB>", "\t") + "\n"),
        "colbert": lambda folder: (folder / "nway.jsonl").write_text(example, encoding="utf-8"),
    }
    write.get(name, lambda folder: (folder / "train.jsonl").write_text(example, encoding="utf-8"))(tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"query_id": "q1", "text": "q"}', encoding="utf-8")
    documents = ('{"document_id": "p1", "text": "p"}', '{"document_id": "p2", "text": "n"}')
    (tmp_path / "documents.jsonl").write_text("\n".join(documents), encoding="utf-8")

    [row] = read_rows(layout, tmp_path)

    assert row.query in ("q", "q1")
    assert row.passages[0] in ("p", "p1")
    assert row.scores == {"nothing": [], "margins": [8.75], "scores": [7.5, -1.25][: len(row.passages)]}[layout.carries]
