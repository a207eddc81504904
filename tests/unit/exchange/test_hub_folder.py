"""A hub folder: loads offline where others load it, trains in their trainer, and tells nothing of the machine it was made on."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import Result

from sparsekd.artifact import Artifact, read_manifest, verify
from sparsekd.collection.beir import read_texts
from sparsekd.experiment import Experiment, score_table, student
from sparsekd.labels.score_table import ScoreTable
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "score_list": ({"calibration": {"kind": "zscore"}}, "SparseMarginMSELoss"),
    "margin": ({}, "SparseMarginMSELoss"),
    "none": ({}, "SparseMultipleNegativesRankingLoss"),
    "similarity": ({}, "SparseCoSENTLoss"),
    "embedding": ({}, "SparseMSELoss"),
}


class Trained(NamedTuple):
    """A student and its table."""

    student: Path
    table: ScoreTable
    collection: Path


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path, tiny_splade_folder: Path) -> Callable[..., Trained]:
    """Return ``train(kind)``: two steps on that kind of labels, made once, under a path that a page could leak."""
    made: dict[str, Trained] = {}
    place = tmp_path_factory.mktemp("home of somebody")  # spaces too
    collection = place / "collection"
    shutil.copytree(sample_folder, collection)

    def trained(kind: str = "score_list", **section: Any) -> Trained:
        name = kind + "".join(section)
        if name in made:
            return made[name]
        labels, loss = KINDS[kind]
        teachers: list[dict[str, Any]] = [{"name": "lexical", "kind": "bm25"}]
        if kind == "embedding":
            teachers.append({"name": "sparse", "kind": "sparse", "model": str(tiny_splade_folder)})
        document = {
            "collection": {"path": str(collection), **section},
            "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
            "teachers": teachers,
            "labels": {"kind": kind, "num_negatives": 2, **labels},
            "student": {"model": str(tiny_splade_folder), "max_length": 32},
            "training": {"loss": loss, "max_steps": 2, "batch_size": 4},
            "run": {"cache": str(place / name), "threads": 1},
        }
        experiment = Experiment(Plan(Recipe.model_validate(document), (f"run.cache={place / name}",)))
        made[name] = Trained(student(experiment).folder, score_table(experiment), collection)
        return made[name]

    return trained


@pytest.fixture(scope="session")
def trained(train: Callable[..., Trained]) -> Trained:
    return train()


@pytest.fixture
def hub(run: Callable[..., Result], tmp_path: Path) -> Callable[..., Path]:
    """Return ``hub(trained, *options)``: the folder made."""

    def make(trained: Trained, *options: str) -> Path:
        out = tmp_path / "out"
        result = run("export", "hub-folder", trained.student, trained.table.artifact.folder, out, *options)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines()[-1] == str(out)
        assert "no licence is stated" in result.stderr
        return out

    return make


def load(folder: Path, cache: Path, name: str | None = None) -> Any:
    from datasets import load_dataset

    return load_dataset(str(folder), name, split="train", cache_dir=str(cache))


def texts_written(folder: Path) -> str:
    """Every file as text, bytes that are none replaced: a path would show."""
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_student_gives_equal_vectors_in_plain_sentence_transformers(trained: Trained, hub: Callable[..., Path]) -> None:
    from sentence_transformers import SparseEncoder

    texts = ["is the sun a star", "bread and rain"]
    ours, theirs = (SparseEncoder(str(folder), device="cpu") for folder in (trained.student, hub(trained) / "student"))

    for encode in ("encode_query", "encode_document"):
        first, second = (getattr(model, encode)(texts, convert_to_sparse_tensor=False) for model in (ours, theirs))
        assert first.any()
        assert first.equal(second)


def test_the_students_manifest_still_lists_every_byte(trained: Trained, hub: Callable[..., Path]) -> None:
    folder = hub(trained) / "student"
    manifest = read_manifest(folder)

    verify(Artifact(folder, manifest))
    listed = {*manifest["files"], "manifest.json"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == listed


def test_rows_are_the_tables_with_the_texts_of_its_ids(trained: Trained, hub: Callable[..., Path], tmp_path: Path) -> None:
    queries, passages = read_texts(trained.collection)

    rows = load(hub(trained) / "scores", tmp_path / "cache")

    assert rows.column_names == ["query", "positive", "negative_1", "negative_2", "label"]
    expected = [
        (queries[query_id], *(passages[each] for each in passage_ids), labels)
        for query_id, passage_ids, labels in trained.table.rows()
    ]
    assert [tuple(row.values()) for row in rows] == expected


def test_the_table_itself_is_there_by_ids(trained: Trained, hub: Callable[..., Path], tmp_path: Path) -> None:
    table = load(hub(trained) / "scores", tmp_path / "cache", "table")

    assert [(row["query_id"], row["passage_ids"], row["gold_sim"]) for row in table] == list(trained.table.rows())


@pytest.mark.parametrize("kind", [kind if kind == "score_list" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_rows_train_a_step_in_sentence_transformers_as_they_are(
    kind: str, train: Callable[..., Trained], hub: Callable[..., Path], tmp_path: Path
) -> None:
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder import losses

    folder = hub(train(kind))
    model = SparseEncoder(str(folder / "student"), device="cpu")
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    settings: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True}
    arguments = SparseEncoderTrainingArguments(
        str(tmp_path / "run"), save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **settings
    )
    loss = getattr(losses, KINDS[kind][1])(model)
    if kind != "embedding":
        loss = losses.SpladeLoss(model, loss, document_regularizer_weight=1e-4, query_regularizer_weight=1e-4)

    done = SparseEncoderTrainer(model, arguments, train_dataset=load(folder / "scores", tmp_path / "cache"), loss=loss).train()

    assert done.global_step == 1
    assert np.isfinite(done.training_loss)
    assert any(not weights.equal(before[name]) for name, weights in model.named_parameters())


@pytest.mark.slow
def test_vectors_are_labels_as_the_teacher_gave_them(
    train: Callable[..., Trained], hub: Callable[..., Path], tmp_path: Path
) -> None:
    made = train("embedding")

    rows = load(hub(made) / "scores", tmp_path / "cache")

    assert np.array_equal(np.array(rows["label"], dtype=np.float32), made.table.vectors().toarray())


def test_nothing_tells_of_the_machine(trained: Trained, hub: Callable[..., Path], tmp_path: Path) -> None:
    hidden = ("home of somebody", str(tmp_path), str(trained.student.parent))
    assert hidden[0] in (trained.student / "manifest.json").read_text(encoding="utf-8")  # there is something to tell

    folder = hub(trained)

    written = texts_written(folder)
    assert [word for word in hidden if word in written] == []
    told = "\n".join(path.read_text(encoding="utf-8") for pattern in ("*.json", "*.md") for path in folder.rglob(pattern))
    assert socket.gethostname() not in re.findall(r"\w+", told)


def test_the_dataset_card_says_what_the_manifest_says(trained: Trained, hub: Callable[..., Path]) -> None:
    card = (hub(trained) / "scores" / "README.md").read_text(encoding="utf-8")
    table = trained.table

    assert f"{len(table)} rows that taught a learned sparse retriever" in card
    assert "Labels of kind `score_list`" in card
    assert "- `lexical`: bm25, weight 1; `{\"b\": 0.4, \"k1\": 0.9}`" in card
    assert f"`{table.teachers[0]['identity']}`" in card
    assert '"calibration": {"kind": "zscore", "scale": 1.0}' in card
    counts, summary = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", card, re.DOTALL))
    assert (counts, summary) == (table.counts, table.summary)


@pytest.mark.parametrize("part", ["student", "scores"])
def test_the_licence_is_left_to_the_owner_and_the_card_says_so(part: str, trained: Trained, hub: Callable[..., Path]) -> None:
    import yaml

    card = (hub(trained) / part / "README.md").read_text(encoding="utf-8")

    _, front, rest = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    assert front.startswith("# license: not stated; see Licence below\n")
    assert "## Licence\n\nNot stated: whoever publishes this decides" in rest


def test_what_a_student_cites_stays_as_it_was(trained: Trained, hub: Callable[..., Path]) -> None:
    before, after = ((folder / "README.md").read_text(encoding="utf-8") for folder in (trained.student, hub(trained) / "student"))

    assert after.partition("\n## Cited\n")[2] == before.partition("\n## Cited\n")[2] != ""


@pytest.mark.parametrize(("section", "options"), [({"publish_texts": False}, []), ({}, ["--without-texts"])])
def test_texts_stay_at_home_where_they_are_not_to_be_published(
    section: dict[str, Any], options: list[str], train: Callable[..., Trained], hub: Callable[..., Path], tmp_path: Path
) -> None:
    made = train(**section)
    folder = hub(made, *options) / "scores"

    queries, passages = read_texts(made.collection)
    assert load(folder, tmp_path / "cache").column_names == ["query_id", "passage_ids", "gold_sim"]
    written = texts_written(folder)
    assert [text for text in (*queries.values(), *passages.values()) if text in written] == []
    assert "No texts: they are left out" in written


def test_a_later_word_of_the_owner_lets_texts_out(train: Callable[..., Trained], hub: Callable[..., Path]) -> None:
    assert (hub(train(publish_texts=False), "--with-texts") / "scores" / "rows.parquet").is_file()


def test_a_student_of_another_table_is_refused(train: Callable[..., Trained], run: Callable[..., Result], tmp_path: Path) -> None:
    ours, other = train(), train("margin")

    result = run("export", "hub-folder", ours.student, other.table.artifact.folder, tmp_path / "out")

    assert result.exit_code == 2
    assert f"was trained on table {ours.table.key}, not on {other.table.key}; give CACHE/tables/{ours.table.key}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_no_student_is_refused(trained: Trained, run: Callable[..., Result], tmp_path: Path) -> None:
    table = trained.table.artifact.folder

    result = run("export", "hub-folder", table, table, tmp_path / "out")

    assert result.exit_code == 1
    assert result.stderr == f"sparsekd: {table}: holds 'score-table', expected a student; give a folder CACHE/students/KEY\n"


def test_a_damaged_student_is_refused(trained: Trained, run: Callable[..., Result], tmp_path: Path) -> None:
    damaged = tmp_path / "student"
    shutil.copytree(trained.student, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    result = run("export", "hub-folder", damaged, trained.table.artifact.folder, tmp_path / "out")

    assert result.exit_code == 1
    assert f"{weights}: checksum " in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_target_that_exists_is_refused_unless_it_is_an_export_to_replace(
    trained: Trained, hub: Callable[..., Path], run: Callable[..., Result], tmp_path: Path
) -> None:
    out = hub(trained)
    (out / "scores" / "rows.parquet").unlink()
    (tmp_path / "mine").mkdir()
    made_of = ("export", "hub-folder", trained.student, trained.table.artifact.folder)

    again = run(*made_of, out)
    foreign = run(*made_of, tmp_path / "mine", "--overwrite")
    replaced = run(*made_of, out, "--overwrite")

    assert (again.exit_code, foreign.exit_code, replaced.exit_code) == (2, 2, 0)
    assert f"{out}: exists already; choose another folder" in again.stderr
    assert "is no export of this program" in foreign.stderr
    assert (out / "scores" / "rows.parquet").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []
