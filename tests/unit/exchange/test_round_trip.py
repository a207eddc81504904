"""What is exported and imported again is the same pairs with the same float32 scores, in every layout."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from sparsekd.artifact import read_manifest
from sparsekd.bank.scores import ScoreBank
from sparsekd.collection.beir import read_texts
from sparsekd.exchange.layouts import LAYOUTS
from sparsekd.labels.score_table import ScoreTable
from sparsekd.teachers.identity import file_identity

Run = Callable[..., Result]
Pairs = dict[tuple[str, str], float]

WITH_SCORES = [layout.name for layout in LAYOUTS.values() if layout.carries == "scores"]


def exported(run: Run, layout: str, table: ScoreTable, target: Path) -> Path:
    result = run("export", "table", layout, table.artifact.folder, target)
    assert (result.exit_code, result.stdout) == (0, f"{target}\n"), result.stderr
    return target


def imported(run: Run, layout: str, path: Path, cache: Path, *options: Any) -> Result:
    result = run("import", layout, path, "--name", "them", "--cache", cache, *options)
    assert result.exit_code == 0, result.stderr
    return result


def assert_banked(banked: Callable[..., Any], cache: Path, pairs: Pairs) -> None:
    """The bank holds these pairs, bit by bit, and no others."""
    query_ids, passage_ids = ([pair[side] for pair in pairs] for side in (0, 1))
    assert banked(cache, query_ids, passage_ids).tobytes() == np.array(list(pairs.values()), np.float32).tobytes()
    assert ScoreBank(cache / "bank").open(file_identity("them", {})).num_pairs == len(pairs)


@pytest.mark.parametrize("layout", WITH_SCORES)
def test_scores_come_back_bit_by_bit(
    layout: str, run: Run, table: ScoreTable, pairs: Pairs, banked: Callable[..., Any], tmp_path: Path, sample_folder: Path
) -> None:
    folder = exported(run, layout, table, tmp_path / "out")

    result = imported(run, layout, folder, tmp_path / "cache", "--collection", sample_folder)

    assert result.stdout.splitlines()[-1] == str(ScoreBank(tmp_path / "cache" / "bank").open(file_identity("them", {})).folder)
    assert f"{len(pairs)} pairs: {len(pairs)} added, 0 there already; " in result.stderr
    assert result.stderr.endswith(" repeated, 0 unknown left out\n")
    assert_banked(banked, tmp_path / "cache", pairs)


@pytest.mark.parametrize("layout", [name for name in WITH_SCORES if LAYOUTS[name].refers_to == "texts"])
def test_layouts_of_texts_need_no_collection(
    layout: str, run: Run, table: ScoreTable, pairs: Pairs, banked: Callable[..., Any], tmp_path: Path
) -> None:
    folder = exported(run, layout, table, tmp_path / "out")

    imported(run, layout, folder / LAYOUTS[layout].file_name if layout != "pylate" else folder, tmp_path / "cache")

    assert_banked(banked, tmp_path / "cache", pairs)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [(layout, kind) for layout in ("margins", "msmarco-triples") for kind in LAYOUTS[layout].kinds],
)
def test_triples_come_back_as_the_table_they_are(
    layout: str, kind: str, run: Run, make_table: Callable[..., ScoreTable], tmp_path: Path, sample_folder: Path
) -> None:
    loss = "SparseMultipleNegativesRankingLoss" if kind == "none" else "SparseMarginMSELoss"
    source = make_table(loss, kind=kind)
    folder = exported(run, layout, source, tmp_path / "out")

    result = imported(run, layout, folder, tmp_path / "cache", "--to", "table", "--collection", sample_folder)

    back = ScoreTable.open(Path(result.stdout.splitlines()[-1]))
    assert (back.kind, back.num_passages) == ("margin" if layout == "margins" else "none", 2)
    expected = []
    for query_id, passage_ids, labels in source.rows():
        scores = np.array(labels, np.float32)
        margins = scores[:1] - scores[1:] if kind == "score_list" else scores
        for place, passage_id in enumerate(passage_ids[1:]):
            expected.append((query_id, [passage_ids[0], passage_id], [float(margins[place])] if layout == "margins" else []))
    assert list(back.rows()) == expected
    again = imported(run, layout, folder, tmp_path / "cache", "--to", "table", "--collection", sample_folder)
    assert again.stdout == result.stdout
    assert (
        exported(run, layout, back, tmp_path / "again").joinpath(LAYOUTS[layout].file_name).read_bytes()
        == (folder / LAYOUTS[layout].file_name).read_bytes()
    )


@pytest.mark.parametrize("layout", ["score-dict", "trec-run"])
def test_similarities_are_single_pairs(
    layout: str, run: Run, make_table: Callable[..., ScoreTable], tmp_path: Path, sample_folder: Path, banked: Callable[..., Any]
) -> None:
    similarities = make_table("SparseCoSENTLoss", kind="similarity")
    folder = exported(run, layout, similarities, tmp_path / "out")

    imported(run, layout, folder, tmp_path / "cache", "--collection", sample_folder)

    pairs = {(query_id, passage_id): label for query_id, [passage_id], [label] in similarities.rows()}
    assert_banked(banked, tmp_path / "cache", pairs)


def test_an_import_again_adds_nothing(run: Run, table: ScoreTable, pairs: Pairs, tmp_path: Path) -> None:
    folder = exported(run, "n-tuples", table, tmp_path / "out")
    imported(run, "n-tuples", folder, tmp_path / "cache")

    again = imported(run, "n-tuples", folder, tmp_path / "cache")

    assert f"{len(pairs)} pairs: 0 added, {len(pairs)} there already; " in again.stderr


def test_another_name_or_field_is_another_identity(run: Run, table: ScoreTable, tmp_path: Path, pairs: Pairs) -> None:
    folder = exported(run, "n-tuples", table, tmp_path / "out")
    places = set()

    for options in (["--name", "a"], ["--name", "b"], ["--name", "a", "--field", "x=1"], ["--name", "a", "--field", "x=2"]):
        result = run("import", "n-tuples", folder, "--cache", tmp_path / "cache", *options)
        assert f"{len(pairs)} added" in result.stderr
        places.add(result.stdout)

    assert len(places) == 4


# Example lines, as other projects write them


def examples(folder: Path) -> dict[str, Any]:
    """A file per layout and variant in the words of its own project, all of the same three scores."""
    queries, passages = read_texts(Path(__file__).parents[3] / "data" / "sample")
    query, texts = queries["q01"], [passages[passage_id] for passage_id in ("bread-1", "bread-2", "cake-1")]
    scores, ids = [7.5, -1.25, 3.0], ["bread-1", "bread-2", "cake-1"]

    def write(name: str, content: str) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    def passage(place: int) -> dict[str, Any]:
        return {"docid": ids[place], "title": "", "text": texts[place], "score": scores[place]}

    flat = {"anchor": query, "positive": texts[0], "negative_1": texts[1], "negative_2": texts[2]}
    pq.write_table(pa.table({**{name: [text] for name, text in flat.items()}, "scores": [scores]}), folder / "tuples.parquet")
    with gzip.open(folder / "scores.pkl.gz", "wb") as stream:
        pickle.dump({"q01": dict(zip(ids, scores, strict=True))}, stream)
    (folder / "plain.pkl").write_bytes(pickle.dumps({"q01": dict(zip(ids, [7.5, -1.25, 3], strict=True))}, protocol=0))
    for name, as_text in (("lists", lambda value: value), ("json", json.dumps), ("python", str)):
        place = folder / f"pylate-{name}"
        place.mkdir()
        rows = [{"query_id": 1, "document_ids": as_text(ids), "scores": as_text(scores)}]
        (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (place / "queries.jsonl").write_text(json.dumps({"query_id": 1, "text": query}) + "\n", encoding="utf-8")
        lines = [json.dumps({"document_id": text_id, "text": text}) for text_id, text in zip(ids, texts, strict=True)]
        (place / "documents").mkdir()
        (place / "documents" / "0.jsonl").write_text("\n".join(lines), encoding="utf-8")
        assert ast.literal_eval(str(ids)) == ids
    flag = {"query": query, "pos": texts[:1], "neg": texts[1:], "pos_scores": [7.5], "neg_scores": [-1.25, 3], "prompt": "p"}
    sides = {"positive_passages": [passage(0)], "negative_passages": [passage(1), passage(2)]}
    lines = [f"q01 Q0 {text_id} {rank} {score} them\n" for rank, (text_id, score) in enumerate(zip(ids, scores, strict=True))]
    return {
        "n-tuples as Parquet": ("n-tuples", folder / "tuples.parquet"),
        "n-tuples as JSON Lines": ("n-tuples", write("tuples.jsonl", json.dumps({**flat, "label": scores}))),
        "score-dict gzipped": ("score-dict", folder / "scores.pkl.gz"),
        "score-dict in protocol 0": ("score-dict", folder / "plain.pkl"),
        "flagembedding": ("flagembedding", write("flag.jsonl", json.dumps(flag))),
        "tevatron": ("tevatron", write("tevatron.jsonl", json.dumps({"query_id": 1, "query": query, **sides}))),
        "trec-run": ("trec-run", write("a.run", "".join(lines))),
        "colbert": ("colbert", write("nway.json", json.dumps(["q01", *map(list, zip(ids, scores, strict=True))]) + "\n")),
        **{f"pylate of {name}": ("pylate", folder / f"pylate-{name}") for name in ("lists", "json", "python")},
    }


@pytest.mark.parametrize("name", [
    "n-tuples as Parquet", "n-tuples as JSON Lines", "score-dict gzipped", "score-dict in protocol 0", "flagembedding", "tevatron",
    "trec-run", "colbert", "pylate of lists", "pylate of json", "pylate of python",
])  # fmt: skip
def test_what_other_projects_write_is_read(
    name: str, run: Run, tmp_path: Path, sample_folder: Path, banked: Callable[..., Any]
) -> None:
    layout, path = examples(tmp_path)[name]

    imported(run, layout, path, tmp_path / "cache", "--collection", sample_folder)

    assert_banked(banked, tmp_path / "cache", {("q01", "bread-1"): 7.5, ("q01", "bread-2"): -1.25, ("q01", "cake-1"): 3.0})


def test_a_title_is_joined_to_its_text_as_in_a_collection(
    run: Run, tmp_path: Path, sample_folder: Path, banked: Callable[..., Any]
) -> None:
    queries, passages = read_texts(sample_folder)
    passage = {"docid": "x", "title": "Bread", "text": passages["bread-1"].removeprefix("Bread "), "score": 2}
    (tmp_path / "t.jsonl").write_text(json.dumps({"query": queries["q01"], "positive_passages": [passage]}), encoding="utf-8")

    imported(run, "tevatron", tmp_path / "t.jsonl", tmp_path / "cache", "--collection", sample_folder)

    assert_banked(banked, tmp_path / "cache", {("q01", "bread-1"): 2.0})


def test_ids_that_are_numbers_are_written_and_read_as_numbers(run: Run, tmp_path: Path, sample_folder: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "corpus.jsonl").write_text('{"_id": 7, "text": "a"}\n{"_id": "12", "text": "b"}\n', encoding="utf-8")
    (tmp_path / "c" / "queries.jsonl").write_text('{"_id": "3", "text": "q"}\n', encoding="utf-8")
    (tmp_path / "nway.jsonl").write_text("[3, [7, 1.5], [12, 2]]\n", encoding="utf-8")

    result = imported(run, "colbert", tmp_path / "nway.jsonl", tmp_path / "cache", "--collection", tmp_path / "c")

    assert "2 pairs: 2 added" in result.stderr


def test_pairs_that_the_collection_does_not_have_are_left_out_and_counted_when_told_so(
    run: Run, tmp_path: Path, sample_folder: Path, banked: Callable[..., Any]
) -> None:
    lines = ["q01 Q0 bread-1 1 2.5 t", "q01 Q0 gone 2 2.0 t", "q99 Q0 bread-1 1 1.5 t", "q01 Q0 bread-1 3 2.5 t"]
    (tmp_path / "a.run").write_text("\n".join(lines) + "\n", encoding="utf-8")

    result = imported(run, "trec-run", tmp_path / "a.run", tmp_path / "cache", "--collection", sample_folder, "--skip-unknown")

    assert result.stderr == "1 pairs: 1 added, 0 there already; 1 repeated, 2 unknown left out\n"
    assert_banked(banked, tmp_path / "cache", {("q01", "bread-1"): 2.5})


def test_an_export_says_what_it_was_made_from(run: Run, table: ScoreTable, tmp_path: Path) -> None:
    manifest = read_manifest(exported(run, "colbert", table, tmp_path / "out"))

    assert (manifest["kind"], manifest["fields"]["layout"], manifest["fields"]["table"]) == ("export", "colbert", table.key)
    assert manifest["counts"] == {"rows": len(table)}
    assert manifest["labels"] == {"kind": "score_list", "teachers": table.teachers, "calibration": {"kind": "raw"}}


def test_an_export_says_that_scores_were_rescaled(run: Run, make_table: Callable[..., ScoreTable], tmp_path: Path) -> None:
    rescaled = make_table(rescale={"kind": "zscore", "scale": 2.0})

    labels = read_manifest(exported(run, "colbert", rescaled, tmp_path / "out"))["labels"]

    assert labels["rescale"] == {"kind": "zscore", "scale": 2.0}
    assert labels["calibration"] == {"kind": "raw"}


def test_the_same_table_gives_the_same_bytes(run: Run, table: ScoreTable, tmp_path: Path) -> None:
    for layout in LAYOUTS.values():
        first, second = (exported(run, layout.name, table, tmp_path / f"{layout.name}-{number}") for number in (1, 2))

        assert (first / layout.file_name).read_bytes() == (second / layout.file_name).read_bytes()


def test_a_triple_that_comes_twice_counts_once(run: Run, tmp_path: Path, sample_folder: Path) -> None:
    (tmp_path / "triples.tsv").write_text("q01\tbread-1\tbread-2\n" * 2 + "q01\tbread-1\tcake-1\n", encoding="utf-8")

    result = imported(run, "msmarco-triples", tmp_path, tmp_path / "cache", "--to", "table", "--collection", sample_folder)

    assert result.stderr == "2 rows of kind none; 1 repeated\n"


def test_a_folder_of_shards_is_read_whole_and_nothing_else(
    run: Run, tmp_path: Path, banked: Callable[..., Any], sample_folder: Path
) -> None:
    for name, score in (("train-0.jsonl", 1.0), ("train-1.jsonl", 2.0), ("train_old.jsonl", 3.0), ("trainer.jsonl", 4.0)):
        passage = f"bread-{int(score)}"
        (tmp_path / name).write_text(json.dumps({"anchor": "q", "positive": passage, "score": score}), encoding="utf-8")

    assert "2 pairs: 2 added" in imported(run, "n-tuples", tmp_path, tmp_path / "cache").stderr


def test_two_kinds_of_file_in_a_folder_leave_open_which_is_meant(run: Run, tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.parquet"):
        (tmp_path / name).write_bytes(b"")

    result = run("import", "n-tuples", tmp_path, "--name", "them", "--cache", tmp_path / "cache")

    assert result.exit_code == 2
    assert result.stderr == f"sparsekd: {tmp_path}: holds train as .parquet and as .jsonl; give the file that is meant\n"
