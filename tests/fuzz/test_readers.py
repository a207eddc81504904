"""Files that were right before something happened to them: every reader reads them or refuses them by name, within a second.

An example is a whole file after one to five mutations: cut, flipped bit, slice deleted or doubled, hostile token put in or put in a
field's place, fields or lines swapped. `make test` tries 200 of each reader; the slow tests 10,000, and print the row that
docs/reliability.md keeps. The examples are the same in every run: drawn by `random`, as Hypothesis takes four times as long to
draw one as a reader takes to read it. A failure says the bytes of its file.
"""

from __future__ import annotations

import gzip
import json
import math
import pickle
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsekd.collection import read_collection
from sparsekd.evaluation.runs import read_trec_run
from sparsekd.exchange.layouts import LAYOUTS
from sparsekd.exchange.readers import read_rows
from sparsekd.recipe import load_recipe

FEW, MANY = 200, 10_000
LIMIT_SECONDS = 1.0

# What one word of a file may become.
TOKENS: list[bytes] = [
    *(b"", b" ", b"\t", b"\n", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b'"', b"\\", b"'"),
    *(rb'"\ud800"', rb'"\u0000"', b"NaN", b"-Infinity", b"1e999", b"1_000", b"-0", b"0x10", b"9" * 5000, b"1" * 400, b"-1"),
    *(b"null", b"true", b'""', b'"NA"', b"None", b"007", b'"../../x"', b"-rf", b'"' + b"x" * 300 + b'"', b"[]", b"{}"),
    *(b"[" * 100, b"[" * 10_000, b'{"a":' * 70, b"]" * 100, b'{"a":1,"a":2}', b"a.a." * 400, b"=", b"[[", b"#", b"p1", b"p2"),
    *(b"\x1b[31m", b"\x85" * 500, b"\x93", b"R", b"c__builtin__\neval\n", b"r\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8),
]
WORD = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s,:\[\]{}"=]+')


def _lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _mutated(content: bytes, seed: bytes) -> bytes:
    """Apply a mutation for each six bytes of ``seed``: what, with which token, where (two bytes), how far (two bytes)."""
    for start in range(0, len(seed) - 5, 6):
        kind, token = seed[start] % 9, TOKENS[seed[start + 1] % len(TOKENS)]
        at = int.from_bytes(seed[start + 2 : start + 4], "big") * (len(content) + 1) >> 16
        length = int.from_bytes(seed[start + 4 : start + 6], "big") % 40
        content = _mutation(content, kind, token, at, length)
    return content


def _mutation(content: bytes, kind: int, token: bytes, at: int, length: int) -> bytes:
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + 1 + length :]
    if kind == 2:
        return content[:at] + content[at : at + length] + content[at:]
    if kind == 3:
        return content[:at] + token + content[at:]
    if kind == 4:
        return content[:at] + bytes([byte ^ 1 << length % 8 for byte in content[at : at + 1]]) + content[at + 1 :]
    if kind == 5:
        rows = content.split(b"\n")
        here, there = at % len(rows), length % len(rows)
        rows[here], rows[there] = rows[there], rows[here]
        return b"\n".join([*rows, *rows[:1]] if length > 20 else rows)
    words = list(WORD.finditer(content))
    if not words:
        return content + token
    here, there = words[at % len(words)], words[length % len(words)]
    if kind == 6 or here.start() >= there.start():
        return content[: here.start()] + token + content[here.end() :]
    middle = content[here.end() : there.start()]
    return content[: here.start()] + there[0] + middle + here[0] + content[there.end() :]


CORPUS = _lines({"_id": "p1", "title": "Tea", "text": "hot"}, {"_id": "p2", "text": "cold"}, {"_id": 7, "text": "a \u2028 b"})
QUERIES = _lines({"_id": "q1", "text": "what is hot"}, {"_id": "q2", "text": "what is cold"})
COLLECTION = {
    "corpus.jsonl": CORPUS,
    "queries.jsonl": QUERIES,
    "qrels/train.tsv": b"query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp2\t2\nq2\t7\t0\n",
}
RECIPE = b"""[collection]
path = "c"
[mining]
miners = [{ kind = "bm25", quota = 4 }, { kind = "dense", model = "m", quota = 2, query_prompt = "q: " }]
[mining.filter]
absolute_margin = 1.5
[[teachers]]
name = "t"
kind = "cross-encoder"
model = "m"
[labels]
calibration = { kind = "affine", mean = 1.0, std = 2 }
[labels.weights]
t = 1.0
[student]
model = "s"
[training]
seed = 7
"""
TUPLES = {"anchor": "q", "positive": "p", "negative": "n", "scores": [7.5, -1.25]}
PASSAGE = {"docid": "p", "title": "t", "text": "p", "score": 7.5}
PYLATE = {
    "train.jsonl": _lines({"query_id": "q1", "document_ids": ["d1", "d2"], "scores": "[1.5, 2.0]"}),
    "queries.jsonl": _lines({"query_id": "q1", "text": "q"}),
    "documents.jsonl": _lines(*({"document_id": name, "text": name} for name in ("d1", "d2"))),
}
RUN = b"q1 Q0 p1 1 2.5 t\nq1 Q0 p2 2 1e-3 t\nq2 Q0 p1 1 -3 t\n"
SCORES = {"q1": {"p1": 1.5, "p2": -2}, 7: {"p1": 0.25}}


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


