"""A collection in BEIR layout: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/{train,dev,test}.tsv``.

Promises: ids are strings kept exactly, texts are kept literally, everything left out is counted, and the same bytes and limits
give the same collection. Every malformed line is a ValueError naming file and line. Costs the texts in memory, once; files are
read line by line. Does not tokenize, normalise or truncate.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sparsekd.artifact import sha256_of_file
from sparsekd.collection.reading import json_objects, refusal, shown, tsv_rows

SPLITS = ("train", "dev", "test")
QRELS_HEADER = ("query-id", "corpus-id", "score")

Qrels = dict[str, dict[str, int]]

# Run files and qrels separate columns by whitespace, and trec_eval's C strings end at NUL.
_NOT_IN_IDS = re.compile(r"[\s\x00]")
# ASCII digits; nine of them fit the int32 of trec_eval.
_GRADE = re.compile(r"-?[0-9]{1,9}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collection:
    """Passages, the queries that are used, and their judgements."""

    passages: dict[str, str]
    """passage_id -> text (title, a space, text), in file order."""
    queries: dict[str, str]
    """query_id -> text of every query that some split uses, in file order."""
    qrels: dict[str, Qrels]
    """split -> query_id -> passage_id -> grade, for the splits that have a file; a grade of 1 or more is positive, and every
    query has a positive."""
    counts: dict[str, int]
    """What was kept, merged and left out, by name."""


def read_collection(folder: Path, *, max_passages: int | None = None, max_train_queries: int | None = None) -> Collection:
    """Read and validate a BEIR folder, keeping at most ``max_passages`` and ``max_train_queries``.

    Kept are the passages of smallest sha256(passage_id), the queries that still have a positive passage, and of the train
    queries those of smallest sha256(query_id). Queries without a positive leave their split, counted.
    Raises FileNotFoundError for a missing file, ValueError naming file and line for a malformed one.
    """
    for name, limit in (("max_passages", max_passages), ("max_train_queries", max_train_queries)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, expected 1 or more, or None for all")
    paths = _layout(folder)
    counts: Counter[str] = Counter()
    passages = _read_passages(folder / "corpus.jsonl", counts)
    queries = _read_queries(folder / "queries.jsonl", counts)
    judged = {split: _read_qrels(path, queries, passages, counts) for split, path in paths.items()}
    passages = _keep_passages(passages, max_passages, counts)
    qrels = {split: _keep_judged(split, rows, passages, counts) for split, rows in judged.items()}
    if "train" in qrels:
        qrels["train"] = _keep_train_queries(qrels["train"], max_train_queries, counts)
    used = {query_id for rows in qrels.values() for query_id in rows}
    counts["queries_unused"] = len(queries) - len(used)
    queries = {query_id: text for query_id, text in queries.items() if query_id in used}
    counts["passages"], counts["queries"] = len(passages), len(queries)
    for split, rows in qrels.items():
        counts[f"{split}_queries"] = len(rows)
    summary = dict(sorted(counts.items()))
    _log.info("%s: %s", folder, ", ".join(f"{name} {count}" for name, count in summary.items()))
    return Collection(passages, queries, qrels, summary)


def read_texts(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return (queries, passages), text by id, of everything in a BEIR folder, judged or not; qrels are not read.

    Raises FileNotFoundError for a missing file, ValueError naming file and line for a malformed one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a BEIR collection with corpus.jsonl and queries.jsonl")
    counts: Counter[str] = Counter()
    return _read_queries(folder / "queries.jsonl", counts), _read_passages(folder / "corpus.jsonl", counts)


def stream_passages(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, passage_id, title and text) of a ``corpus.jsonl``, each passage once, holding ids and no texts.

    What ``read_texts`` keeps in the same order; raises what it raises.
    """
    return _each_once(path, _passage_lines(path))


def passage_at(path: Path, offset: int) -> str:
    """Return title and text of the passage whose line begins at byte ``offset`` of a ``corpus.jsonl`` that was found sound."""
    with path.open("rb") as stream:
        stream.seek(offset)
        return _passage_text(path, 0, json.loads(stream.readline()))


