"""Every layout's file from a table's rows. N passages a row, positive first; M = N − 1 negatives.

Scores are written as the float32 they are: in JSON by all the digits of the same number in float64, so that reading gives the same
bits. Ids are strings; score-dict and colbert write integers where all ids of a side are numbers, as their readers count on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsekd.collection.reading import shown
from sparsekd.evaluation.runs import ranked, write_trec_run
from sparsekd.exchange.layouts import Layout
from sparsekd.exchange.score_dict import write_score_dict
from sparsekd.exchange.source import Source
from sparsekd.exchange.tabular import write_stream
from sparsekd.labels.conversions import margins
from sparsekd.labels.score_table import ScoreTable

_PYLATE_CARD = """---
configs:
- config_name: train
  data_files: train.arrow
- config_name: queries
  data_files: queries.arrow
- config_name: documents
  data_files: documents.arrow
---
"""


def write_layout(layout: Layout, source: Source, folder: Path) -> int:
    """Write the layout's files into ``folder``; return the rows written.

    Raises ValueError where a layout of single pairs cannot hold the table: one pair labelled differently in two rows.
    """
    return _WRITERS[layout.name](source, folder / layout.file_name)


def _n_tuples(source: Source, path: Path) -> int:
    num_negatives = source.table.num_passages - 1
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
    schema = pa.schema([*((name, pa.string()) for name in names), ("scores", pa.list_(pa.float32()))])
    rows = (
        (source.query(query_id), *map(source.passage, passage_ids), scores) for query_id, passage_ids, scores in source.table.rows()
    )
    return write_stream(path, schema, rows)


def _margins(source: Source, path: Path) -> int:
    names = ("query_id", "positive_id", "negative_id")
    schema = pa.schema([*((name, pa.string()) for name in names), ("score", pa.float32())])
    return write_stream(path, schema, _triples(source.table))


def _msmarco_triples(source: Source, path: Path) -> int:
    return _write_lines(path, ("\t".join(triple[:3]) for triple in _triples(source.table)))


def _triples(table: ScoreTable) -> Iterator[tuple[Any, ...]]:
    """Yield (query_id, positive_id, negative_id, margin) of every negative; the margin in float32, None where nothing labels."""
    for query_id, passage_ids, labels in table.rows():
        values: list[Any] = labels
        if table.kind == "score_list":
            values = margins(np.array([labels], dtype=np.float32))[0].tolist()
        elif table.kind == "none":
            values = [None] * (len(passage_ids) - 1)
        for passage_id, value in zip(passage_ids[1:], values, strict=True):
            yield query_id, passage_ids[0], passage_id, value


def _flagembedding(source: Source, path: Path) -> int:
    def line(query_id: str, passage_ids: list[str], scores: list[float]) -> dict[str, Any]:
        texts = [source.passage(passage_id) for passage_id in passage_ids]
        labels = {"pos_scores": scores[:1], "neg_scores": scores[1:]} if scores else {}
        return {"query": source.query(query_id), "pos": texts[:1], "neg": texts[1:], **labels}

    return _write_lines(path, (_json(line(*row)) for row in source.table.rows()))


def _tevatron(source: Source, path: Path) -> int:
    def line(query_id: str, passage_ids: list[str], scores: list[float]) -> dict[str, Any]:
        passages: list[dict[str, Any]] = [
            {"docid": passage_id, "title": "", "text": source.passage(passage_id)} for passage_id in passage_ids
        ]
        for passage, score in zip(passages, scores, strict=bool(scores)):
            passage["score"] = score
        known = {"query_id": query_id, "query": source.query(query_id)}
        return {**known, "positive_passages": passages[:1], "negative_passages": passages[1:]}

    return _write_lines(path, (_json(line(*row)) for row in source.table.rows()))


def _pylate(source: Source, path: Path) -> int:
    train = pa.schema([("query_id", pa.string()), ("document_ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
    texts = source.table.texts()
    for stem, name, ids, text_of in (
        ("queries", "query_id", texts["query"], source.query),
        ("documents", "document_id", texts["passage"], source.passage),
    ):
        schema = pa.schema([(name, pa.string()), ("text", pa.string())])
        write_stream(path.with_name(f"{stem}.arrow"), schema, ((text_id, text_of(text_id)) for text_id in ids))
    path.with_name("README.md").write_text(_PYLATE_CARD, encoding="utf-8")
    return write_stream(path, train, source.table.rows())


def _colbert(source: Source, path: Path) -> int:
    texts = source.table.texts()
    query_of, passage_of = _plain(texts["query"]), _plain(texts["passage"])
    lines = (
        _json([query_of(query_id), *([passage_of(each), score] for each, score in zip(passage_ids, scores, strict=True))])
        for query_id, passage_ids, scores in source.table.rows()
    )
    return _write_lines(path, lines)


def _score_dict(source: Source, path: Path) -> int:
    scores, texts = _score_by_pair(source.table), source.table.texts()
    query_of, passage_of = _plain(texts["query"]), _plain(texts["passage"])
    plain = {
        query_of(query_id): {passage_of(passage_id): score for passage_id, score in by_passage.items()}
        for query_id, by_passage in scores.items()
    }
    write_score_dict(path, plain)
    return sum(map(len, scores.values()))


def _trec_run(source: Source, path: Path) -> int:
    scores = _score_by_pair(source.table)
    rankings = {query_id: ranked(list(by_passage), list(by_passage.values())) for query_id, by_passage in scores.items()}
    write_trec_run(path, rankings, f"sparsekd-{source.table.key}")
    return sum(map(len, scores.values()))


def _score_by_pair(table: ScoreTable) -> dict[str, dict[str, float]]:
    """Return {query_id: {passage_id: label}}; positives of one query share negatives, which must have one label."""
    scores: dict[str, dict[str, float]] = {}
    for query_id, passage_ids, labels in table.rows():
        known = scores.setdefault(query_id, {})
        for passage_id, label in zip(passage_ids, labels, strict=True):
            if known.setdefault(passage_id, label) != label:
                raise ValueError(
                    f"{table.artifact.folder}: query {shown(query_id)}, passage {shown(passage_id)} is labelled "
                    f"{known[passage_id]} in one row and {label} in another (calibration {_calibration(table)}, taken row by row); "
                    "this layout holds one score per pair: export a layout of rows, or a table of another calibration"
                )
    return scores


def _calibration(table: ScoreTable) -> Any:
    """What acted on all teachers' scores, or on each teacher's in order."""
    return table.calibration or [teacher.get("calibration") for teacher in table.teachers]


def _plain(ids: Iterable[str]) -> Callable[[str], str | int]:
    """Return what writes an id: as an integer if all are numbers as Python writes them, else as it is.

    >>> _plain(["7", "12"])("7"), _plain(["7", "012"])("7")
    (7, '7')
    """
    return int if all(text.isascii() and text.isdigit() and str(int(text)) == text for text in ids) else str


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_lines(path: Path, lines: Iterable[str]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for line in lines:
            stream.write(line + "\n")
            count += 1
    return count


_WRITERS: dict[str, Callable[[Source, Path], int]] = {
    "n-tuples": _n_tuples,
    "margins": _margins,
    "score-dict": _score_dict,
    "flagembedding": _flagembedding,
    "tevatron": _tevatron,
    "pylate": _pylate,
    "trec-run": _trec_run,
    "colbert": _colbert,
    "msmarco-triples": _msmarco_triples,
}
