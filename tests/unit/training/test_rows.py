"""What the trainer reads: ids joined to texts, columns in the order that is the contract, prompts before each text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.collection.beir import Collection
from sparsekd.labels.building import build_table, table_fields
from sparsekd.labels.rows import Rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.labels.vectors import vocabulary_digest
from sparsekd.recipe import Labels, Recipe, Teacher
from sparsekd.students.building import build_student
from sparsekd.training.fit import build_trainer
from sparsekd.training.rows import check_vector_space, text_columns, training_rows

MARGIN = {"labels": {"kind": "margin"}, "loss": "SparseMarginMSELoss"}


def test_columns_are_query_positive_negatives_and_label(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection
) -> None:
    rows = training_rows(make_table(make_recipe()), collection)

    assert list(rows[0]) == ["query", "positive", "negative_1", "negative_2", "label", "query_id"]


@pytest.mark.parametrize("settings", [{}, MARGIN], ids=["score-list", "margin"])
def test_rows_hold_the_tables_texts_and_labels_in_its_order(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, settings: dict[str, Any]
) -> None:
    table = make_table(make_recipe(**settings))

    rows = training_rows(table, collection)

    assert len(rows) == len(table)
    for row, (query_id, passage_ids, labels) in zip(rows, table.rows(), strict=True):
        assert row["query_id"] == query_id
        assert row["query"] == collection.queries[query_id]
        texts = [row[column] for column in text_columns(table.kind, table.num_passages)[1:]]
        assert texts == [collection.passages[passage_id] for passage_id in passage_ids]
        assert row["label"] == labels


CONTRASTIVE = "SparseMultipleNegativesRankingLoss"
SIMILARITY = {"labels": {"kind": "similarity"}, "loss": "SparseCoSENTLoss"}


def test_bare_rows_have_no_label(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection
) -> None:
    labels = {"kind": "none", "num_negatives": 0}, {"kind": "none", "layout": "triplets"}
    pairs, triplets = (training_rows(make_table(make_recipe(labels=part, loss=CONTRASTIVE)), collection) for part in labels)

    assert list(pairs[0]) == ["query", "positive", "query_id"]
    assert list(triplets[0]) == ["query", "positive", "negative_1", "query_id"]
    assert len(triplets) == 2 * len(pairs)
    assert triplets[1]["positive"] == triplets[0]["positive"] != triplets[1]["negative_1"]


def test_similarities_are_numbers_beside_two_texts(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection
) -> None:
    table = make_table(make_recipe(**SIMILARITY))

    rows = training_rows(table, collection)

    assert list(rows[0]) == ["sentence_A", "sentence_B", "label", "query_id"]
    for row, (query_id, [passage_id], [similarity]) in zip(rows, table.rows(), strict=True):
        assert (row["sentence_A"], row["sentence_B"]) == (collection.queries[query_id], collection.passages[passage_id])
        assert row["label"] == similarity


class DrawnVectors:
    """A VectorSource: three weights per text, drawn by its id."""

    def __init__(self, vocabulary: dict[str, int], dimension: int) -> None:
        self.vocabulary: dict[str, int] | None = vocabulary
        self._dimension = dimension

    def vectors(self, role: str, text_ids: Sequence[str]) -> scipy.sparse.csr_matrix:
        dense = np.zeros((len(text_ids), self._dimension), dtype=np.float32)
        for row, text_id in enumerate(text_ids):
            generator = np.random.default_rng(list(f"{role} {text_id}".encode()))
            dense[row, generator.choice(self._dimension, 3, replace=False)] = generator.uniform(0.5, 2.0, 3)
        return scipy.sparse.csr_matrix(dense)


@pytest.fixture
def vector_table(
    tmp_path: Path, collection: Collection, make_recipe: Callable[..., Recipe]
) -> Callable[[dict[str, int], int], ScoreTable]:
    """Return ``make(vocabulary, dimension)``: a table of drawn vectors over the texts of two queries."""

    def make(vocabulary: dict[str, int], dimension: int) -> ScoreTable:
        teacher = Teacher(name="vectors", kind="sparse", model="somewhere")
        recipe = make_recipe().model_copy(update={"teachers": (teacher,), "labels": Labels(kind="embedding", num_negatives=2)})
        query_ids, passage_ids = list(collection.qrels["train"])[:2], list(collection.passages)[:4]
        rows = Rows(query_ids, [passage_ids[:3], passage_ids[1:]], {}, 0)
        fields = table_fields(recipe, "candidates", {"vectors": {"weights": "drawn"}})
        source = DrawnVectors(vocabulary, dimension)
        cache = tmp_path / vocabulary_digest(vocabulary) / str(dimension)
        return build_table(recipe, rows, cache=cache, fields=fields, vectors=source)

    return make


def test_vectors_are_made_dense_when_a_batch_is_read(vector_table: Any, collection: Collection) -> None:
    import torch

    table = vector_table({"a": 0}, 20)

    rows = training_rows(table, collection)

    assert rows.data.column_names == ["role", "text_id", "indices", "values"]  # in memory: sparse
    assert list(rows[0]) == ["sentence", "label", "query_id"]
    batch = rows[:]
    labels = torch.stack(batch["label"])
    assert labels.dtype == torch.float32
    assert labels.tolist() == table.vectors().toarray().tolist()
    ids = [("query", query_id) for query_id in table.texts()["query"]] + [("passage", pid) for pid in table.texts()["passage"]]
    assert batch["query_id"] == [f"{role} {text_id}" for role, text_id in ids]
    assert batch["sentence"] == [(collection.queries if role == "query" else collection.passages)[text_id] for role, text_id in ids]


def test_a_teacher_of_another_width_or_vocabulary_than_the_student_is_refused(
    vector_table: Any, make_recipe: Callable[..., Recipe], tiny_headless_folder: Path
) -> None:
    model = build_student(make_recipe().student, tiny_headless_folder)
    ours, width = model.tokenizer.get_vocab(), model.get_embedding_dimension()
    swapped = {**ours, "cat": ours["dog"], "dog": ours["cat"]}

    check_vector_space(vector_table(ours, width), model)
    with pytest.raises(ValueError, match=rf"the teacher's vectors have 20 dims, the student's have {width}; choose a student"):
        check_vector_space(vector_table(ours, 20), model)
    digests = f"{vocabulary_digest(swapped)[:12]}.*{vocabulary_digest(ours)[:12]}"
    with pytest.raises(ValueError, match=rf"the vocabulary of the teacher of .*{digests}\): the same dim would mean another term"):
        check_vector_space(vector_table(swapped, width), model)


def test_a_table_of_another_kind_has_no_space_to_fit(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], tiny_headless_folder: Path
) -> None:
    check_vector_space(make_table(make_recipe()), build_student(make_recipe().student, tiny_headless_folder))


@pytest.mark.parametrize(("kind", "num_passages"), [("score_list", 30), ("similarity", 1), ("embedding", 0)])
def test_no_columns_name_begins_anothers(kind: Any, num_passages: int) -> None:
    columns = text_columns(kind, num_passages)

    for column in columns:
        assert [other for other in columns if f"{other}_input_ids".startswith(f"{column}_")] == [column]


def test_texts_are_joined_when_a_batch_is_read(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection
) -> None:
    changing = replace(collection, queries=dict(collection.queries))
    rows = training_rows(make_table(make_recipe()), changing)
    query_id = rows[3]["query_id"]

    changing.queries[query_id] = "read late"

    assert rows[3]["query"] == "read late"
    assert rows.data.column_names == ["query_id", "passage_ids", "gold_sim"]  # in memory: ids and labels only


@pytest.mark.parametrize("what", ["query", "passage"])
def test_an_id_that_the_collection_lacks_is_named(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, what: str
) -> None:
    table = make_table(make_recipe())
    query_id, passage_ids, _ = list(table.rows())[-1]
    unknown = query_id if what == "query" else passage_ids[-1]
    texts = collection.queries if what == "query" else collection.passages
    smaller = replace(
        collection,
        **{"queries" if what == "query" else "passages": {known: text for known, text in texts.items() if known != unknown}},
    )

    with pytest.raises(ValueError, match=rf"{what} '{unknown}' is not in the collection; rebuild the table"):
        training_rows(table, smaller)


@pytest.mark.parametrize(
    "student",
    [{}, {"query_prompt": "which ", "passage_prompt": "the "}, {"query_prompt": "which "}, {"passage_prompt": "number one "}],
)
def test_each_column_reaches_the_model_under_its_prompt_as_encode_would_give_it(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    student: dict[str, str],
) -> None:
    recipe = make_recipe(student=student)
    table = make_table(recipe)
    rows = training_rows(table, collection)
    model = build_student(recipe.student, Path(recipe.student.model))
    trainer = build_trainer(recipe, model, rows, num_passages=table.num_passages, work_folder=tmp_path / "work", key="key")

    batch = trainer.data_collator([rows[number] for number in range(3)])  # type: ignore[no-untyped-call]

    assert batch.pop("query_id") == [rows[number]["query_id"] for number in range(3)]
    assert batch.pop("label").tolist() == [rows[number]["label"] for number in range(3)]
    columns = text_columns(table.kind, table.num_passages)
    assert {name.removesuffix("_input_ids") for name in batch if name.endswith("_input_ids")} == set(columns)
    for column in columns:
        prompt = student.get("query_prompt" if column == "query" else "passage_prompt", "")
        expected = model.preprocess([prompt + rows[number][column] for number in range(3)])
        assert batch[f"{column}_input_ids"].equal(expected["input_ids"]), column
        assert batch[f"{column}_attention_mask"].equal(expected["attention_mask"]), column
    assert model.prompts == {"query": student.get("query_prompt", ""), "document": student.get("passage_prompt", "")}
