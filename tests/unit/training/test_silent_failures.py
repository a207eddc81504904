"""Sixteen ways in which sentence-transformers trains the wrong thing without a word, and what stops each of them here.

Each test is named after the failure; either our code refuses loudly, or there is no way to say it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from sentence_transformers.sparse_encoder.losses import SparseMarginMSELoss

from sparsekd.artifact import IntegrityError
from sparsekd.collection.beir import Collection
from sparsekd.labels.building import build_table
from sparsekd.labels.contract import Kind, read_metadata
from sparsekd.labels.rows import Rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.students.routes import check_columns, column_prompts, routes
from sparsekd.training.checkpoints import newest_whole_checkpoint, seal
from sparsekd.training.fit import build_trainer
from sparsekd.training.losses import build_loss, check_target_scale
from sparsekd.training.rows import text_columns, training_rows

Make = Callable[..., Any]


class Given(torch.nn.Module):
    """An encoder whose vectors are given."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return 5


def loss_of(make_recipe: Make, num_columns: int, targets: torch.Tensor, *, rows: int = 4, **sections: Any) -> dict[str, Any]:
    """The components of the recipe's loss on random vectors, half of their dims active."""
    generator = torch.Generator().manual_seed(int(targets.sum() * 1e4))
    features = [{"vectors": torch.randn(rows, 5, generator=generator).relu()} for _ in range(num_columns)]
    components: dict[str, Any] = build_loss(Given(), make_recipe(**sections))(features, targets)  # type: ignore[arg-type]
    return components


def refusal_of(make_recipe: Make, **sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        make_recipe(**sections)
    return str(caught.value)


@pytest.fixture
def student_of() -> Make:
    return lambda recipe: build_student(recipe.student, Path(recipe.student.model))


def test_01_a_score_list_without_its_positive_is_not_read_as_margins(
    make_recipe: Make, make_table: Make, collection: Collection, student_of: Make, tmp_path: Path
) -> None:
    margin_mse = SparseMarginMSELoss(Given())  # type: ignore[arg-type]
    vectors = [torch.rand(4, 5) for _ in range(4)]
    assert margin_mse.compute_loss_from_embeddings(vectors, torch.rand(4, 2)).isfinite()  # the library: 2 scores are 2 margins

    with pytest.raises(ValueError, match=r'kind = "score_list" gives rows of 4 texts labels of shape \(3,\), found \(2,\)'):
        loss_of(make_recipe, 4, torch.rand(4, 2), loss="SparseMarginMSELoss")

    # Nor can a column more ("source") make it so: rows with another text column are not trained on.
    recipe = make_recipe(loss="SparseMarginMSELoss")
    rows = training_rows(make_table(recipe), collection)
    transform = rows.format["format_kwargs"]["transform"]
    rows.set_transform(lambda batch: {"source": ["web"] * len(batch["query_id"]), **transform(batch)})
    with pytest.raises(ValueError, match=r"the rows have text columns \['source', 'query', .*\], \[labels\] asks for \['query',"):
        build_trainer(recipe, student_of(recipe), rows, num_passages=3, work_folder=tmp_path / "work", key="key")


def test_02_negatives_and_scores_cut_to_one_length_are_not_read_as_margins(make_recipe: Make) -> None:
    # query, positive and 3 negatives with [positive, negative_1, negative_2]: as many labels as negatives.
    with pytest.raises(ValueError, match=r"gives rows of 5 texts labels of shape \(4,\), found \(3,\); rebuild the table"):
        loss_of(make_recipe, 5, torch.rand(4, 3), loss="SparseMarginMSELoss")


def test_03_margins_with_a_leading_zero_are_not_read_as_scores(make_recipe: Make) -> None:
    margins = {"loss": "SparseMarginMSELoss", "labels": {"kind": "margin"}}

    with pytest.raises(ValueError, match=r'kind = "margin" gives rows of 4 texts labels of shape \(2,\), found \(3,\)'):
        loss_of(make_recipe, 4, torch.cat([torch.zeros(4, 1), torch.rand(4, 2)], dim=1), **margins)


def test_04_every_label_belongs_to_its_own_passage(make_recipe: Make, make_table: Make, collection: Collection) -> None:
    table: ScoreTable = make_table(make_recipe())

    for row in training_rows(table, collection):
        words = {*row["query"].split()}
        overlaps = [len(words & {*row[column].lower().split()}) for column in text_columns("score_list", 3)[1:]]
        assert row["label"] == overlaps  # make_table labels by word overlap

    # And rows in another order are no table.
    with pa.OSFile(str(table.shard_paths[0])) as file:
        schema = pa.ipc.open_stream(file).schema
    with pytest.raises(IntegrityError, match=r"sparsekd.order is 'passage first', expected 'positive first'; rebuild the table"):
        read_metadata(table.shard_paths[0], schema.with_metadata({**schema.metadata, b"sparsekd.order": b"passage first"}))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_05_a_label_that_is_not_finite_makes_no_table(make_recipe: Make, tmp_path: Path, value: float) -> None:
    def broken(teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        scores = np.zeros(len(query_ids), dtype=np.float32)
        scores[-1] = value
        return scores

    rows = Rows(["q1", "q2"], [["a", "b", "c"], ["d", "e", "f"]], {}, 0)
    fields = {"stage": "score-table", "teachers": [{"identity": {"kind": "broken"}, "weight": 1.0}], "calibration": {"kind": "raw"}}
    with pytest.raises(ValueError, match="1 of 6 pairs have no finite gold_sim by teacher 'overlap'"):
        build_table(make_recipe(), rows, cache=tmp_path, fields=fields, gold_sim=broken)
    # What no table holds, a loss can still compute: DistillationTrainer stops there (test_trainer, NonFiniteError).


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-125.0, 125.0, r"spread over 250 in the middle row, so the softmax gives all probability to one passage; .*near 50"),
        (0.98, 0.995, r"spread over 0.015 in the middle row, so the softmax gives almost the same probability to every passage"),
    ],
)
def test_06_scores_off_the_scale_of_the_temperature_do_not_reach_kl(low: float, high: float, says: str) -> None:
    gold_sim = np.linspace(low, high, 12, dtype=np.float32).reshape(1, -1).repeat(5, axis=0)

    with pytest.raises(ValueError, match=says):
        check_target_scale(gold_sim, temperature=2.0)

    check_target_scale(np.linspace(-11, 11, 12, dtype=np.float32).reshape(1, -1), temperature=2.0)  # a cross-encoder's logits


