"""Every layout's rows, read one by one and checked: each is whole, its scores finite, its place known.

Nothing is looked up in a collection here, so ids may be unknown and texts new. Files are read in the order of their names. A TREC
run or TSV whose last line has no line end is refused: it may be cut in the middle of a number.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsekd.collection.reading import json_arrays, json_objects, shown, text_lines
from sparsekd.collection.trec import trec_run_lines
from sparsekd.exchange.layouts import Layout
from sparsekd.exchange.rows import Row, checked_id, checked_list, checked_score, checked_scores, checked_text, refused
from sparsekd.exchange.score_dict import read_score_dict
from sparsekd.exchange.tabular import find_files, tabular_rows

LABEL_COLUMNS = ("scores", "score", "labels", "label")
"""What sentence-transformers' trainer takes as the label; its other columns count by order."""


def read_rows(layout: Layout, path: Path) -> Iterator[Row]:
    """Yield the rows of a file, or of the layout's files in a folder.

    Raises FileNotFoundError, and ValueError naming file, line and what to do at the first row that is not one.
    """
    if layout.name == "pylate":
        yield from _pylate(layout, path)
        return
    for file in find_files(path, layout.stem, layout.endings):
        yield from _READERS[layout.name](file)


def margins_refused(place: str) -> ValueError:
    """Return the error for margins where scores are needed."""
    return refused(
        place,
        "margins, gold_sim(positive) − gold_sim(negative)",
        "a score of each passage: neither one follows from their difference, and the bank holds scores of pairs",
        "export the scores themselves, or import margins as the table they are: sparsekd import margins ... --to table",
    )


def _n_tuples(path: Path) -> Iterator[Row]:
    for place, record in tabular_rows(path):
        label = next((name for name in LABEL_COLUMNS if name in record), None)
        values = [(name, value) for name, value in record.items() if name != label]
        texts = [checked_text(place, name, value, may_be_empty=column > 0) for column, (name, value) in enumerate(values)]
        if len(texts) < 2:
            raise refused(place, f"columns {_names(record)}", "a query, a positive, negatives and scores", "add the columns")
        scores = None if label is None else record[label]
        width = len(scores) if isinstance(scores, list) else 1
        if scores is not None and len(texts) > 2 and width == len(texts) - 2:
            raise margins_refused(place)
        if scores is not None and not isinstance(scores, list):
            scores = [scores]
        yield Row(place, texts[0], texts[1:], checked_scores(place, label or "scores", scores, texts[1:]))


def _margins(path: Path) -> Iterator[Row]:
    names = ("query_id", "positive_id", "negative_id")
    for place, record in tabular_rows(path):
        label = next((name for name in (*LABEL_COLUMNS, "margin") if name in record), None)
        if label is None or any(name not in record for name in names):
            expected = f"{', '.join(names)} and score"
            raise refused(place, f"columns {_names(record)}", expected, "rename the columns")
        query_id, positive_id, negative_id = (checked_id(place, name, record[name]) for name in names)
        margin = checked_score(place, f"the margin over {shown(negative_id)}", record[label])
        yield _triple(place, query_id, positive_id, negative_id, [margin])


def _names(record: dict[str, Any]) -> str:
    """Return a row's columns for a message, escaped where a name could drive a terminal."""
    return ", ".join(name if name.isprintable() and len(name) <= 40 else shown(name) for name in record)


def _msmarco_triples(path: Path) -> Iterator[Row]:
    _require_line_end(path)
    for line, text in text_lines(path):
        place, columns = f"{path}:{line}", text.split("\t")
        if len(columns) != 3 or not all(columns):
            found = f"{len(columns)} tab-separated columns in {shown(text)}"
            raise refused(place, found, "3 (query_id, positive_id, negative_id)", "correct the line")
        query_id, positive_id, negative_id = columns
        yield _triple(place, query_id, positive_id, negative_id, [])


def _triple(place: str, query_id: str, positive_id: str, negative_id: str, scores: list[float]) -> Row:
    if positive_id == negative_id:
        raise refused(place, f"passage {shown(positive_id)} as positive and negative", "two passages", "remove the row")
    return Row(place, query_id, [positive_id, negative_id], scores)


def _flagembedding(path: Path) -> Iterator[Row]:
    for line, record in json_objects(path):
        place = f"{path}:{line}"
        query, passages, scores = checked_text(place, "query", record.get("query")), [], []
        for side in ("pos", "neg"):
            texts = checked_list(place, side, record.get(side)) if side == "pos" or record.get(side) else []
            texts = [checked_text(place, side, text, may_be_empty=True) for text in texts]
            values = record.get(f"{side}_scores")
            passages += texts
            scores += checked_scores(place, f"{side}_scores", values, texts) if texts or values else []
        yield Row(place, query, passages, scores)


