"""``sparsekd search``, ``encode``, ``export engine`` and ``export onnx`` on a tiny student and a collection with odd texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from typer.testing import CliRunner, Result

from sparsekd.cli import app
from sparsekd.recipe import Run
from sparsekd.retrieval import StudentEncoder, StudentIndex

Ask = Callable[..., Result]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Return what runs ``sparsekd`` with these words."""

    def run(*words: Any) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


@pytest.fixture
def search(ask: Ask, tmp_path: Path, student_folder: Path, collection_folder: Path) -> Ask:
    """Return ``search(query, *options)`` over the small collection."""

    def run(*words: Any) -> Result:
        return ask("search", student_folder, collection_folder, *words, "--indexes", tmp_path / "indexes")

    return run


def brute_force(student: Path, passages: dict[str, str], query: str) -> dict[str, float]:
    """Dense products of the student's own vectors, by passage_id."""
    encoder = StudentEncoder(student, Run())
    vectors = encoder.encode(list(passages.values()), role="passage").toarray()
    query_V = encoder.encode([query], role="query").toarray()[0]
    return dict(zip(passages, (vectors @ query_V).tolist(), strict=True))


def test_search_shows_the_best_passages_in_order_with_their_scores(
    search: Ask, student_folder: Path, passages: dict[str, str]
) -> None:
    result = search("queen england", "--top", 5)

    assert result.exit_code == 0, result.stderr
    heads = [line.split("  ")[:2] for line in result.stdout.splitlines() if not line.startswith("   ")]
    shown = [(head.split(". ", 1)[1], float(score)) for head, score in heads]
    scores = brute_force(student_folder, passages, "queen england")
    expected = sorted(scores.items(), key=lambda each: (-np.float32(round(each[1], 4)), each[0]))[:5]
    assert [passage_id for passage_id, _ in shown] == [passage_id for passage_id, _ in expected]
    assert [score for _, score in shown] == pytest.approx([score for _, score in expected], abs=6e-4)


def test_the_terms_of_an_explained_score_add_up_to_it(search: Ask, student_folder: Path, passages: dict[str, str]) -> None:
    result = search("queen england", "--explain", "p5")

    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("term "))
    products = [float(line.split()[-1]) for line in lines[start + 1 :]]
    assert float(lines[0].split()[-1]) == pytest.approx(sum(products), abs=1e-3 * len(products))
    assert float(lines[0].split()[-1]) == pytest.approx(brute_force(student_folder, passages, "queen england")["p5"], abs=1e-3)
    assert products == sorted(products, reverse=True)


def test_the_index_is_made_once(search: Ask, tmp_path: Path) -> None:
    first, made = search("heat"), list((tmp_path / "indexes").glob("[!.]*"))
    times = [path.stat().st_mtime_ns for path in made]

    second = search("heat")

    assert len(made) == 1
    assert [path.stat().st_mtime_ns for path in (tmp_path / "indexes").glob("[!.]*")] == times
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("heat", "--explain", "p999"), "passage 'p999': not among the 61 passages of the index"),
        (("  ",), "the query is empty"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_in_one_line(search: Ask, words: tuple[str, ...], message: str) -> None:
    result = search(*words)

    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()[-1:]) == 1
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_no_student_is_refused(ask: Ask, tmp_path: Path, collection_folder: Path) -> None:
    result = ask("search", collection_folder, collection_folder, "heat", "--indexes", tmp_path / "indexes")

    assert result.exit_code == 2
    assert "expected a saved SparseEncoder" in result.stderr
    assert not (tmp_path / "indexes").exists()


def test_control_and_direction_characters_are_shown_not_sent_to_the_terminal(
    ask: Ask, tmp_path: Path, student_folder: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    record = {"_id": "a\x1b[31m", "title": "", "text": "heat \x1b]0;owned\x07 \u202e flow <script>" + "x" * 100_000}
    (folder / "corpus.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")

    result = ask("search", student_folder, folder, "heat flow", "--indexes", tmp_path / "indexes")

    assert result.exit_code == 0, result.stderr
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout)
    assert "a␛[31m" in result.stdout
    assert len(result.stdout) < 2000


@pytest.fixture
def texts_file(collection_folder: Path) -> Path:
    return collection_folder / "corpus.jsonl"