def stream_queries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, query_id, text) of a ``queries.jsonl``, each query once, as ``stream_passages`` does."""
    return _each_once(path, _query_lines(path))


def _each_once(path: Path, lines: Iterable[tuple[int, str, str]]) -> Iterator[tuple[int, str, str]]:
    """Leave out texts that come again under the same id; another text under it is an error."""
    digest_by_id: dict[str, int] = {}
    for line, text_id, text in lines:
        num_before, digest = len(digest_by_id), xxhash.xxh3_64_intdigest(text.encode("utf-8"))
        if digest_by_id.setdefault(text_id, digest) != digest:
            raise _again_with_another_text(path, line, text_id)
        if len(digest_by_id) > num_before:
            yield line, text_id, text


def collection_digest(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return {name: sha256 of the file's bytes} for ``names`` such as ``qrels/train.tsv``, without reading them as text."""
    digests = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected it in the collection {folder}{_splits_there(folder, name)}; "
                "check [collection] path"
            )
        digests[name] = sha256_of_file(path)
    return digests


def _splits_there(folder: Path, name: str) -> str:
    """Say, where judgements are missing, which the collection has; nothing for another file."""
    there = [split for split in SPLITS if (folder / "qrels" / f"{split}.tsv").is_file()]
    return f", which has judgements for: {', '.join(there) or 'no split'}" if name.startswith("qrels/") else ""


def _layout(folder: Path) -> dict[str, Path]:
    """{split: its qrels file} of a folder that has what a collection needs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a BEIR collection; check [collection] path, or make data")
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; expected corpus.jsonl, queries.jsonl and qrels/ in a BEIR collection"
            )
    paths = {split: folder / "qrels" / f"{split}.tsv" for split in SPLITS}
    found = {split: path for split, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{folder / 'qrels'}: no judgements; expected at least one of train.tsv, dev.tsv, test.tsv")
    return found


def _read_passages(path: Path, counts: Counter[str]) -> dict[str, str]:
    passages: dict[str, str] = {}
    for line, passage_id, text in _passage_lines(path):
        counts["duplicate_passages_merged"] += _is_again(passages, path, line, passage_id, text)
    counts["empty_passages"] = sum(not text.strip() for text in passages.values())
    return passages


def _passage_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, passage_id, title and text) of every line."""
    for line, record in json_objects(path):
        text = _passage_text(path, line, record)
        yield line, _id(path, line, record), text


def _passage_text(path: Path, line: int, record: Mapping[str, Any]) -> str:
    text = _text(path, line, record, "text")
    if "title" in record:
        text = " ".join(part for part in (_text(path, line, record, "title"), text) if part)
    return text


def _read_queries(path: Path, counts: Counter[str]) -> dict[str, str]:
    queries: dict[str, str] = {}
    for line, query_id, text in _query_lines(path):
        counts["duplicate_queries_merged"] += _is_again(queries, path, line, query_id, text)
    return queries


