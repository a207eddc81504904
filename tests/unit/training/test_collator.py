"""A batch is what the library's own collator makes of the same rows, without a call of the tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.data_collator import SparseEncoderDataCollator

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.packed_body import packed
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.students.fast import fast_student
from sparsekd.students.routes import column_prompts, routes
from sparsekd.training.collator import RowCollator, padded_features, text_columns_of, token_columns
from sparsekd.training.fit import build_trainer, train, untrained_student
from sparsekd.training.rows import ID_COLUMN, LABEL_COLUMN, training_rows

PROMPTS = {"query_prompt": "which ", "passage_prompt": "the text of "}


def rows_of(labels: list[Any] | None = None) -> Dataset:
    columns: dict[str, Any] = {
        "query": ["a cat", "where is the war", "x"],
        "positive": ["the cat and the dog in the rain", "france", "a long text " * 12],
        "negative_1": ["", "the sun", "a bird"],
    }
    if labels is not None:
        columns[LABEL_COLUMN] = labels
    return Dataset.from_dict({**columns, ID_COLUMN: ["q1", "q2", "q3"]})


def both(model: SparseEncoder, recipe: Recipe, rows: Dataset, cache: Path) -> tuple[RowCollator, Any]:
    """Our collator, and the library's with the same prompts and routes."""
    columns = text_columns_of(rows[0])
    prompts, mapping = column_prompts(recipe.student, columns), routes(recipe.student, columns)
    tokens = token_columns(model, rows, columns, prompts=prompts, routes=mapping, cache=cache)
    settings: dict[str, Any] = {"prompts": prompts, "router_mapping": mapping}
    return (
        RowCollator(model.preprocess, tokens=tokens, **settings),
        SparseEncoderDataCollator(model.preprocess, valid_label_columns=[LABEL_COLUMN], **settings),
    )


def assert_equal_batches(ours: dict[str, Any], library: dict[str, Any]) -> None:
    assert ours.pop(ID_COLUMN) == ["q1", "q2", "q3"]
    unneeded = {name for name in library if name.endswith("seq_idx")}  # flash attention's other way to say cu_seq_lens
    assert ours.keys() == library.keys() - unneeded
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == library[name].dtype, name
            assert torch.equal(value, library[name]), name
        else:
            assert value == library[name], name


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["", "prompts"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("expansion", ["both", "passage", "query"])
def test_a_batch_is_the_librarys(
    make_recipe: Callable[..., Recipe], tmp_path: Path, expansion: str, is_packed: bool, prompts: dict[str, str]
) -> None:
    recipe = make_recipe(student={"expansion": expansion, **prompts})
    model = build_student(recipe.student, Path(recipe.student.model), ["a cat", "the dog"])
    rows = rows_of([[2.0, 1.0], [1.0, 0.25], [0.0, 3.0]])
    collator, library = both(model, recipe, rows, tmp_path)

    with packed(model) if is_packed else contextlib.nullcontext():
        ours, theirs = collator(list(rows)), library([{k: v for k, v in row.items() if k != ID_COLUMN} for row in rows])

    transformed = {"both": 3, "passage": 2, "query": 1}[expansion]
    assert sum(name.endswith("cu_seq_lens_q") for name in ours) == (transformed if is_packed else 0)
    assert_equal_batches(ours, theirs)


def test_rows_without_a_label_make_a_batch_without_one(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, rows = make_recipe(), rows_of()
    model = build_student(recipe.student, Path(recipe.student.model))
    collator, library = both(model, recipe, rows, tmp_path)

    assert_equal_batches(collator(list(rows)), library([{k: v for k, v in row.items() if k != ID_COLUMN} for row in rows]))


@pytest.mark.parametrize(
    "labels",
    [[1.0, 0.5, 0.25], [[1, 2], [3, 4], [5, 6]], [torch.ones(4).double(), torch.zeros(4).double(), torch.ones(4).double()]],
    ids=["scalars", "integers", "tensors"],
)
def test_labels_are_float32(make_recipe: Callable[..., Recipe], tmp_path: Path, labels: list[Any]) -> None:
    recipe, rows = make_recipe(), rows_of()
    model = build_student(recipe.student, Path(recipe.student.model))
    collator, _ = both(model, recipe, rows, tmp_path)

    batch = collator([{**row, LABEL_COLUMN: label} for row, label in zip(rows, labels, strict=True)])

    expected = torch.stack([torch.as_tensor(label, dtype=torch.float32) for label in labels])
    assert batch[LABEL_COLUMN].dtype == torch.float32
    assert torch.equal(batch[LABEL_COLUMN], expected)


def test_padding_goes_to_the_side_that_the_tokenizer_pads(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, rows = make_recipe(), rows_of()
    model = build_student(recipe.student, Path(recipe.student.model))
    model[0].tokenizer.padding_side = "left"
    collator, _ = both(model, recipe, rows, tmp_path)
    texts = rows["positive"]

    features = padded_features(collator.tokens["positive"].texts.ids(texts), model[0])

    for name, expected in model[0].preprocess(texts).items():
        assert torch.equal(features[name], expected) if isinstance(expected, torch.Tensor) else features[name] == expected


@pytest.fixture
def counting_tokenizers() -> Callable[[SparseEncoder], list[int]]:
    """Return ``count(model)``: a list that grows by the number of texts at each call of a tokenizer of the model's transformers."""

    def count(model: SparseEncoder) -> list[int]:
        from sentence_transformers.base.modules import Transformer

        calls: list[int] = []
        for module in model.modules():
            if isinstance(module, Transformer):
                kind: Any = type(module.tokenizer)

                class Counting(kind):  # type: ignore[misc]
                    def __call__(self, texts: Any, **kwargs: Any) -> Any:
                        calls.append(len(texts))
                        return super().__call__(texts, **kwargs)

                module.tokenizer.__class__ = Counting
        return calls

    return count


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["", "prompts"])
def test_no_tokenizer_is_called_while_training(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    counting_tokenizers: Callable[[SparseEncoder], list[int]],
    prompts: dict[str, str],
) -> None:
    recipe = make_recipe(student=prompts, max_steps=8)
    table = make_table(recipe)
    model = untrained_student(recipe, collection)
    rows = training_rows(table, collection)
    trainer = build_trainer(recipe, model, rows, num_passages=table.num_passages, work_folder=tmp_path / "work", key="key")
    with fast_student(model, packed=True, fused=True):
        calls = counting_tokenizers(model)

        trainer.train()

    assert calls in ([], [1, 1])  # the length of each prompt, once
    assert trainer.state.global_step == 8


def test_texts_are_tokenised_once_for_two_trainings(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    for number, rate in enumerate((1e-3, 1e-4)):
        recipe = make_recipe(max_steps=1, learning_rate=rate)
        trained = train(recipe, make_table(recipe), collection, work_folder=tmp_path / f"work-{number}", key="key")

    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    table = make_table(recipe)
    texts = {collection.queries[query_id] for query_id, _, _ in table.rows()}
    texts |= {collection.passages[passage_id] for _, passage_ids, _ in table.rows() for passage_id in passage_ids}
    assert trained.counts["texts"] == len(texts)
    assert 0 < trained.counts["texts_cut"] < len(texts)