@pytest.mark.parametrize("wrapper", ["SpladeLoss", "CSRLoss"])
def test_07_no_wrapper_stands_around_a_loss_over_vectors(make_recipe: Make, wrapper: str) -> None:
    student = {"kind": "csr"} if wrapper == "CSRLoss" else {}
    document = make_recipe().model_dump(exclude_unset=True)
    document |= {"labels": {"kind": "embedding"}, "teachers": [{"name": "t", "kind": "sparse", "model": "m"}]}
    document["student"] = {"model": "s", **student}
    document["training"] = {"loss": "SparseMSELoss", "wrapper": wrapper}

    with pytest.raises(ValidationError, match=r"SparseMSELoss: the library would pair columns|csr.*cannot learn"):
        Recipe.model_validate(document)


def test_08_the_wrapper_is_the_students_own_and_there_is_always_one(make_recipe: Make) -> None:
    csr = refusal_of(make_recipe, student={"kind": "csr", "dropout": None}, wrapper="SpladeLoss")
    splade = refusal_of(make_recipe, wrapper="CSRLoss")

    assert "trains its autoencoder without reconstruction" in csr
    assert "a splade student has no autoencoder" in splade
    # Scores that no loss reads are refused as well: the library's default loss ignores them.
    assert "would be ignored" in refusal_of(make_recipe, loss="SparseMultipleNegativesRankingLoss")


def test_09_prompts_of_inference_are_those_of_training_and_none_is_misspelt(make_recipe: Make) -> None:
    student = make_recipe(student={"query_prompt": "query: ", "passage_prompt": "passage: "}).student
    columns = text_columns("score_list", 3)

    prompts = column_prompts(student, columns)

    assert prompts == {column: "query: " if column == "query" else "passage: " for column in columns}
    with pytest.raises(ValueError, match="a prompt is set for column 'question', which the rows do not have"):
        check_columns(columns, prompts={"question": "query: "}, routes={})


