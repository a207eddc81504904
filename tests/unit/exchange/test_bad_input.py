"""What is no whole file of finite scores of known pairs is refused: exit 2, one message with its place, nothing left behind."""

from __future__ import annotations

import collections
import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from sparsekd.artifact import key_of, publish, read_manifest, write_manifest
from sparsekd.exchange.layouts import LAYOUTS
from sparsekd.exchange.score_dict import read_score_dict
from sparsekd.labels.contract import KIND, Contract, table_schema
from sparsekd.labels.score_table import ScoreTable
from sparsekd.mining.shards import write_shards

Run = Callable[..., Result]

FLAG = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [0.5]}
PASSAGE = {"docid": "d1", "title": "", "text": "p", "score": 1.0}
NO_ZERO = "a missing score is never 0 here"


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def tevatron(**passage: Any) -> dict[str, Any]:
    return {"query_id": "1", "query": "q", "positive_passages": [{**PASSAGE, **passage}], "negative_passages": []}


# layout, the file's bytes, what the message says after the file's path.
CASES: dict[str, tuple[str, bytes, str]] = {
    "an unknown query": (
        "trec-run",
        b"q01 Q0 bread-1 1 2.5 t\nq99 Q0 bread-1 1 2.5 t\n",
        ":2: found query_id 'q99', expected an _id of the collection's queries.jsonl; they must agree character by character; "
        "leave such pairs out, counted, with --skip-unknown",
    ),
    "an unknown passage": (
        "colbert",
        lines(["q01", ["bread-9", 1.0]]),
        ":1: found passage_id 'bread-9', expected an _id of the collection's corpus.jsonl; they must agree character by character; "
        "leave such pairs out, counted, with --skip-unknown",
    ),
    "an unknown query of a dictionary": (
        "score-dict",
        pickle.dumps({"q99": {"bread-1": 1.0}}),
        ": query 'q99': found query_id 'q99', expected an _id of the collection's queries.jsonl; they must agree character by "
        "character; leave such pairs out, counted, with --skip-unknown",
    ),
    "no score of a passage": (
        "tevatron",
        lines(tevatron(), tevatron(score=None)),
        f":2: found no score of docid 'd1' in positive_passages, expected one for each passage; score it first; {NO_ZERO}",
    ),
    "no scores of the negatives": (
        "flagembedding",
        lines({name: value for name, value in FLAG.items() if name != "neg_scores"}),
        f":1: found no neg_scores, expected one score for each passage; score them first; {NO_ZERO}",
    ),
    "too few scores": (
        "flagembedding",
        lines({**FLAG, "neg": ["n", "m"]}),
        ":1: found 1 neg_scores for 2 passages, expected one for each; score the missing ones first",
    ),
    "a null among scores": (
        "flagembedding",
        lines({**FLAG, "neg_scores": [None]}),
        f":1: found no score of passage 'n', expected one for each passage; score it first; {NO_ZERO}",
    ),
    "a passage without a score": (
        "colbert",
        lines(["q01", ["bread-1", 1.0], ["bread-2"]]),
        f":1: found ['bread-2'], expected [passage_id, score]; score it first; {NO_ZERO}",
    ),
    "a bare passage id": (
        "colbert",
        lines(["q01", "bread-1"]),
        f":1: found 'bread-1', expected [passage_id, score]; score it first; {NO_ZERO}",
    ),
    "no label column": (
        "n-tuples",
        lines({"anchor": "q", "positive": "p", "negative": "n"}),
        f":1: found no scores, expected one score for each passage; score them first; {NO_ZERO}",
    ),
    "NaN in JSON": (
        "flagembedding",
        lines('{"query": "q", "pos": ["p"], "pos_scores": [NaN]}'),
        ":1: found number NaN, expected a finite number; correct or remove it",
    ),
    "infinity in JSON": (
        "colbert",
        lines('["q01", ["bread-1", 1e999]]'),
        ":1: found number '1e999' beyond float64, expected a finite number; correct or remove it",
    ),
    "more than float32 holds": (
        "tevatron",
        lines(tevatron(score=1e39)),
        ":1: found score 1e+39 of docid 'd1' in positive_passages, expected a finite float32; correct the score, or remove the row",
    ),
    "a truth value as score": (
        "tevatron",
        lines(tevatron(score=True)),
        ":1: found score True of docid 'd1' in positive_passages, expected a finite float32; correct the score, or remove the row",
    ),
    "a word as score": (
        "tevatron",
        lines(tevatron(score="2.5")),
        ":1: found score '2.5' of docid 'd1' in positive_passages, expected a finite float32; correct the score, or remove the row",
    ),
    "NaN in a run": (
        "trec-run",
        b"q01 Q0 bread-1 1 nan t\n",
        ":1: found score 'nan', expected a finite float32; correct the line",
    ),
    "NaN in a dictionary": (
        "score-dict",
        pickle.dumps({"q01": {"bread-1": float("nan")}}),
        ": query 'q01': found score nan of passage 'bread-1', expected a finite float32; correct the score, or remove the row",
    ),
    "a pair with two scores": (
        "trec-run",
        b"q01 Q0 bread-1 1 2.5 t\nq01 Q0 bread-2 2 2 t\nq01 Q0 bread-1 3 1.5 t\n",
        ":3: found score 1.5 of query 'why does bread rise', passage 'Bread Mix flour, water, salt and yeast. The yeast makes "
        "..., which {path}:1 scores 2.5 (1 pairs in all have two scores), expected one score per pair of texts; keep the right "
        "one",
    ),
    "invalid UTF-8": (
        "tevatron",
        lines(tevatron()) + b'{"query": "\xff"}\n',
        ":2: found byte 0xff at position 11 of the line (invalid start byte), expected UTF-8; convert the file, e.g. with iconv "
        "-t UTF-8",
    ),
    "invalid UTF-8 in a run": (
        "trec-run",
        b"q01 Q0 bread-1 1 2.5 t\nq01 Q0 bread-\xe9 2 2 t\n",
        ":2: found byte 0xe9 at position 13 of the line (invalid continuation byte), expected UTF-8; convert the file, e.g. with "
        "iconv -t UTF-8",
    ),
    "a cut line of JSON": (
        "flagembedding",
        lines(FLAG) + json.dumps(FLAG).encode()[:-9],
        ":2: found broken JSON (Unterminated string starting at at character 65: ",
    ),
    "a cut line of a run": (
        "trec-run",
        b"q01 Q0 bread-1 1 2.5 t\nq01 Q0 bread-2 2 1.2",
        ": its last line has no line end, so the file may be cut; copy it again, or end the line",
    ),
    "a cut line of triples": (
        "msmarco-triples --to table --collection sample",
        b"q01\tbread-1\tbread-2\nq01\tbread-1\tbread-",
        ": its last line has no line end, so the file may be cut; copy it again, or end the line",
    ),
    "a cut dictionary": (
        "score-dict",
        gzip.compress(pickle.dumps({"q01": {"bread-1": 1.0}}))[:-12],
        ": cut or broken gzip (",
    ),
    "a cut plain dictionary": (
        "score-dict",
        pickle.dumps({"q01": {"bread-1": 1.0}})[:-4],
        ": ",
    ),
    "bytes after a dictionary": (
        "score-dict",
        pickle.dumps({"q01": {"bread-1": 1.0}}) + b"x",
        ": broken pickle (ValueError('bytes follow its end')); copy the file again",
    ),
    "no pickle at all": ("score-dict", b"query_id,score\n", ": broken pickle ("),
    "a list in a dictionary": (
        "score-dict",
        pickle.dumps({"q01": ["bread-1", 1.0]}),
        ": query 'q01': found list ['bread-1', 1.0], expected {passage_id: score}; write plain dict, str, int and float, e.g. ",
    ),
    "a truth value in a dictionary": (
        "score-dict",
        pickle.dumps({"q01": {"bread-1": True}}),
        ": query 'q01': found score True of passage 'bread-1', expected a finite float32; correct the score, or remove the row",
    ),
    "a numpy score in a dictionary": (
        "score-dict",
        pickle.dumps({"q01": {"bread-1": np.float32(1)}}),
        ": found numpy.",
    ),
    "an ordered dictionary": (
        "score-dict",
        pickle.dumps(collections.OrderedDict()),
        ": found collections.OrderedDict, expected plain dict, str, int and float, nothing that a pickle would import or call; "
        "write plain dict, str, int and float, e.g. {str(q): {str(p): float(s)}}",
    ),
    "margins": (
        "margins",
        lines({"query_id": "q01", "positive_id": "bread-1", "negative_id": "bread-2", "score": 3.5}),
        ": found margins, gold_sim(positive) − gold_sim(negative), expected a score of each passage: neither one follows from "
        "their difference, and the bank holds scores of pairs; export the scores themselves, or import margins as the table they "
        "are: sparsekd import margins ... --to table",
    ),
    "margins in n-tuples": (
        "n-tuples",
        lines({"a": "q", "b": "p", "c": "n", "d": "m", "label": [1.5, 2.5]}),
        ":1: found margins, gold_sim(positive) − gold_sim(negative), expected a score of each passage: neither one follows from "
        "their difference, and the bank holds scores of pairs; export the scores themselves, or import margins as the table they "
        "are: sparsekd import margins ... --to table",
    ),
    "a margin in a triplet": (
        "n-tuples",
        lines({"a": "q", "b": "p", "c": "n", "score": 1.5}),
        ":1: found margins, gold_sim(positive) − gold_sim(negative), expected a score of each passage",
    ),
    "bare triples": (
        "msmarco-triples",
        b"q01\tbread-1\tbread-2\n",
        ": found layout msmarco-triples, which carries no score, expected a score of each pair; import bare triples as a table "
        "with --to table, or give one of: n-tuples, score-dict, flagembedding, tevatron, pylate, trec-run, colbert",
    ),
    "a triple with two margins": (
        "margins --to table --collection sample",
        lines(*({"query_id": "q01", "positive_id": "bread-1", "negative_id": "bread-2", "score": score} for score in (1, 2))),
        ":2: found margin 2.0 of 'q01 bread-1 bread-2', which a row above gives 1.0, expected one margin per triple; keep the "
        "right row",
    ),
    "a triple of two passages that are one": (
        "msmarco-triples --to table --collection sample",
        b"q01\tbread-1\tbread-1\n",
        ":1: found passage 'bread-1' as positive and negative, expected two passages; remove the row",
    ),
    "an unknown id in a triple": (
        "msmarco-triples --to table --collection sample",
        b"q01\tbread-1\tgone\n",
        ":1: found passage_id 'gone', expected an _id of the collection's corpus.jsonl; they must agree character by character",
    ),
    "a triple of two columns": (
        "msmarco-triples --to table --collection sample",
        b"q01\tbread-1\n",
        ":1: found 2 tab-separated columns in 'q01\\tbread-1', expected 3 (query_id, positive_id, negative_id); correct the line",
    ),
    "other columns than a margin's": (
        "margins --to table --collection sample",
        lines({"qid": "q01", "pos": "bread-1", "neg": "bread-2", "score": 1}),
        ":1: found columns qid, pos, neg, score, expected query_id, positive_id, negative_id and score; rename the columns",
    ),
    "a text that the collection lacks": (
        "flagembedding --collection sample",
        lines(FLAG),
        ":1: found query 'q', expected a text of the collection's queries.jsonl; they must agree character by character; leave "
        "such pairs out, counted, with --skip-unknown",
    ),
    "a number for a list of passages": (
        "tevatron",
        lines({"query": "q", "positive_passages": 5}),
        ":1: found positive_passages 5, expected a list of at least one item; write the list, or remove the row",
    ),
    "a text for a passage": (
        "tevatron",
        lines({"query": "q", "positive_passages": ["p"]}),
        ':1: found positive_passages \'p\', expected {"docid": ..., "title": ..., "text": ...}; correct it',
    ),
    "no passage": (
        "tevatron",
        lines({"query": "q"}),
        ":1: found no passage, expected positive_passages or negative_passages; add them, or remove the line",
    ),
    "a query without passages": (
        "colbert",
        lines(["q01"]),
        ":1: found ['q01'], expected [query_id, [passage_id, score], ...]; add the passages, or remove the line",
    ),
    "an id that is neither a string nor a number": (
        "colbert",
        lines([None, ["bread-1", 1.0]]),
        ":1: found query_id None, expected a non-empty string or an integer; write the collection's own id",
    ),
    "a query alone in a row": (
        "n-tuples",
        lines({"anchor": "q", "score": 1.0}),
        ":1: found columns anchor, score, expected a query, a positive, negatives and scores; add the columns",
    ),
    "no query": (
        "flagembedding",
        lines({**FLAG, "query": ""}),
        ":1: found query '', expected a text; write the text, or remove the row",
    ),
    "no row": ("tevatron", b"\n", ": 0 rows, expected one JSON object per line; write the file again"),
    "an empty run": ("trec-run", b"", ": 0 rows, expected at least one line of a run; write the file again"),
    "empty triples": (
        "msmarco-triples --to table --collection sample",
        b"",
        ": 0 rows, expected at least one triple; write the file again",
    ),
    "an empty dictionary file": ("score-dict", b"", ": broken pickle (UnpicklingError('no end within its 0 bytes'))"),
    "a grouped score in a run": (
        "trec-run",
        b"q01 Q0 bread-1 1 1_000 t\n",
        ":1: found score '1_000', expected a finite float32; correct the line",
    ),
    "digits of another script in a run": (
        "trec-run",
        "q01 Q0 bread-1 1 \u0661\u0662 t\n".encode(),
        ":1: found score '\u0661\u0662', expected a finite float32; correct the line",
    ),
    "a path as id in a run": (
        "trec-run",
        b"../../x Q0 bread-1 1 1.5 t\n",
        ":1: found query_id '../../x', expected an _id of the collection's queries.jsonl; they must agree character by character; ",
    ),
    "an option as id": (
        "colbert",
        lines(["-rf", ["bread-1", 1.0]]),
        ":1: found query_id '-rf', expected an _id of the collection's queries.jsonl; they must agree character by character; ",
    ),
    "NUL in an id of a run": (
        "trec-run",
        b"q01\x00 Q0 bread-1 1 1.5 t\n",
        ":1: found query_id 'q01\\x00', expected an _id of the collection's queries.jsonl; they must agree character by character",
    ),
    "an escape sequence as id": (
        "msmarco-triples --to table --collection sample",
        b"q01\tbread-1\t\x1b[31mred\n",
        ":1: found passage_id '\\x1b[31mred', expected an _id of the collection's corpus.jsonl; they must agree character by",
    ),
    "an id of 300 characters": (
        "margins --to table --collection sample",
        lines({"query_id": "q" * 300, "positive_id": "bread-1", "negative_id": "bread-2", "score": 1.0}),
        f":1: found query_id '{'q' * 56}..., expected an _id of the collection's queries.jsonl; they must agree character by ",
    ),
    "an integer of 5,000 digits as id in a dictionary": (
        "score-dict",
        pickle.dumps({1 << 16_610: {"bread-1": 1.0}}),
        ": found query id an integer of 16,611 bits, expected a non-empty string or an integer; write the collection's own id",
    ),
    "an integer of 5,000 digits as score in a dictionary": (
        "score-dict",
        pickle.dumps({"q01": {"bread-1": 1 << 16_610}}),
        ": query 'q01': found score an integer of 16,611 bits of passage 'bread-1', expected a finite float32; ",
    ),
    "a dictionary 100,000 deep": (
        "score-dict",
        b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"}" + b"s" * 100_000 + b".",
        ": query 'a': found score {'a': {'a': {'a': {...}}}} of passage 'a', expected a finite float32; ",
    ),
    "a list 100,000 deep in a dictionary": (
        "score-dict",
        b"\x80\x02}X\x01\x00\x00\x00q" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
        ": query 'q': found list [[[[...]]]], expected {passage_id: score}; write plain dict, str, int and float, e.g. ",
    ),
    "a tuple 1,000,000 deep as id": (  # whose hash would overflow the C stack
        "score-dict",
        b"\x80\x02}]" + b"\x85" * 1_000_000 + b"K\x01s.",
        ": found the opcode TUPLE1 at byte 4, expected plain dict, str, int and float, nothing that a pickle would import",
    ),
    "a memo slot beyond memory": (
        "score-dict",
        b"\x80\x02}r\x00\xe1\xf5\x05.",
        ": broken pickle (UnpicklingError('memo slot 100000000 before byte 8')); copy the file again",
    ),
    "bytes that claim 8 GB": (
        "score-dict",
        b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".",
        ": found the opcode BYTEARRAY8 at byte 2, expected plain dict, str, int and float, nothing that a pickle would import",
    ),
    "a text that claims a terabyte": (
        "score-dict",
        b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b".",
        ": broken pickle (UnpicklingError('no end within its 12 bytes')); copy the file again",
    ),
    "a key twice": (
        "tevatron",
        lines('{"query": "q", "query": "r", "positive_passages": []}'),
        ":1: found key 'query' twice in one object, expected each key once; keep the right one",
    ),
    "a lone surrogate": (
        "flagembedding",
        lines(r'{"query": "q\ud800", "pos": ["p"], "pos_scores": [1]}'),
        ":1: found lone surrogate U+D800, expected whole characters; write both halves of the pair or remove the escape",
    ),
    "10,000 levels": (
        "colbert",
        b"[" * 10_000 + b"]" * 10_000,
        ":1: found nesting deeper than 64, expected at most 64 levels; flatten the object",
    ),
    "UTF-16": (
        "flagembedding",
        json.dumps(FLAG).encode("utf-16"),
        ":1: found byte 0xff at position 0 of the line (invalid start byte), expected UTF-8; convert the file, e.g. with iconv ",
    ),
    "an array for an object": (
        "tevatron",
        b"[1]\n",
        ":1: found a JSON list [1], expected a JSON object; put each row in {...}",
    ),
    "an object for an array": (
        "colbert",
        b"{}\n",
        ":1: found a JSON dict {}, expected a JSON array; put each row in [...]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_its_place_and_nothing_is_written(
    name: str, run: Run, tmp_path: Path, sample_folder: Path
) -> None:
    layout, content, message = CASES[name]
    layout, *options = layout.split()
    if LAYOUTS[layout].refers_to == "ids" and not options:
        options = ["--collection", "sample"]
    options = [str(sample_folder) if option == "sample" else option for option in options]
    path = tmp_path / f"given{LAYOUTS[layout].endings[-1]}"
    path.write_bytes(content)
    cache = tmp_path / "cache"

    result = run("import", layout, path, *options, "--name", "them", "--cache", cache)

    assert (result.exit_code, result.stdout) == (2, "")
    said = message.replace("{path}", str(path))
    assert result.stderr.startswith(f"sparsekd: {path}{said}")
    assert result.stderr.count("\n") == 1
    assert not cache.exists()


class Opens:
    """Pickles as a call that makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_call_something_is_refused_before_it_does(
    protocol: int, run: Run, tmp_path: Path, sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "scores.pkl"
    path.write_bytes(pickle.dumps({"q01": {"bread-1": Opens()}}, protocol=protocol))

    result = run("import", "score-dict", path, "--name", "them", "--collection", sample_folder, "--cache", tmp_path / "cache")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"sparsekd: {path}: found posix.mkdir, expected plain dict, str, int and float, nothing that ")
    assert [each.name for each in tmp_path.iterdir()] == ["scores.pkl"]


@pytest.mark.parametrize(
    "value",
    [
        b"bytes",
        None,
        (1, 2),
        {1, 2},
        [1],
        {"a": None},
        {"a": {"b": b"1"}},
        {"a": {"b": 2j}},
        {1.5: {"b": 1.0}},
        {"a": {(): 1.0}},
        {},
    ],
    ids=repr,
)
def test_a_pickle_of_anything_but_plain_numbers_by_ids_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))

    with pytest.raises(ValueError, match=r"a\.pkl: .*found .*; write|expected"):
        list(read_score_dict(tmp_path / "a.pkl"))


def test_an_id_as_number_and_as_string_is_one_pair(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "7", "text": "a"}\n', encoding="utf-8")
    (tmp_path / "queries.jsonl").write_text('{"_id": "3", "text": "q"}\n', encoding="utf-8")
    (tmp_path / "scores.pkl").write_bytes(pickle.dumps({3: {7: 1.0}, "3": {"7": 2.0}}))

    result = run("import", "score-dict", tmp_path, "--name", "n", "--collection", tmp_path, "--cache", tmp_path / "cache")

    assert result.exit_code == 2
    assert "found score 2.0 of query 'q', passage 'a', which " in result.stderr


def test_a_pair_that_is_banked_with_another_score_is_refused(run: Run, tmp_path: Path, sample_folder: Path) -> None:
    path, cache = tmp_path / "a.run", tmp_path / "cache"
    options = ("--name", "them", "--collection", sample_folder, "--cache", cache)
    path.write_text("q01 Q0 bread-1 1 2.5 t\n", encoding="utf-8")
    assert run("import", "trec-run", path, *options).exit_code == 0
    before = {each: each.read_bytes() for each in cache.rglob("*") if each.is_file()}
    path.write_text("q01 Q0 bread-2 1 2.5 t\nq01 Q0 bread-1 1 3.5 t\n", encoding="utf-8")

    result = run("import", "trec-run", path, *options)

    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"sparsekd: {path}: 1 of 2 pairs are banked as 'them' with another score (first: query 'why does bread rise', passage 'B"
    )
    assert result.stderr.endswith(": 2.5 there, 3.5 here); one identity gives one score: choose another --name or add a --field\n")
    assert {each: each.read_bytes() for each in cache.rglob("*") if each.is_file()} == before


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_broken_table_file_is_refused(ending: str, damage: str, run: Run, table: ScoreTable, tmp_path: Path) -> None:
    assert run("export", "table", "n-tuples", table.artifact.folder, tmp_path / "out").exit_code == 0
    whole = tmp_path / "out" / "train.arrow"
    path = tmp_path / f"train.{ending}"
    if ending == "parquet":
        with pa.memory_map(str(whole)) as source:
            pq.write_table(pa.ipc.open_stream(source).read_all(), path)
    else:
        path.write_bytes(whole.read_bytes())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"anchor,positive\nq,p\n")

    result = run("import", "n-tuples", path, "--name", "them", "--cache", tmp_path / "cache")

    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{path}: not a whole {ending} file (" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_text_that_is_not_utf8_in_an_arrow_file_is_refused(run: Run, tmp_path: Path) -> None:
    broken = pa.array([b"q\xff"], pa.binary()).view(pa.string())
    columns = {"anchor": broken, "positive": pa.array(["p"]), "score": pa.array([1.0])}
    batch = pa.table(columns)
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)

    result = run("import", "n-tuples", tmp_path, "--name", "them", "--cache", tmp_path / "cache")

    assert result.exit_code == 2
    assert "train.arrow: not a whole arrow file (In column 0: Invalid: Invalid UTF8 sequence" in result.stderr


def write_arrow(path: Path, columns: list[Any], names: list[str]) -> Path:
    batch = pa.record_batch(columns, names=names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return path


TEXTS = [pa.array(["q"]), pa.array(["p"])]


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        (
            [*TEXTS, pa.array(["n"]), pa.array(["m"]), pa.array([[1.0, 2.0]])],
            ["anchor", "positive", "negative", "negative", "scores"],
            "found column 'negative' twice, expected each column once; rename one",
        ),
        (
            [*TEXTS, pa.array([2**62], pa.timestamp("s"))],
            ["anchor", "positive", "score"],
            "not a whole arrow file (Python int too large to convert to C int); copy or write it again",
        ),
        (
            [*TEXTS, pa.array([2**31 - 1], pa.int32()).view(pa.date32())],
            ["anchor", "positive", "score"],
            "not a whole arrow file (days=2147483647; must have magnitude <= 999999999); copy or write it again",
        ),
    ],
    ids=["a column twice", "a time beyond Python's", "a date beyond Python's"],
)
def test_columns_that_cannot_be_read_as_they_are_refused(
    columns: list[Any], names: list[str], message: str, run: Run, tmp_path: Path
) -> None:
    path = write_arrow(tmp_path / "train.arrow", columns, names)

    result = run("import", "n-tuples", path, "--name", "them", "--cache", tmp_path / "cache")

    assert (result.exit_code, result.stderr) == (2, f"sparsekd: {path}: {message}\n")
    assert not (tmp_path / "cache").exists()


def test_the_name_of_a_column_that_is_not_utf8_is_refused(run: Run, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "train.arrow", [*TEXTS, pa.array([1.0])], ["abcd", "positive", "score"])
    path.write_bytes(path.read_bytes().replace(b"abcd", b"ab\xff\xfe"))

    result = run("import", "n-tuples", path, "--name", "them", "--cache", tmp_path / "cache")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"sparsekd: {path}: not a whole arrow file ('utf-8' codec can't decode byte 0xff in position 2")


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_dictionary_of_any_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    long = "é" * 40
    scores = {"q01": {"007": 1.5, long: -2, "p\n": 2.0**90}, 7: {str(number): number / 7 for number in range(2000)}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(scores, protocol=protocol))

    rows = list(read_score_dict(tmp_path / "a.pkl"))

    assert [(row.query, dict(zip(row.passages, row.scores, strict=True))) for row in rows] == [
        ("q01", scores["q01"]),
        ("7", scores[7]),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"document_ids": ["d1", "d9"]},
            "found document_id 'd9', expected an id of documents; add its text there, or remove the row",
        ),
        ({"query_id": "q9"}, "found query_id 'q9', expected an id of queries; add its text there, or remove the row"),
        ({"scores": [1.0]}, "found 1 scores for 2 passages, expected one for each; score the missing ones first"),
        ({"scores": "[1.0, nan]"}, "found scores '[1.0, nan]', expected a list, or the text of one; correct the row"),
        (
            {"scores": "[1.0, NaN]"},
            "found score nan of passage 'd2', expected a finite float32; correct the score, or remove the row",
        ),
        ({"scores": "__import__('os')"}, "found scores \"__import__('os')\", expected a list, or the text of one; correct the row"),
        ({"document_ids": "[" * 5000}, "found document_ids '[[[[[["),
        ({"document_ids": []}, "found document_ids [], expected a list of at least one item; write the list, or remove the row"),
    ],
)
def test_a_row_of_pylate_that_does_not_hold_together_is_refused(
    change: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    row = {"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [1.0, 2.0], **change}
    (tmp_path / "train.jsonl").write_bytes(lines(row))
    (tmp_path / "queries.jsonl").write_bytes(lines({"query_id": "q1", "text": "q"}))
    (tmp_path / "documents.jsonl").write_bytes(lines(*({"document_id": name, "text": name} for name in ("d1", "d2"))))

    result = run("import", "pylate", tmp_path, "--name", "them", "--cache", tmp_path / "cache")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"sparsekd: {tmp_path / 'train.jsonl'}:1: {message}")
    assert not (tmp_path / "cache").exists()


# Words of the command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tevatorn", "x"], "layout 'tevatorn' is not known; did you mean tevatron?"),
        (["msmarco", "x"], "layout 'msmarco' is not known; did you mean msmarco-triples?"),
        (
            ["zzz", "x"],
            "layout 'zzz' is not known; expected one of: n-tuples, margins, score-dict, flagembedding, tevatron, pylate, ",
        ),
        (["colbert", "x"], "layout colbert names queries and passages by id; say whose with --collection FOLDER"),
        (["tevatron", "gone"], "gone: no such file or folder; expected a file of scores, or a folder with train.jsonl"),
        (["pylate", "gone"], "gone: no such folder; expected PyLate's train, queries and documents in one folder"),
        (["tevatron", "."], ".: holds no train.jsonl or .json; give the file, or the folder that holds it"),
        (["tevatron", "x", "--to", "tables"], "--to tables: expected scores or table"),
        (
            ["colbert", "x", "--to", "table", "--collection", "x"],
            "layout colbert carries scores of pairs; import them into the bank (without --to table): a recipe with a teacher of "
            'kind = "file" makes tables of them',
        ),
        (["margins", "x", "--to", "table"], "--to table: needs --collection, whose ids the rows name, and has no --skip-unknown"),
        (["tevatron", "x", "--skip-unknown"], "--skip-unknown: needs --collection, whose texts are the known ones"),
        (["tevatron", "x", "--field", "a"], "--field 'a': expected KEY=VALUE, each key once"),
        (["tevatron", "x", "--field", "a=1", "--field", "a=2"], "--field 'a=2': expected KEY=VALUE, each key once"),
        (["tevatron", "x", "--name", "a b"], "--name 'a b': expected letters, digits, '.', '_' or '-', at most 64; choose another"),
        (["colbert", "x", "--collection", "gone"], "gone: no such folder; expected a BEIR collection with corpus.jsonl and "),
    ],
)
def test_words_that_do_not_fit_are_refused_before_a_file_is_read(
    words: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = [] if "--name" in words else ["--name", "them"]

    result = run("import", *words, *name)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"sparsekd: {message}")
    assert list(tmp_path.iterdir()) == []


# Exports


@pytest.mark.parametrize(
    ("loss", "kind", "layout", "takes", "others"),
    [
        ("SparseMarginMSELoss", "margin", "n-tuples", "score_list", "margins, msmarco-triples"),
        (
            "SparseMultipleNegativesRankingLoss",
            "none",
            "trec-run",
            "score_list, similarity",
            "flagembedding, tevatron, msmarco-triples",
        ),
        ("SparseCoSENTLoss", "similarity", "margins", "score_list, margin", "score-dict, trec-run"),
    ],
)
def test_a_table_whose_labels_a_layout_cannot_carry_is_refused(
    loss: str, kind: str, layout: str, takes: str, others: str, run: Run, make_table: Callable[..., ScoreTable], tmp_path: Path
) -> None:
    folder = make_table(loss, kind=kind).artifact.folder

    result = run("export", "table", layout, folder, tmp_path / "out")

    assert result.exit_code == 2
    assert result.stderr == (
        f"sparsekd: {folder}: holds labels of kind {kind!r}, which layout {layout} cannot carry (it takes {takes}); it can be "
        f"written as {others}\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_labels_that_differ_from_row_to_row_are_no_single_scores(
    run: Run, make_table: Callable[..., ScoreTable], tmp_path: Path
) -> None:
    folder = make_table(calibration={"kind": "minmax"}).artifact.folder

    result = run("export", "table", "trec-run", folder, tmp_path / "out")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"sparsekd: {folder}: query 'q06', passage ")
    assert "(calibration {'kind': 'minmax', 'scale': 1.0}, taken row by row); this layout holds one score per pair" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_each_teachers_own_calibration_is_named_where_labels_differ(
    run: Run, make_table: Callable[..., ScoreTable], tmp_path: Path
) -> None:
    own = {"lexical": {"kind": "minmax"}, "short": {"kind": "raw"}}
    folder = make_table(teachers=[{"name": "short", "kind": "bm25", "b": 0.9}], calibrations=own).artifact.folder

    result = run("export", "table", "trec-run", folder, tmp_path / "out")

    assert result.exit_code == 2
    assert "(calibration [{'kind': 'minmax', 'scale': 1.0}, {'kind': 'raw'}], taken row by row)" in result.stderr


def test_a_target_that_exists_is_kept_unless_told_and_is_an_export(run: Run, table: ScoreTable, tmp_path: Path) -> None:
    folder, out = table.artifact.folder, tmp_path / "out"
    assert run("export", "table", "colbert", folder, out).exit_code == 0

    refused = run("export", "table", "tevatron", folder, out)
    replaced = run("export", "table", "tevatron", folder, out, "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years", encoding="utf-8")
    foreign = run("export", "table", "tevatron", folder, tmp_path / "mine", "--overwrite")

    assert refused.exit_code == 2
    assert refused.stderr == (
        f"sparsekd: {out}: exists already; choose another folder, or replace an earlier export with --overwrite\n"
    )
    assert replaced.exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train.jsonl"]
    assert foreign.exit_code == 2
    assert foreign.stderr == (
        f"sparsekd: {tmp_path / 'mine'}: is no export of this program, so --overwrite leaves it alone; choose another folder\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_a_collection_whose_texts_have_changed_is_refused(run: Run, table: ScoreTable, tmp_path: Path, sample_folder: Path) -> None:
    place = tmp_path / "collection"
    place.mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        text = (sample_folder / name).read_text(encoding="utf-8")
        (place / name).write_text(text.replace("yeast", "sugar", 1), encoding="utf-8")

    result = run("export", "table", "tevatron", table.artifact.folder, tmp_path / "out", "--collection", place)

    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"sparsekd: {place / 'corpus.jsonl'}: is not the file that table {table.key} was made from (sha256 "
    )
    assert not (tmp_path / "out").exists()


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, manifest)


def test_a_table_away_from_its_candidates_cannot_tell_whether_texts_have_changed_and_says_so(
    run: Run, table: ScoreTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Path(shutil.copytree(table.artifact.folder, tmp_path / "tables" / table.key))

    result = run("export", "table", "tevatron", alone, tmp_path / "out")

    assert result.exit_code == 0
    assert f"{alone}: its candidates are gone, so nothing says whether " in caplog.text


def test_a_table_that_does_not_say_its_collection_needs_to_be_told(run: Run, table: ScoreTable, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(table.artifact.folder, tmp_path / "tables" / table.key))
    edit_manifest(alone, lambda manifest: manifest.pop("recipe"))

    silent = run("export", "table", "tevatron", alone, tmp_path / "out")
    gone = run("export", "table", "tevatron", alone, tmp_path / "out", "--collection", tmp_path / "gone")
    by_id = run("export", "table", "colbert", alone, tmp_path / "ids")

    assert silent.exit_code == gone.exit_code == 2
    said = "does not say which collection it was made from; give it with --collection"
    assert silent.stderr == f"sparsekd: {alone}: {said}\n"
    assert gone.stderr == (f"sparsekd: {tmp_path / 'gone'}: no such folder; give the collection of the table with --collection\n")
    assert by_id.exit_code == 0, "ids need no texts"


def test_an_id_without_a_text_is_refused_and_nothing_is_left(run: Run, table: ScoreTable, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(table.artifact.folder, tmp_path / "tables" / table.key))
    place = tmp_path / "collection"
    place.mkdir()
    (place / "queries.jsonl").write_text('{"_id": "q01", "text": "q"}\n', encoding="utf-8")
    (place / "corpus.jsonl").write_text('{"_id": "bread-1", "text": "p"}\n', encoding="utf-8")

    result = run("export", "table", "n-tuples", alone, tmp_path / "out", "--collection", place)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"sparsekd: {alone}: passage ")
    assert result.stderr.endswith(
        " of the table is not in the collection's corpus.jsonl; give the collection it was made from with --collection\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collection", "tables"]


def test_vectors_have_no_layout(run: Run, tmp_path: Path) -> None:
    fields, extra = {"kind": "embedding"}, {"shards": {}, "counts": {}, "summary": {}}
    schema = table_schema("embedding", Contract(num_passages=0, dimension=8))
    rows = pa.table({"role": ["query"], "text_id": ["q"], "indices": [[1]], "values": [[0.5]]}).cast(schema)
    with publish(tmp_path / key_of(fields), kind=KIND, fields=fields, extra=extra) as temporary:
        extra["shards"] = write_shards(temporary, KIND, [rows], 1)

    result = run("export", "table", "n-tuples", tmp_path / key_of(fields), tmp_path / "out")

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "holds labels of kind 'embedding', which layout n-tuples cannot carry (it takes score_list); no layout holds vectors\n"
    )


def test_a_file_of_nothing_but_unknown_pairs_is_refused(run: Run, tmp_path: Path, sample_folder: Path) -> None:
    (tmp_path / "run.trec").write_text("q99 Q0 bread-1 1 2.5 t\n", encoding="utf-8")
    options = ("--name", "them", "--collection", sample_folder, "--skip-unknown", "--cache", tmp_path / "cache")

    result = run("import", "trec-run", tmp_path, *options)

    assert result.exit_code == 2
    said = "all 1 pairs are of unknown queries or passages; check that the collection is the right one"
    assert result.stderr == f"sparsekd: {said}\n"
    assert not (tmp_path / "cache").exists()


def test_what_is_no_table_is_no_export(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    result = run("export", "table", "tevatron", tmp_path / "empty", tmp_path / "out")

    assert result.exit_code == 1
    assert "manifest.json: missing, so " in result.stderr
    assert not (tmp_path / "out").exists()
