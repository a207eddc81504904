"""Laws of the BEIR folder reader: exact ids, literal texts, counted losses, a place in every message."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.collection import Collection, collection_digest, read_collection
from sparsekd.collection.beir import read_texts
from sparsekd.collection.reading import json_arrays

HEADER = "query-id\tcorpus-id\tscore\n"
CORPUS = [
    {"_id": "p1", "title": "Tea", "text": "hot leaves"},
    {"_id": "p2", "text": "cold milk"},
    {"_id": "p3", "text": "salt"},
]
QUERIES = [{"_id": "q1", "text": "what is hot"}, {"_id": "q2", "text": "what is cold"}]


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """A sound collection, with ``files`` in the place of its own."""
    sound = {
        "corpus.jsonl": jsonl(CORPUS),
        "queries.jsonl": jsonl(QUERIES),
        "qrels/train.tsv": HEADER + "q1\tp1\t1\nq2\tp2\t2\nq2\tp3\t0\n",
    }
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, content in {**sound, **files}.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def read(folder: Path, files: Mapping[str, str | bytes]) -> Collection:
    return read_collection(write(folder, files))


def message(folder: Path, files: Mapping[str, str | bytes]) -> str:
    with pytest.raises(ValueError, match=r"expected") as caught:
        read(folder, files)
    return str(caught.value).replace(f"{folder}/", "")


def test_title_and_text_are_joined_in_file_order(tmp_path: Path) -> None:
    collection = read(tmp_path, {})

    assert list(collection.passages.items()) == [("p1", "Tea hot leaves"), ("p2", "cold milk"), ("p3", "salt")]
    assert collection.queries == {"q1": "what is hot", "q2": "what is cold"}
    assert collection.qrels == {"train": {"q1": {"p1": 1}, "q2": {"p2": 2, "p3": 0}}}


def test_ids_are_kept_exactly_and_integers_become_decimal_strings(tmp_path: Path) -> None:
    big = 10**20 + 1
    corpus = f'{{"_id": "007", "text": "a"}}\n{{"_id": 7, "text": "b"}}\n{{"_id": {big}, "text": "c"}}\n'

    collection = read(tmp_path, {"corpus.jsonl": corpus, "qrels/train.tsv": HEADER + f"q1\t007\t1\nq2\t{big}\t1\n"})

    assert collection.passages == {"007": "a", "7": "b", str(big): "c"}
    assert collection.qrels["train"] == {"q1": {"007": 1}, "q2": {str(big): 1}}


@pytest.mark.parametrize("identity", ["../../x", "a/b", "-rf", "😀", "x" * 300, '"quoted"'])
def test_any_id_without_whitespace_is_accepted(tmp_path: Path, identity: str) -> None:
    corpus = jsonl([{"_id": identity, "text": "hot"}])

    collection = read(tmp_path, {"corpus.jsonl": corpus, "qrels/train.tsv": f"{HEADER}q1\t{identity}\t1\n"})

    assert collection.qrels["train"] == {"q1": {identity: 1}}


@pytest.mark.parametrize("text", ["NA", "null", "None", "a\u2028b", "nul\x00", 'a " quote', "a\u0085b\x0bc", "\ufeffx", " x "])
def test_texts_are_literal(tmp_path: Path, text: str) -> None:
    corpus = json.dumps({"_id": "p1", "text": text}, ensure_ascii=False) + "\n" + jsonl(CORPUS[1:])

    assert read(tmp_path, {"corpus.jsonl": corpus}).passages["p1"] == text


def test_an_escaped_emoji_is_one_character(tmp_path: Path) -> None:
    corpus = r'{"_id": "p1", "text": "\ud83d\ude00"}' + "\n" + jsonl(CORPUS[1:])

    assert read(tmp_path, {"corpus.jsonl": corpus}).passages["p1"] == "😀"


def test_crlf_bom_blank_lines_missing_last_newline_and_other_keys_change_nothing(tmp_path: Path) -> None:
    plain = read(tmp_path / "plain", {})
    corpus = jsonl([{**row, "metadata": {"url": "x", "n": [1.5]}} for row in CORPUS])
    decorated = {
        "corpus.jsonl": corpus,
        "queries.jsonl": jsonl(QUERIES),
        "qrels/train.tsv": HEADER + "q1\tp1\t1\nq2\tp2\t2\nq2\tp3\t0",
    }
    dressed = {name: b"\xef\xbb\xbf\r\n" + text.replace("\n", "\r\n \r\n").encode() for name, text in decorated.items()}

    assert read(tmp_path / "dressed", dressed) == plain


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    queries = jsonl([{"_id": '"q1', "text": "a"}, {"_id": "q2", "text": "b"}])

    collection = read(tmp_path, {"queries.jsonl": queries, "qrels/train.tsv": HEADER + '"q1\tp1\t1\nq2\tp2\t1\n'})

    assert list(collection.qrels["train"]) == ['"q1', "q2"]


def test_repeated_rows_are_merged_and_counted(tmp_path: Path) -> None:
    files = {
        "corpus.jsonl": jsonl([*CORPUS, CORPUS[0]]),
        "queries.jsonl": jsonl([*QUERIES, QUERIES[0], QUERIES[1]]),
        "qrels/train.tsv": HEADER + "q1\tp1\t1\nq1\tp1\t1\nq2\tp2\t2\n",
    }

    counts = read(tmp_path, files).counts

    assert counts["duplicate_passages_merged"] == 1
    assert counts["duplicate_queries_merged"] == 2
    assert counts["duplicate_judgements_merged"] == 1


def test_empty_passage_is_counted_unless_judged_relevant(tmp_path: Path) -> None:
    corpus = jsonl([*CORPUS, {"_id": "p4", "title": "", "text": "  "}])
    judged_0 = HEADER + "q1\tp1\t1\nq1\tp4\t0\n"
    judged_1 = HEADER + "q1\tp1\t1\nq1\tp4\t1\n"

    assert read(tmp_path, {"corpus.jsonl": corpus, "qrels/train.tsv": judged_0}).counts["empty_passages"] == 1
    assert message(tmp_path, {"corpus.jsonl": corpus, "qrels/train.tsv": judged_1}) == (
        "qrels/train.tsv:3: found passage 'p4', whose text is empty, judged relevant, expected text to find; "
        "remove the judgement or write the passage's text"
    )


def test_queries_without_positive_leave_their_split_and_unused_queries_leave(tmp_path: Path) -> None:
    queries = jsonl([*QUERIES, {"_id": "q3", "text": "unused"}])

    collection = read(tmp_path, {"queries.jsonl": queries, "qrels/train.tsv": HEADER + "q1\tp1\t1\nq2\tp2\t0\nq2\tp3\t-1\n"})

    assert list(collection.queries) == ["q1"]
    assert collection.qrels == {"train": {"q1": {"p1": 1}}}
    assert collection.counts["train_queries_without_positive"] == 1
    assert collection.counts["queries_unused"] == 2


def test_a_split_without_a_file_is_absent(tmp_path: Path) -> None:
    collection = read(tmp_path, {"qrels/test.tsv": HEADER + "q1\tp1\t1\n"})

    assert list(collection.qrels) == ["train", "test"]


def test_max_passages_keeps_those_of_smallest_hash_and_queries_with_a_positive_among_them(tmp_path: Path) -> None:
    corpus = jsonl([{"_id": f"p{i}", "text": "x"} for i in range(50)])
    queries = jsonl([{"_id": f"q{i}", "text": "x"} for i in range(50)])
    rows = HEADER + "".join(f"q{i}\tp{i}\t1\nq{i}\tp{(i + 1) % 50}\t0\n" for i in range(50))
    write(tmp_path, {"corpus.jsonl": corpus, "queries.jsonl": queries, "qrels/train.tsv": rows})
    kept = sorted((f"p{i}" for i in range(50)), key=lambda name: hashlib.sha256(name.encode()).digest())[:20]

    collection = read_collection(tmp_path, max_passages=20)

    assert set(collection.passages) == set(kept)
    assert set(collection.qrels["train"]) == {name.replace("p", "q") for name in kept}
    assert all(set(grades) <= set(kept) for grades in collection.qrels["train"].values())
    assert collection.counts["train_queries_without_positive"] == 30
    assert collection.counts["passages_left_out"] == 30


def test_max_train_queries_leaves_other_splits_alone(tmp_path: Path) -> None:
    ids = [f"q{i}" for i in range(30)]
    rows = HEADER + "".join(f"{name}\tp1\t1\n" for name in ids)
    queries = jsonl([{"_id": name, "text": "x"} for name in ids])
    write(tmp_path, {"queries.jsonl": queries, "qrels/train.tsv": rows, "qrels/dev.tsv": HEADER + "q0\tp2\t1\nq1\tp2\t1\n"})
    kept = sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:5]

    collection = read_collection(tmp_path, max_train_queries=5)

    assert set(collection.qrels["train"]) == set(kept)
    assert set(collection.qrels["dev"]) == {"q0", "q1"}
    assert set(collection.queries) == {*kept, "q0", "q1"}
    assert collection.counts["train_queries_left_out"] == 25


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_below_one_are_refused(tmp_path: Path, limit: int) -> None:
    with pytest.raises(ValueError, match=r"max_passages is .*, expected 1 or more, or None for all"):
        read_collection(tmp_path, max_passages=limit)


DEEP = '{"_id": "p1", "text": "x", "m": ' + "[" * 10_000 + "]" * 10_000 + "}\n"
JSON_LINES = {
    "invalid UTF-8": (b'{"_id": "p1", "text": "\xff"}\n', "corpus.jsonl:1: found byte 0xff at position 23 of the line"),
    "UTF-16": ('{"_id": "p1"}\n'.encode("utf-16"), "corpus.jsonl:1: found byte 0xff at position 0 of the line"),
    "encoded surrogate": (b'{"_id": "p1", "text": "\xed\xa0\x80"}\n', "corpus.jsonl:1: found byte 0xed"),
    "lone surrogate": (
        r'{"_id": "p1", "text": "\ud800x"}',
        "corpus.jsonl:1: found lone surrogate U+D800, expected whole characters",
    ),
    "surrogate elsewhere": (r'{"_id": "p1", "text": "x", "m": ["\uDC00"]}', "corpus.jsonl:1: found lone surrogate U+DC00"),
    "truncated": ('{"_id": "p1", "text": "x"}\n\n{"_id": "p2", "te', "corpus.jsonl:3: found broken JSON (Unterminated string"),
    "two objects": ('{"_id": "p1", "text": "x"} {}', "corpus.jsonl:1: found broken JSON (Extra data at character 28: '{}')"),
    "duplicate key": ('{"_id": "p1", "text": "x", "text": "y"}', "corpus.jsonl:1: found key 'text' twice in one object"),
    "duplicate nested key": (
        '{"_id": "p1", "text": "x", "m": {"a": 1, "a": 1}}',
        "corpus.jsonl:1: found key 'a' twice in one object",
    ),
    "list": ('["p1", "x"]', "corpus.jsonl:1: found a JSON list ['p1', 'x'], expected a JSON object; put each row in {...}"),
    "null": ("null", "corpus.jsonl:1: found a JSON NoneType None, expected a JSON object"),
    "no id": ('{"text": "x"}', "corpus.jsonl:1: found keys ['text'], expected the key _id; add the id as a string"),
    "no text": ('{"_id": "p1", "title": "x"}', "corpus.jsonl:1: found keys ['_id', 'title'], expected the key text"),
    "text is null": ('{"_id": "p1", "text": null}', "corpus.jsonl:1: found text None (NoneType), expected a string"),
    "text is a number": ('{"_id": "p1", "text": 1.5}', "corpus.jsonl:1: found text 1.5 (float), expected a string"),
    "title is null": (
        '{"_id": "p1", "title": null, "text": "x"}',
        "corpus.jsonl:1: found title None (NoneType), expected a string",
    ),
    "id is a float": (
        '{"_id": 1.0, "text": "x"}',
        "corpus.jsonl:1: found _id 1.0, expected a non-empty string (or an integer)",
    ),
    "id is a bool": ('{"_id": true, "text": "x"}', "corpus.jsonl:1: found _id True, expected a non-empty string"),
    "id is empty": ('{"_id": "", "text": "x"}', "corpus.jsonl:1: found _id '', expected a non-empty string"),
    "id with space": ('{"_id": "a b", "text": "x"}', "corpus.jsonl:1: found _id 'a b', expected a non-empty string"),
    "id with NUL": (r'{"_id": "a\u0000", "text": "x"}', r"corpus.jsonl:1: found _id 'a\x00', expected a non-empty string"),
    "id with escape": (r'{"_id": "\u001b[31m a", "text": "x"}', r"corpus.jsonl:1: found _id '\x1b[31m a', expected"),
    "NaN": ('{"_id": "p1", "text": "x", "m": NaN}', "corpus.jsonl:1: found number NaN, expected a finite number"),
    "Infinity": (
        '{"_id": "p1", "text": "x", "m": -Infinity}',
        "corpus.jsonl:1: found number -Infinity, expected a finite number",
    ),
    "1e999": ('{"_id": "p1", "text": "x", "m": 1e999}', "corpus.jsonl:1: found number '1e999' beyond float64"),
    "10,000 deep": (DEEP, "corpus.jsonl:1: found nesting deeper than 64, expected at most 64 levels; flatten the object"),
    "10,000 deep, unclosed": ('{"a":' * 10_000, "corpus.jsonl:1: found nesting deeper than 64"),
    "5,000 digits": ('{"_id": ' + "9" * 5000 + ', "text": "x"}', "corpus.jsonl:1: found Exceeds the limit (4300"),
    "same id, other text": (
        jsonl([*CORPUS, {"_id": "p1", "text": "y"}]),
        "corpus.jsonl:4: found _id 'p1' again with another text",
    ),
    "empty": ("", "corpus.jsonl: 0 rows, expected one JSON object per line"),
    "blank": ("\ufeff\n \r\n", "corpus.jsonl: 0 rows, expected one JSON object per line"),
}


@pytest.mark.parametrize(("content", "expected"), JSON_LINES.values(), ids=JSON_LINES.keys())
def test_malformed_corpus_is_refused_with_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert message(tmp_path, {"corpus.jsonl": content}).startswith(expected)


def test_brackets_inside_strings_are_no_nesting(tmp_path: Path) -> None:
    text = '[{"\\' * 1000

    collection = read(tmp_path, {"corpus.jsonl": jsonl([{"_id": "p1", "text": text}, *CORPUS[1:]])})

    assert collection.passages["p1"] == text


def test_a_million_escaped_quotes_without_an_end_are_refused_in_linear_time(tmp_path: Path) -> None:
    content = "{" * 65 + '"' + '\\"' * 1_000_000

    assert "nesting deeper than 64" in message(tmp_path, {"corpus.jsonl": content})


def test_a_query_without_text_is_refused(tmp_path: Path) -> None:
    found = message(tmp_path, {"queries.jsonl": jsonl([*QUERIES, {"_id": "q3", "text": " "}])})

    assert found == "queries.jsonl:3: found text ' ', expected a question; write it, or remove the query here and in qrels/"


TSV = {
    "no header": ("q1\tp1\t1\n", r"qrels/train.tsv:1: found 'q1\tp1\t1', expected the header query-id<TAB>corpus-id<TAB>score"),
    "TREC": ("q1 0 p1 1\n", "qrels/train.tsv:1: found 'q1 0 p1 1', expected the header"),
    "header only": (HEADER, "qrels/train.tsv: 0 rows, expected at least one below the header"),
    "empty": ("", "qrels/train.tsv: 0 rows, expected at least one below the header"),
    "two columns": (
        HEADER + "q1\tp1\n",
        r"qrels/train.tsv:2: found 2 tab-separated columns in 'q1\tp1', expected 3 (query-id,",
    ),
    "four columns": (HEADER + "q1\tp1\t1\t\n", "qrels/train.tsv:2: found 4 tab-separated columns"),
    "spaces": (HEADER + "q1 p1 1\n", "qrels/train.tsv:2: found 1 tab-separated columns"),
    "float grade": (HEADER + "q1\tp1\t1.0\n", "qrels/train.tsv:2: found score '1.0', expected an integer grade"),
    "word grade": (HEADER + "q1\tp1\tyes\n", "qrels/train.tsv:2: found score 'yes', expected an integer grade"),
    "no grade": (HEADER + "q1\tp1\t\n", "qrels/train.tsv:2: found score '', expected an integer grade"),
    "other digits": (HEADER + "q1\tp1\t\u0661\n", "qrels/train.tsv:2: found score '\u0661', expected an integer grade"),
    "huge grade": (HEADER + "q1\tp1\t" + "1" * 5000 + "\n", "qrels/train.tsv:2: found score '1111"),
    "unknown query": (
        HEADER + "q1\tp1\t1\nq01\tp1\t1\n",
        "qrels/train.tsv:3: found query-id 'q01', expected an _id of queries.jsonl",
    ),
    "unknown passage": (
        HEADER + "q1\tP1\t1\n",
        "qrels/train.tsv:2: found corpus-id 'P1', expected an _id of corpus.jsonl; ids must",
    ),
    "id with space": (HEADER + "q1 \tp1\t1\n", "qrels/train.tsv:2: found query-id 'q1 ', expected an _id of queries.jsonl"),
    "two grades": (HEADER + "q1\tp1\t1\nq1\tp1\t2\n", "qrels/train.tsv:3: found grade 2 for 'q1' and 'p1', graded 1 above"),
    "invalid UTF-8": (HEADER.encode() + b"q1\t\xff\t1\n", "qrels/train.tsv:2: found byte 0xff at position 3 of the line"),
}


@pytest.mark.parametrize(("content", "expected"), TSV.values(), ids=TSV.keys())
def test_malformed_qrels_are_refused_with_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert message(tmp_path, {"qrels/train.tsv": content}).startswith(expected)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    (write(tmp_path, {}) / name).unlink()

    with pytest.raises(FileNotFoundError, match=name.partition("/")[0]):
        read_collection(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such folder; expected a BEIR collection; check \[collection\] path"
    ):
        read_collection(tmp_path / "nowhere")


def test_digest_is_of_the_bytes_and_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.jsonl": "x"})

    assert collection_digest(tmp_path, ["corpus.jsonl"]) == {"corpus.jsonl": hashlib.sha256(b"x").hexdigest()}
    with pytest.raises(FileNotFoundError, match=r"qrels/dev\.tsv: no such file"):
        collection_digest(tmp_path, ["qrels/dev.tsv"])


@pytest.mark.parametrize(("splits", "told"), [(["dev", "test"], "dev, test"), ([], "no split")])
def test_a_missing_split_is_refused_with_those_that_are_there(tmp_path: Path, splits: list[str], told: str) -> None:
    (tmp_path / "qrels").mkdir()
    for split in splits:
        (tmp_path / "qrels" / f"{split}.tsv").write_text(HEADER)

    with pytest.raises(FileNotFoundError, match=f"which has judgements for: {told}; check"):
        collection_digest(tmp_path, ["qrels/train.tsv"])


def test_the_sample_is_sound_and_small(sample_folder: Path) -> None:
    collection = read_collection(sample_folder)

    assert {split: len(rows) for split, rows in collection.qrels.items()} == {"train": 14, "dev": 4, "test": 6}
    assert len(collection.passages) == 28
    dropped = {name: count for name, count in collection.counts.items() if name.endswith(("merged", "left_out", "positive"))}
    assert not any(dropped.values())


def test_reading_imports_no_torch_pandas_or_datasets() -> None:
    code = "import sys, sparsekd.collection; print({'torch', 'pandas', 'datasets', 'numpy'} & set(sys.modules))"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )

    assert done.stdout == "set()\n"


# JSON-like and TSV-like fragments reach deeper into the parsers than random bytes.
_PIECES = [
    '{"_id": "p1", "text": "x"}',
    '"_id"',
    '"text"',
    "\\ud800",
    "\\u0000",
    "p1",
    "q1",
    "null",
    "[" * 70,
    "1",
    "-1",
    "1e999",
]
_FRAGMENTS = st.sampled_from([*'{}[]":,\\\n\r\t ', *_PIECES, "NaN", "9" * 5000, "\ufeff", "\u2028", HEADER, "q1\tp1\t1\n"])
_FILES = st.binary(max_size=200) | st.lists(_FRAGMENTS | st.text(max_size=5), max_size=20).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
@settings(max_examples=300, deadline=None)
@given(content=_FILES)
def test_any_bytes_are_read_or_refused_with_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    folder = write(tmp_path_factory.getbasetemp() / f"fuzz-{name.replace('/', '-')}", {name: content})

    try:
        collection = read_collection(folder)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
        assert all(max(grades.values()) >= 1 for grades in collection.qrels["train"].values())

    assert not refused or str(folder) in refused


def test_texts_are_all_of_a_folder_judged_or_not_and_need_no_qrels(tmp_path: Path) -> None:
    queries = [*QUERIES, {"_id": "q3", "text": "what is salt"}]
    folder = write(tmp_path, {"queries.jsonl": jsonl(queries)})
    (folder / "qrels" / "train.tsv").unlink()

    found = read_texts(folder)

    assert found == (
        {"q1": "what is hot", "q2": "what is cold", "q3": "what is salt"},
        {"p1": "Tea hot leaves", "p2": "cold milk", "p3": "salt"},
    )


def test_texts_of_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone: no such folder; expected a BEIR collection with corpus\.jsonl and queries"):
        read_texts(tmp_path / "gone")


def test_an_array_per_line_is_read_as_strictly_as_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[1, "a"]\n\n[[2.5]]\n{}\n', encoding="utf-8")

    rows = json_arrays(path)

    assert [next(rows), next(rows)] == [(1, [1, "a"]), (3, [[2.5]])]
    with pytest.raises(ValueError, match=r"a\.jsonl:4: found a JSON dict \{\}, expected a JSON array; put each row in \[\.\.\.\]"):
        next(rows)