# Layout and the file's name, and what it holds.
FILES: dict[tuple[str, str], bytes] = {
    ("n-tuples", "train.jsonl"): _lines(TUPLES, TUPLES),
    ("n-tuples", "train.arrow"): _arrow([TUPLES] * 3),
    ("n-tuples", "train.parquet"): _parquet([TUPLES] * 3),
    ("margins", "train.jsonl"): _lines(*[{"query_id": "q", "positive_id": "p", "negative_id": "n", "score": 8.75}] * 2),
    ("score-dict", "scores.pkl"): pickle.dumps(SCORES, protocol=4),
    ("score-dict", "scores.pkl.gz"): gzip.compress(pickle.dumps(SCORES, protocol=2), mtime=0),
    ("flagembedding", "train.jsonl"): _lines(
        *[{"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [7.5], "neg_scores": [-1]}] * 2
    ),
    ("tevatron", "train.jsonl"): _lines(
        *[{"query": "q", "positive_passages": [PASSAGE], "negative_passages": [{**PASSAGE, "docid": "n"}]}] * 2
    ),
    ("trec-run", "run.trec"): RUN,
    ("colbert", "nway.jsonl"): _lines(["q1", ["p1", 1.5], ["p2", 2]], [7, ["p1", 0.5]]),
    ("msmarco-triples", "triples.tsv"): b"q1\tp1\tp2\nq1\tp1\tp3\nq2\tp2\tp1\n",
    ("pylate", "train.jsonl"): PYLATE["train.jsonl"],
    ("pylate", "documents.jsonl"): PYLATE["documents.jsonl"],
}


class Reader:
    """One file of a folder of its own, mutated; ``read`` returns whether it came past the first line, or raises."""

    def __init__(self, folder: Path, files: dict[str, bytes], name: str, read: Callable[[Path], bool]) -> None:
        for other, content in files.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        self.path, self.whole, self._read, self.folder = folder / name, files[name], read, folder
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        assert read(self.path), "the file is not right to begin with"

    def check(self, seed: bytes) -> None:
        content = _mutated(self.whole, seed)
        self.path.unlink()  # ext4 flushes a file that is truncated and written again: 18 ms
        self.path.write_bytes(content)
        try:
            self._check_outcome()
        except BaseException as error:
            error.add_note(f"{self.path.name} held {content!r}")
            raise

    def _check_outcome(self) -> None:
        said, is_past, seconds = self._outcome()
        if seconds > LIMIT_SECONDS:  # a machine that others share counts some of their time as ours, but not twice
            said, is_past, seconds = self._outcome()
        assert seconds < LIMIT_SECONDS
        # A refusal names a file; one line of a recipe's for each thing that is wrong.
        assert all(line.startswith(str(self.folder)) and line.isprintable() for line in said.split("\n") if said)
        found = re.search(r":(?: row )?(\d+): ", said)
        is_past = is_past or (found is not None and int(found[1]) > 1)
        is_past = is_past or (self.path.suffix == ".toml" and "valid TOML" not in said)
        self.counts.update(examples=1, read=not said, past=is_past)
        self.slowest = max(self.slowest, seconds)

    def _outcome(self) -> tuple[str, bool, float]:
        """Return the refusal or "", whether all was read, and seconds of CPU time."""
        began = time.process_time()
        try:
            return "", self._read(self.path), time.process_time() - began
        except (ValueError, FileNotFoundError) as error:
            return str(error), False, time.process_time() - began


def _read_collection(path: Path) -> bool:
    folder = path.parent.parent if path.suffix == ".tsv" else path.parent
    collection = read_collection(folder)
    assert all(max(grades.values()) >= 1 for grades in collection.qrels["train"].values())
    return True


def _read_run(path: Path) -> bool:
    assert all(math.isfinite(score) for ranking in read_trec_run(path).values() for score in ranking.scores)
    return True


def _read_layout(name: str) -> Callable[[Path], bool]:
    def read(path: Path) -> bool:
        for row in read_rows(LAYOUTS[name], path.parent if name == "pylate" else path):
            assert row.query
            assert all(math.isfinite(score) for score in row.scores)
            assert len(row.scores) == {"scores": len(row.passages), "margins": 1, "nothing": 0}[LAYOUTS[name].carries]
        return True

    return read


def make_reader(name: str, folder: Path) -> Reader:
    if name in COLLECTION:
        return Reader(folder, COLLECTION, name, _read_collection)
    if name == "recipe.toml":
        return Reader(folder, {name: RECIPE}, name, lambda path: bool(load_recipe(path)))
    if name == "run":
        return Reader(folder, {name: RUN}, name, _read_run)
    layout, file = name.split(" ")
    files = PYLATE if layout == "pylate" else {file: FILES[layout, file]}
    return Reader(folder, files, file, _read_layout(layout))


NAMES = [*COLLECTION, "recipe.toml", "run", *(" ".join(key) for key in FILES)]


def fuzz(reader: Reader, num_examples: int) -> None:
    """Check files of one to five mutations, as many of each."""
    draw = random.Random(reader.path.name)
    for _ in range(num_examples):
        reader.check(draw.randbytes(6 * draw.randint(1, 5)))


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_file_is_read_or_refused_by_name_within_a_second(name: str, tmp_path: Path) -> None:
    reader = make_reader(name, tmp_path)

    fuzz(reader, FEW)

    assert 0 < reader.counts["read"] < reader.counts["examples"] == FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_mutated_files_are_read_or_refused_by_name_within_a_second(name: str, tmp_path: Path) -> None:
    reader, began = make_reader(name, tmp_path), time.process_time()

    fuzz(reader, MANY)

    counts = reader.counts
    past, slowest = f"{counts['past'] / counts['examples']:.0%}", f"{1000 * reader.slowest:.0f}"
    print(f"| {name} | {counts['examples']:,} | {counts['read']:,} | {past} | {slowest} | {time.process_time() - began:.0f} |")
    assert counts["examples"] == MANY