def _tevatron(path: Path) -> Iterator[Row]:
    for line, record in json_objects(path):
        place = f"{path}:{line}"
        query, passages, scores = checked_text(place, "query", record.get("query")), [], []
        for side in ("positive_passages", "negative_passages"):
            for passage in checked_list(place, side, record[side]) if record.get(side) else []:
                if not isinstance(passage, dict):
                    raise refused(place, f"{side} {shown(passage)}", '{"docid": ..., "title": ..., "text": ...}', "correct it")
                title, text = (
                    checked_text(place, f"{key} in {side}", value, may_be_empty=True)
                    for key, value in (("title", passage.get("title") or ""), ("text", passage.get("text")))
                )
                passages.append(" ".join(part for part in (title, text) if part))  # as a collection joins them
                docid = f"docid {shown(passage.get('docid'))} in {side}"
                scores.append(checked_score(place, docid, passage.get("score")))
        if not passages:
            raise refused(place, "no passage", "positive_passages or negative_passages", "add them, or remove the line")
        yield Row(place, query, passages, scores)


def _pylate(layout: Layout, path: Path) -> Iterator[Row]:
    """Rows of ids, and the texts that its own two other tables give them."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected PyLate's train, queries and documents in one folder")
    queries = _texts_of(path, "queries", "query_id", layout)
    documents = _texts_of(path, "documents", "document_id", layout)
    for file in find_files(path, layout.stem, layout.endings):
        for place, record in tabular_rows(file):
            query_id = checked_id(place, "query_id", record.get("query_id"))
            ids = checked_list(place, "document_ids", _listed(place, "document_ids", record.get("document_ids")))
            document_ids = [checked_id(place, "document_ids", value) for value in ids]
            scores = checked_scores(place, "scores", _listed(place, "scores", record.get("scores")), document_ids)
            texts = [_known(place, "document_id", value, documents, "documents") for value in document_ids]
            yield Row(place, _known(place, "query_id", query_id, queries, "queries"), texts, scores)


def _texts_of(folder: Path, stem: str, id_name: str, layout: Layout) -> dict[str, str]:
    texts: dict[str, str] = {}
    for file in find_files(folder, stem, layout.endings):
        for place, record in tabular_rows(file):
            text_id = checked_id(place, id_name, record.get(id_name))
            text = checked_text(place, "text", record.get("text"), may_be_empty=stem == "documents")
            if texts.setdefault(text_id, text) != text:
                raise refused(place, f"{id_name} {shown(text_id)} again with another text", "each once", "rename or remove one")
    return texts


def _listed(place: str, name: str, value: Any) -> Any:
    """Return a list, also from its text: published files hold ``"[1, 2]"`` as JSON or as Python writes it."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value)
    try:
        return ast.literal_eval(value)  # literals only: numbers, strings and lists of them
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise refused(place, f"{name} {shown(value)}", "a list, or the text of one", "correct the row") from error


def _known(place: str, name: str, text_id: str, texts: dict[str, str], table: str) -> str:
    if text_id not in texts:
        raise refused(place, f"{name} {shown(text_id)}", f"an id of {table}", "add its text there, or remove the row")
    return texts[text_id]


def _trec_run(path: Path) -> Iterator[Row]:
    _require_line_end(path)
    line = 0
    for line, query_id, passage_id, score in trec_run_lines(path):
        yield Row(f"{path}:{line}", query_id, [passage_id], [score])
    if not line:
        raise ValueError(f"{path}: 0 rows, expected at least one line of a run; write the file again")


def _colbert(path: Path) -> Iterator[Row]:
    for line, record in json_arrays(path):
        place = f"{path}:{line}"
        if len(record) < 2:
            raise refused(place, shown(record), "[query_id, [passage_id, score], ...]", "add the passages, or remove the line")
        query_id, passages, scores = checked_id(place, "query_id", record[0]), [], []
        for item in record[1:]:
            if not isinstance(item, list) or len(item) != 2:
                raise refused(place, shown(item), "[passage_id, score]", "score it first; a missing score is never 0 here")
            passages.append(checked_id(place, "passage_id", item[0]))
            scores.append(checked_score(place, f"passage {shown(passages[-1])}", item[1]))
        yield Row(place, query_id, passages, scores)


def _require_line_end(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        if stream.read(1) != b"\n":
            raise ValueError(f"{path}: its last line has no line end, so the file may be cut; copy it again, or end the line")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "n-tuples": _n_tuples,
    "margins": _margins,
    "score-dict": read_score_dict,
    "flagembedding": _flagembedding,
    "tevatron": _tevatron,
    "trec-run": _trec_run,
    "colbert": _colbert,
    "msmarco-triples": _msmarco_triples,
}
