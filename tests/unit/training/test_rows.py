"""What the trainer reads: ids joined to texts, columns in the order that is the contract, prompts before each text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.splade import build_student
from sparsekd.training.fit import build_trainer
from sparsekd.training.rows import text_columns, training_rows

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
        texts = [row[column] for column in text_columns(table.num_passages)[1:]]
        assert texts == [collection.passages[passage_id] for passage_id in passage_ids]
        assert row["label"] == labels


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
    columns = text_columns(table.num_passages)
    assert {name.removesuffix("_input_ids") for name in batch if name.endswith("_input_ids")} == set(columns)
    for column in columns:
        prompt = student.get("query_prompt" if column == "query" else "passage_prompt", "")
        expected = model.preprocess([prompt + rows[number][column] for number in range(3)])
        assert batch[f"{column}_input_ids"].equal(expected["input_ids"]), column
        assert batch[f"{column}_attention_mask"].equal(expected["attention_mask"]), column
    assert model.prompts == {"query": student.get("query_prompt", ""), "document": student.get("passage_prompt", "")}