def _query_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, query_id, text) of every line; an empty text is refused."""
    for line, record in json_objects(path):
        text = _text(path, line, record, "text")
        if not text.strip():
            raise refusal(path, line, f"text {shown(text)}", "a question", "write it, or remove the query here and in qrels/")
        yield line, _id(path, line, record), text


def _is_again(texts: dict[str, str], path: Path, line: int, text_id: str, text: str) -> bool:
    """Add a text; True if it was there already, an error if its id was there with another text."""
    num_before = len(texts)
    if texts.setdefault(text_id, text) != text:
        raise _again_with_another_text(path, line, text_id)
    return len(texts) == num_before


def _again_with_another_text(path: Path, line: int, text_id: str) -> ValueError:
    return refusal(path, line, f"_id {shown(text_id)} again with another text", "each _id once", "rename or remove one")


def _id(path: Path, line: int, record: Mapping[str, Any]) -> str:
    if "_id" not in record:
        raise refusal(path, line, f"keys {shown(sorted(record))}", "the key _id", "add the id as a string")
    value = record["_id"]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # exact at any size
    if not isinstance(value, str) or not value or _NOT_IN_IDS.search(value):
        expected = "a non-empty string (or an integer) without whitespace or NUL"
        raise refusal(path, line, f"_id {shown(value)}", expected, "rename the id here and in qrels/")
    return value


def _text(path: Path, line: int, record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise refusal(path, line, f"keys {shown(sorted(record))}", f"the key {key}", "add it, or remove the line")
    value = record[key]
    if not isinstance(value, str):
        found = f"{key} {shown(value)} ({type(value).__name__})"
        raise refusal(path, line, found, "a string", 'write the text in quotes, "" for none')
    return value


def _read_qrels(path: Path, queries: Mapping[str, str], passages: Mapping[str, str], counts: Counter[str]) -> Qrels:
    qrels: Qrels = {}
    num_rows = 0
    for line, (query_id, passage_id, literal) in tsv_rows(path, QRELS_HEADER):
        num_rows += 1
        for column, text_id, home, known in (
            ("query-id", query_id, "queries.jsonl", queries),
            ("corpus-id", passage_id, "corpus.jsonl", passages),
        ):
            if text_id not in known:
                found, expected = f"{column} {shown(text_id)}", f"an _id of {path.parent.parent / home}"
                raise refusal(path, line, found, expected, "ids must agree character by character")
        grade = _grade(path, line, literal)
        if grade >= 1 and not passages[passage_id].strip():
            found = f"passage {shown(passage_id)}, whose text is empty, judged relevant"
            raise refusal(path, line, found, "text to find", "remove the judgement or write the passage's text")
        known_grade = qrels.setdefault(query_id, {}).setdefault(passage_id, grade)
        if known_grade != grade:
            found = f"grade {grade} for {shown(query_id)} and {shown(passage_id)}, graded {known_grade} above"
            raise refusal(path, line, found, "one grade per pair", "keep the right line")
    counts["duplicate_judgements_merged"] += num_rows - _num_judgements(qrels)
    return qrels


def _grade(path: Path, line: int, literal: str) -> int:
    if not _GRADE.fullmatch(literal):
        found, remedy = f"score {shown(literal)}", "write 0 for not relevant, 1 or more for relevant"
        raise refusal(path, line, found, "an integer grade of at most 9 digits", remedy)
    return int(literal)


def _keep_passages(passages: dict[str, str], limit: int | None, counts: Counter[str]) -> dict[str, str]:
    kept = _smallest(passages, limit)
    counts["passages_left_out"] = len(passages) - len(kept)
    return {passage_id: text for passage_id, text in passages.items() if passage_id in kept}


def _keep_judged(split: str, qrels: Qrels, passages: Mapping[str, str], counts: Counter[str]) -> Qrels:
    """Judgements of passages that are kept, for the queries that still have a positive one."""
    kept = {}
    for query_id, grades in qrels.items():
        present = {passage_id: grade for passage_id, grade in grades.items() if passage_id in passages}
        if any(grade >= 1 for grade in present.values()):
            kept[query_id] = present
    counts[f"{split}_queries_without_positive"] = len(qrels) - len(kept)
    counts[f"{split}_judgements_left_out"] = _num_judgements(qrels) - _num_judgements(kept)
    return kept


def _keep_train_queries(qrels: Qrels, limit: int | None, counts: Counter[str]) -> Qrels:
    kept = _smallest(qrels, limit)
    counts["train_queries_left_out"] = len(qrels) - len(kept)
    return {query_id: grades for query_id, grades in qrels.items() if query_id in kept}


def _num_judgements(qrels: Qrels) -> int:
    return sum(map(len, qrels.values()))


def _smallest(ids: Iterable[str], limit: int | None) -> set[str]:
    """The ``limit`` ids of smallest sha256: a random sample that stays nested when the limit grows."""
    if limit is None:
        return set(ids)
    return set(heapq.nsmallest(limit, ids, key=lambda text_id: hashlib.sha256(text_id.encode("utf-8")).digest()))
