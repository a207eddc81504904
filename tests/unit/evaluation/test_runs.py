"""Run files: the order, the digits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsekd.evaluation.runs import Ranking, ranked, read_trec_run, write_trec_run


def test_best_come_first_and_ties_go_by_passage_id() -> None:
    ranking = ranked(["p10", "p9", "p1", "p2"], [0.5, 0.5, -1.0, 0.5])

    assert ranking.passage_ids == ["p10", "p2", "p9", "p1"]
    assert ranking.scores.tolist() == [0.5, 0.5, 0.5, -1.0]
    assert ranking.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("passage_ids", "scores", "message"),
    [
        (["a", "b"], [1.0], "2 passage_ids, scores of shape"),
        (["a", "b"], [1.0, np.nan], r"1 of 2 scores are not finite \(first: passage 'b'\)"),
        (["a", "b", "a"], [3.0, 2.0, 1.0], "passage 'a' occurs twice"),
    ],
)
def test_what_is_no_ranking_is_refused(passage_ids: list[str], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranked(passage_ids, scores)


def test_a_run_file_has_the_six_trec_columns(tmp_path: Path) -> None:
    path = tmp_path / "bm25.run"

    write_trec_run(path, {"q2": ranked(["d1", "d2"], [0.1, 3.0]), "q1": ranked([], []), "q0": ranked(["é"], [1e-8])}, "bm25")

    assert path.read_bytes().decode("utf-8") == "q2 Q0 d2 1 3.0 bm25\nq2 Q0 d1 2 0.1 bm25\nq0 Q0 é 1 1e-08 bm25\n"


def test_reading_back_gives_equal_ids_and_bit_equal_scores(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, size=20_000, dtype=np.uint32)
    scores = bits.view(np.float32)
    scores = np.concatenate([scores[np.isfinite(scores)], np.float32([0, 1e-45, 3.4028235e38, 16777216, 0.1])])
    rankings = {"q": ranked([f"d{number}" for number in range(len(scores))], scores)}
    path = tmp_path / "run"

    write_trec_run(path, rankings, "tag")

    found = read_trec_run(path)["q"]
    assert found.passage_ids == rankings["q"].passage_ids
    assert found.scores.tobytes() == rankings["q"].scores.tobytes()


@pytest.mark.parametrize("odd", ["007", "../../x", "-rf", "x" * 300, '"q', "NA", "None", "#", "Q0", "1e5", "\x1b[31m", "😀"])
def test_an_odd_id_comes_back_as_it_was(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "run"

    write_trec_run(path, {odd: ranked(["a", odd], [2.0, 1.0])}, "tag")

    assert {query_id: ranking.passage_ids for query_id, ranking in read_trec_run(path).items()} == {odd: ["a", odd]}


def test_the_score_column_decides_whatever_the_order_of_lines_and_queries_may_interleave(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("q Q0 b 7 1 x\nr Q0 b 1 4 x\n\nq\tQ0\ta\t1\t1\tx\nq Q0 c 1 2.5 x\n", encoding="utf-8")

    found = read_trec_run(path)

    assert {query_id: ranking.passage_ids for query_id, ranking in found.items()} == {"q": ["c", "a", "b"], "r": ["b"]}


@pytest.mark.parametrize("bad", ["a b", "", "a\tb", "a\u00a0b", "a\x00b", "a\n"])
def test_an_id_that_would_break_a_column_is_refused_before_anything_is_written(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "run"
    hit = Ranking([bad], np.ones(1, dtype=np.float32))

    with pytest.raises(ValueError, match=r"run file: doc_id .* is empty or holds whitespace or NUL"):
        write_trec_run(path, {"q": hit}, "tag")
    with pytest.raises(ValueError, match=r"run file: query_id .* rename it in the collection"):
        write_trec_run(path, {bad: ranked([], [])}, "tag")
    with pytest.raises(ValueError, match="run file: tag "):
        write_trec_run(path, {}, bad)
    assert not path.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 b 2 0.5", "run:2: found 5 columns"),
        ("q Q0 a 2 0.5 x", "run:2: found doc_id 'a' again for query 'q'"),
        ("q Q0 b 2 nan x", "run:2: found score 'nan', expected a finite float32"),
        ("q Q0 b 2 1e39 x", "run:2: found score '1e39'"),
        ("q Q0 b 2 high x", "run:2: found score 'high'"),
        ("q Q0 b 2 1_000 x", "run:2: found score '1_000'"),
        ("q Q0 b 2 \u0661 x", "run:2: found score '\u0661'"),
        ("q Q0 b 2 0x10 x", "run:2: found score '0x10'"),
        ("q Q0 b 2 " + "9" * 5000 + " x", "run:2: found score '9999"),
    ],
)
def test_a_malformed_line_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text(f"q Q0 a 1 1.0 x\n{line}\n", encoding="utf-8")

    with pytest.raises(ValueError, match=message):
        read_trec_run(path)


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.run"):
        read_trec_run(tmp_path / "none.run")