def test_encode_writes_the_student_s_vectors_as_lines_and_as_a_matrix(
    ask: Ask, tmp_path: Path, student_folder: Path, texts_file: Path, passages: dict[str, str]
) -> None:
    lines = ask("encode", student_folder, texts_file, tmp_path / "lines")
    matrix = ask("encode", student_folder, texts_file, tmp_path / "matrix", "--form", "csr")

    assert (lines.exit_code, matrix.exit_code) == (0, 0), lines.stderr + matrix.stderr
    expected = StudentEncoder(student_folder, Run()).encode(list(passages.values()), role="passage")
    found = scipy.sparse.load_npz(tmp_path / "matrix" / "vectors.npz")
    np.testing.assert_array_equal(found.toarray(), expected.toarray())
    terms = json.loads((tmp_path / "matrix" / "vocabulary.json").read_text(encoding="utf-8"))
    assert (tmp_path / "matrix" / "ids.txt").read_text(encoding="utf-8").splitlines() == list(passages)
    rows = [json.loads(line) for line in (tmp_path / "lines" / "vectors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(passages)
    dim = {term: number for number, term in enumerate(terms)}
    dense = np.zeros(expected.shape, dtype=np.float32)
    for number, row in enumerate(rows):
        for term, weight in row["vector"].items():
            dense[number, dim[term]] = weight
    np.testing.assert_array_equal(dense, expected.toarray())


def test_encode_queries_puts_the_query_prompt_before_them(ask: Ask, tmp_path: Path, student_folder: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"_id": "q", "text": "heat"}\n', encoding="utf-8")

    assert ask("encode", student_folder, path, tmp_path / "out", "--role", "query", "--form", "csr").exit_code == 0

    found = scipy.sparse.load_npz(tmp_path / "out" / "vectors.npz")
    encoder = StudentEncoder(student_folder, Run())
    np.testing.assert_array_equal(found.toarray(), encoder.encode(["heat"], role="query").toarray())
    assert (found != encoder.encode(["heat"], role="passage")).nnz > 0


def test_encode_refuses_a_target_that_stands_and_a_file_with_a_bad_line(
    ask: Ask, tmp_path: Path, student_folder: Path, texts_file: Path
) -> None:
    (tmp_path / "mine").mkdir()
    texts_file.write_text(texts_file.read_text(encoding="utf-8") + '{"_id": "last", "text": 3}\n', encoding="utf-8")

    stands = ask("encode", student_folder, texts_file.parent / "gone.jsonl", tmp_path / "out")
    bad = ask("encode", student_folder, texts_file, tmp_path / "out")
    texts_file.write_text('{"_id": "a", "text": "heat"}\n', encoding="utf-8")
    mine = ask("encode", student_folder, texts_file, tmp_path / "mine")

    assert (stands.exit_code, bad.exit_code, mine.exit_code) == (2, 2, 2)
    assert "no such file" in stands.stderr
    assert "corpus.jsonl" in bad.stderr
    assert "exists already" in mine.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_index_goes_out_to_an_engine_with_its_queries(
    ask: Ask, tmp_path: Path, student_folder: Path, collection_folder: Path, passages: dict[str, str]
) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": "q1", "text": "queen"}\n', encoding="utf-8")
    words = ("elasticsearch", student_folder, collection_folder, tmp_path / "out", "--queries", queries)

    made = ask("export", "engine", *words, "--indexes", tmp_path / "indexes")
    again = ask("export", "engine", *words, "--indexes", tmp_path / "indexes")

    assert made.exit_code == 0, made.stderr
    assert made.stdout.splitlines()[-1] == str(tmp_path / "out")
    assert "passages 61" in made.stderr
    index = StudentIndex.open(next((tmp_path / "indexes").glob("[!.]*")))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["fields"]["index"] == index.artifact.key
    assert any("queries" in name for name in manifest["files"])
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    assert ask("export", "engine", "solr", *words[1:]).exit_code == 2


@pytest.mark.slow
def test_a_student_goes_out_as_onnx(ask: Ask, tmp_path: Path, student_folder: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)

    made = ask("export", "onnx", student_folder, tmp_path / "out")

    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "largest difference of a weight" in made.stderr


def test_an_index_of_another_collection_is_not_taken_for_this_one(
    search: Ask, collection_folder: Path, tmp_path: Path
) -> None:
    assert search("queen").exit_code == 0
    path = collection_folder / "corpus.jsonl"
    path.write_text('{"_id": "only", "title": "", "text": "queen"}\n', encoding="utf-8")

    changed = search("queen")

    assert [line.split(". ")[1].split()[0] for line in changed.stdout.splitlines() if ". " in line[:4]] == ["only"]
    assert len(list((tmp_path / "indexes").glob("[!.]*"))) == 2
    shutil.rmtree(tmp_path / "indexes")
