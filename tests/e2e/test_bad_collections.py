"""Collections that a stage refuses: exit 2, one line with file, line, what was found and what to do, nothing made. And odd ones
that it takes: their ids and texts are in the table as they were written, and no file bears their names.

All cases run in one process, for the imports; each is a call of the script's own stage. None of them loads torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsekd.collection import read_collection
from sparsekd.labels.score_table import ScoreTable

PROGRAM = """
import contextlib, io, json, runpy, sys
from sparsekd.stage import run_stage
make, said = runpy.run_path(sys.argv[1])["make"], {}
for name, arguments in json.loads(sys.argv[2]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        code = run_stage("", make, [], arguments)
    said[name] = [code, out.getvalue(), log.getvalue()]
print(json.dumps(said))
"""
RECIPE = """
[collection]
path = "sound"
[[mining.miners]]
kind = "bm25"
quota = 2
[[teachers]]
name = "lexical"
kind = "bm25"
[labels]
num_negatives = 1
[student]
model = "none"
"""
HEADER = "query-id\tcorpus-id\tscore\n"
NUM_PASSAGES = 6
CORPUS = "".join(json.dumps({"_id": f"p{number}", "text": f"tea word{number}"}) + "\n" for number in range(NUM_PASSAGES))
QUERIES = "".join(json.dumps({"_id": f"q{number}", "text": f"tea word{number}"}) + "\n" for number in range(2))
QRELS = HEADER + "q0\tp0\t1\nq1\tp1\t1\n"
SOUND = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/train.tsv": QRELS}

# The file that is not sound, its bytes, and what the message says after the folder's name.
BAD: dict[str, tuple[str, str | bytes, str]] = {
    "invalid UTF-8": (
        "corpus.jsonl",
        CORPUS.encode() + b'{"_id": "p9", "text": "\xff"}\n',
        "corpus.jsonl:7: found byte 0xff at position 23 of the line (invalid start byte), expected UTF-8; convert the file, e.g. ",
    ),
    "a lone surrogate": (
        "corpus.jsonl",
        CORPUS + r'{"_id": "p9", "text": "\ud800"}' + "\n",
        "corpus.jsonl:7: found lone surrogate U+D800, expected whole characters; write both halves of the pair",
    ),
    "a lone surrogate as id": (
        "queries.jsonl",
        QUERIES + r'{"_id": "\udfff", "text": "x"}' + "\n",
        "queries.jsonl:3: found lone surrogate U+DFFF, expected whole characters; ",
    ),
    "a truncated last line": (
        "corpus.jsonl",
        CORPUS[:-9],
        "corpus.jsonl:6: found broken JSON (Unterminated string starting at at character 23: ",
    ),
    "a truncated last judgement": (
        "qrels/train.tsv",
        QRELS[:-3],
        "qrels/train.tsv:3: found 2 tab-separated columns in 'q1\\tp1', expected 3 (query-id, corpus-id, score); correct the line",
    ),
    "a number out of range": (
        "corpus.jsonl",
        CORPUS + '{"_id": "p9", "text": "x", "m": 1e999}\n',
        "corpus.jsonl:7: found number '1e999' beyond float64, expected a finite number; correct or remove it",
    ),
    "a grade out of range": (
        "qrels/train.tsv",
        HEADER + "q0\tp0\t99999999999\n",
        "qrels/train.tsv:2: found score '99999999999', expected an integer grade of at most 9 digits; write 0 for not relevant, 1 ",
    ),
    "NaN as grade": (
        "qrels/train.tsv",
        HEADER + "q0\tp0\tNaN\n",
        "qrels/train.tsv:2: found score 'NaN', expected an integer grade of at most 9 digits; ",
    ),
    "a key twice": (
        "queries.jsonl",
        '{"_id": "q0", "text": "a", "text": "b"}\n',
        "queries.jsonl:1: found key 'text' twice in one object, expected each key once; keep the right one",
    ),
    "a passage's id twice": (
        "corpus.jsonl",
        CORPUS + '{"_id": "p0", "text": "other"}\n',
        "corpus.jsonl:7: found _id 'p0' again with another text, expected each _id once; rename or remove one",
    ),
    "a query's id twice": (
        "queries.jsonl",
        QUERIES + '{"_id": "q0", "text": "other"}\n',
        "queries.jsonl:3: found _id 'q0' again with another text, expected each _id once; rename or remove one",
    ),
    "a pair's grade twice": (
        "qrels/train.tsv",
        QRELS + "q0\tp0\t2\n",
        "qrels/train.tsv:4: found grade 2 for 'q0' and 'p0', graded 1 above, expected one grade per pair; keep the right line",
    ),
    "007 judged as 7": (
        "qrels/train.tsv",
        QRELS + "q0\t7\t1\n",
        "qrels/train.tsv:4: found corpus-id '7', expected an _id of ",
    ),
    "NUL in an id": (
        "corpus.jsonl",
        CORPUS + r'{"_id": "p\u0000", "text": "x"}' + "\n",
        r"corpus.jsonl:7: found _id 'p\x00', expected a non-empty string (or an integer) without whitespace or NUL; rename the id ",
    ),
    "a stray quote around an id": (
        "qrels/train.tsv",
        HEADER + '"q0"\tp0\t1\n',
        "qrels/train.tsv:2: found query-id '\"q0\"', expected an _id of ",
    ),
    "U+2028 in an id": (
        "corpus.jsonl",
        CORPUS + '{"_id": "p\u2028", "text": "x"}\n',
        r"corpus.jsonl:7: found _id 'p\u2028', expected a non-empty string (or an integer) without whitespace or NUL; ",
    ),
    "10,000 levels": (
        "corpus.jsonl",
        '{"_id": "p9", "text": "x", "m": ' + "[" * 10_000 + "]" * 10_000 + "}\n",
        "corpus.jsonl:1: found nesting deeper than 64, expected at most 64 levels; flatten the object",
    ),
    "an empty corpus": ("corpus.jsonl", "", "corpus.jsonl: 0 rows, expected one JSON object per line; write the file again"),
    "no queries": ("queries.jsonl", "\n\n", "queries.jsonl: 0 rows, expected one JSON object per line; write the file again"),
    "no judgements": ("qrels/train.tsv", "", "qrels/train.tsv: 0 rows, expected at least one below the header query-id<TAB>"),
    "judgements without a header": (
        "qrels/train.tsv",
        "q0\tp0\t1\n",
        "qrels/train.tsv:1: found 'q0\\tp0\\t1', expected the header query-id<TAB>corpus-id<TAB>score; add it as the first line",
    ),
    "a positive missing from the corpus": (
        "qrels/train.tsv",
        QRELS + "q0\tp99\t1\n",
        "qrels/train.tsv:4: found corpus-id 'p99', expected an _id of ",
    ),
    "a judgement of an unknown query": (
        "qrels/train.tsv",
        QRELS + "q99\tp0\t0\n",
        "qrels/train.tsv:4: found query-id 'q99', expected an _id of ",
    ),
    "an empty passage as positive": (
        "corpus.jsonl",
        CORPUS.replace("tea word0", "  "),
        "qrels/train.tsv:2: found passage 'p0', whose text is empty, judged relevant, expected text to find; remove the judgement ",
    ),
    "a query without text": (
        "queries.jsonl",
        QUERIES.replace("tea word1", "\u3000"),
        "queries.jsonl:2: found text '\\u3000', expected a question; write it, or remove the query here and in qrels/",
    ),
    "null for a text": (
        "corpus.jsonl",
        CORPUS + '{"_id": "p9", "text": null}\n',
        'corpus.jsonl:7: found text None (NoneType), expected a string; write the text in quotes, "" for none',
    ),
    "a run to mine from with NaN": ("a.run", "q0 Q0 p1 1 nan t\n", "a.run:1: found score 'nan', expected a finite float32"),
    "a run to mine from with an unknown passage": (
        "a.run",
        "q0 Q0 p1 1 2.5 t\nq0 Q0 ../../x 2 1.5 t\n",
        "a.run:2: found doc_id '../../x', expected an _id of ",
    ),
    "a run to mine from with a passage twice": (
        "a.run",
        "q0 Q0 p1 1 2.5 t\nq0 Q0 p1 2 1.5 t\n",
        "a.run:2: found doc_id 'p1' again for query 'q0', expected each passage once per query; keep the better line",
    ),
    "a run to mine from that is cut": (
        "a.run",
        "q0 Q0 p1 1 2.5 t\nq0 Q0 p2 2",
        "a.run:2: found 4 columns in 'q0 Q0 p2 2', expected 6 (query_id Q0 doc_id rank score tag); correct the line",
    ),
    "an empty run to mine from": ("a.run", "", "a.run: 0 rows, expected at least one line of a run; make the run over "),
}
ODD_IDS = ["007", "7", "../../x", "/etc/passwd", "-rf", "a/b", "x" * 300, "😀", '"quoted"', "NA", "None", "<b>", "\x1b[31m", ".."]
ODD_TEXTS = ["NA", "None", "null", 'a " stray', "U+2028 \u2028 inside", "\ufeffBOM", "nul \x00", "\u202egnp.exe", "<b>", "cr \r in"]


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    (folder / "qrels").mkdir(parents=True)
    for name, content in {**SOUND, **files}.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def odd_files() -> dict[str, str | bytes]:
    """Every odd id and text once on each side, dressed as editors dress files; queries in reverse, so that sides differ."""
    texts = [f"tea number{place} {ODD_TEXTS[place % len(ODD_TEXTS)]}" for place in range(len(ODD_IDS))]
    corpus = [{"_id": text_id, "text": text} for text_id, text in zip(ODD_IDS, texts, strict=True)]
    queries = [{"_id": text_id, "text": text} for text_id, text in zip(ODD_IDS[::-1], texts, strict=True)]
    jsonl = ["".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows) for rows in (corpus, queries)]
    qrels = "".join(f"{query}\t{passage}\t1\r\n" for query, passage in zip(ODD_IDS[::-1], ODD_IDS, strict=True))
    return {"corpus.jsonl": "\ufeff" + jsonl[0], "queries.jsonl": jsonl[1], "qrels/train.tsv": HEADER.replace("\n", "\r\n") + qrels}


@pytest.fixture(scope="module")
def said(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the cases, and exit code, stdout and stderr of each."""
    place = tmp_path_factory.mktemp("collections")
    (place / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    arguments = {}
    for name, (file, content, _) in BAD.items():
        write(place / name, {file: content})
        run = ["--set", "mining.miners.0.kind=run", "--set", f'mining.miners.0.path="{name}/a.run"'] if file == "a.run" else []
        paths = ["--set", f'collection.path="{name}"', "--set", f'run.cache="{name}/cache"']
        arguments[name] = ["recipe.toml", *paths, *run]
    write(place / "odd", odd_files())
    arguments["odd"] = ["recipe.toml", "--set", "collection.path=odd", "--set", "run.cache=odd/cache"]
    return place, run_cases(PROGRAM, "teacher_scores", arguments, place, light=True)


@pytest.mark.parametrize("name", BAD)
def test_a_collection_that_is_not_sound_exits_2_with_its_place_and_nothing_is_made(said: Any, name: str) -> None:
    place, by_name = said
    code, stdout, log = by_name[name]

    assert (code, stdout) == (2, ""), log
    assert "Traceback" not in log
    [line] = [line for line in log.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {name}/{BAD[name][2]}")
    assert line.isprintable()
    assert list((place / name / "cache").rglob("*.arrow")) == []


def test_odd_ids_and_texts_reach_the_table_as_they_were_written(said: Any) -> None:
    place, by_name = said
    code, stdout, log = by_name["odd"]
    assert code == 0, log

    rows = list(ScoreTable.open(place / stdout.strip()).rows())

    positives = {query_id: passage_ids[0] for query_id, passage_ids, _ in rows}
    assert positives == dict(zip(ODD_IDS[::-1], ODD_IDS, strict=True))
    texts = read_collection(place / "odd").passages
    assert [texts[text_id].split(" ", 2)[2] for text_id in ODD_IDS] == [ODD_TEXTS[at % 10] for at in range(len(ODD_IDS))]


def test_ids_never_become_paths(said: Any) -> None:
    place, _ = said

    made = [path.relative_to(place / "odd" / "cache").as_posix() for path in (place / "odd" / "cache").rglob("*")]

    assert made
    assert all(part.isascii() and len(part) < 64 and part not in ODD_IDS for path in made for part in path.split("/"))
    assert not any("x" * 20 in path or "rf" in path or "passwd" in path for path in made)