def test_10_no_query_takes_the_route_of_passages_by_a_misspelt_column(make_recipe: Make) -> None:
    columns = text_columns("score_list", 3)
    mapping = routes(make_recipe(student={"expansion": "passage"}).student, columns)

    assert mapping["query"] == "query"
    with pytest.raises(ValueError, match="a route is set for column 'question', which the rows do not have"):
        check_columns(columns, prompts={}, routes={**mapping, "question": "query"})
    with pytest.raises(ValueError, match="column 'query' has no route"):
        check_columns(columns, prompts={}, routes={column: route for column, route in mapping.items() if column != "query"})


def test_11_no_columns_features_are_found_under_anothers_name() -> None:
    for kind in get_args(Kind):
        columns = text_columns(kind, 13)

        for one, other in itertools.permutations(columns, 2):
            assert not other.startswith(f"{one}_"), (kind, one, other)


def test_12_a_row_has_one_label_whose_name_the_library_knows(make_recipe: Make, make_table: Make, collection: Collection) -> None:
    for kind, loss in (("score_list", "SparseDistillKLDivLoss"), ("margin", "SparseMarginMSELoss")):
        rows = training_rows(make_table(make_recipe(labels={"kind": kind}, loss=loss)), collection)

        assert list(rows[0]) == [*text_columns(kind, 3), "label", "query_id"]


def test_13_a_run_starts_at_the_recipes_lambda_whatever_ran_before(make_recipe: Make, student_of: Make) -> None:
    recipe = make_recipe(student={"lambda_query": 0.2, "lambda_passage": 0.3})
    model = student_of(recipe)
    interrupted = build_loss(model, recipe)
    interrupted.query_regularizer_weight = interrupted.document_regularizer_weight = 9e-7  # a schedule, stopped early

    again = build_loss(model, recipe)

    assert (again.query_regularizer_weight, again.document_regularizer_weight) == (0.2, 0.3)


@pytest.mark.parametrize("changed", ["table", "training", "regularizer"])
def test_14_a_run_of_other_data_or_loss_is_not_resumed(tmp_path: Path, changed: str) -> None:
    fields = {"table": "a", "training": {"loss": "SparseMarginMSELoss"}, "regularizer": {"lambda_query": 0.1}}
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"weights")
    seal(tmp_path / "checkpoint-8", "key", fields)

    with pytest.raises(ValueError, match=rf"checkpoint-8: belongs to experiment key, expected other: {changed}"):
        newest_whole_checkpoint(tmp_path, "other", {**fields, changed: "b"})

    assert newest_whole_checkpoint(tmp_path, "key", fields) == tmp_path / "checkpoint-8"


def test_15_sparsity_does_not_depend_on_how_a_batch_is_cut(make_recipe: Make) -> None:
    """Across processes: test_global_batch."""
    labels, pressed = torch.linspace(0, 1, 64 * 3).reshape(64, 3), {"student": {"lambda_query": 1.0, "lambda_passage": 1.0}}

    whole = loss_of(make_recipe, 4, labels, rows=64, **pressed)
    cut = loss_of(make_recipe, 4, labels, rows=64, wrapper="CachedSpladeLoss", mini_batch_size=4, **pressed)

    assert cut["query_regularizer_loss"].item() == pytest.approx(whole["query_regularizer_loss"].item(), rel=1e-5)
    alone = [loss_of(make_recipe, 4, labels[:4] + n, **pressed)["query_regularizer_loss"].item() for n in range(16)]
    assert np.mean(alone) > 1.1 * whole["query_regularizer_loss"].item()  # what gradient accumulation would have given


def test_16_no_student_is_chosen_by_a_loss_that_holds_a_moving_lambda(
    make_recipe: Make, make_table: Make, collection: Collection, student_of: Make, tmp_path: Path
) -> None:
    recipe = make_recipe(dev_steps=2)
    table = make_table(recipe)

    arguments = build_trainer(
        recipe,
        student_of(recipe),
        training_rows(table, collection),
        num_passages=3,
        work_folder=tmp_path / "work",
        key="key",
        table=table,
        collection=collection,
        first_stage=lambda queries, depth: [list(collection.passages)[:depth] for _ in queries],
    ).args

    assert arguments.eval_strategy == "no"
    assert not arguments.load_best_model_at_end
