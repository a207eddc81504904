"""Training as a function of recipe, table and collection: what changes the weights and what cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.students.fast import decoder_of
from sparsekd.training.fit import TrainedStudent, train, untrained_student

MARGIN_MSE = "SparseMarginMSELoss"


@pytest.fixture
def fit(make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path) -> Callable[..., TrainedStudent]:
    """Return ``fit(recipe, table=None, of=collection)``: a training from scratch in a folder of its own."""
    folders = iter(range(100))

    def run(recipe: Recipe, table: ScoreTable | None = None, of: Collection | None = None) -> TrainedStudent:
        work_folder = tmp_path / f"work-{next(folders)}"
        return train(recipe, table or make_table(recipe), of or collection, work_folder=work_folder, key="key")

    return run


def equal_weights(left: TrainedStudent, right: TrainedStudent) -> bool:
    pairs = zip(left.model.state_dict().items(), right.model.state_dict().items(), strict=True)
    return all(one == other and torch.equal(tensor, counterpart) for (one, tensor), (other, counterpart) in pairs)


def test_two_trainings_give_equal_weights(make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent]) -> None:
    recipe = make_recipe(student={"dropout": 0.1})

    assert equal_weights(fit(recipe), fit(recipe))


def test_the_seed_orders_the_rows_and_draws_the_dropout(
    make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent]
) -> None:
    assert not equal_weights(fit(make_recipe(seed=1)), fit(make_recipe(seed=2)))


def test_run_settings_change_no_weight(make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent]) -> None:
    run = {"save_steps": 1, "log_level": "WARNING", "batch_tokens": 16, "shard_pairs": 3}

    assert equal_weights(fit(make_recipe(run=run)), fit(make_recipe()))


def test_the_fused_head_trains_the_same_student_up_to_rounding(
    make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent]
) -> None:
    # Adam divides a gradient by its own size, so rounding shows where a gradient is 0; the loss of later steps is the measure.
    fused, plain = (fit(make_recipe(max_steps=10, learning_rate=1e-4, run={"fused_head": head})) for head in (True, False))

    losses = [[entry["loss"] for entry in trained.log_history if "loss" in entry] for trained in (fused, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_prompts_train_as_if_they_were_written_before_every_text(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    fit: Callable[..., TrainedStudent],
    collection: Collection,
) -> None:
    table = make_table(make_recipe())
    written = replace(
        collection,
        queries={query_id: f"which {text}" for query_id, text in collection.queries.items()},
        passages={passage_id: f"the {text}" for passage_id, text in collection.passages.items()},
    )

    prompted = fit(make_recipe(student={"query_prompt": "which ", "passage_prompt": "the "}), table)

    assert equal_weights(prompted, fit(make_recipe(), table, written))
    assert not equal_weights(prompted, fit(make_recipe(), table))


def test_margins_teach_what_their_score_lists_teach(make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent]) -> None:
    lists, margins = (fit(make_recipe(loss=MARGIN_MSE, labels={"kind": kind})) for kind in ("score_list", "margin"))

    assert equal_weights(lists, margins)


def test_a_table_of_margins_is_refused_by_kl_before_anything_is_trained(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], fit: Callable[..., TrainedStudent], tmp_path: Path
) -> None:
    table = make_table(make_recipe(loss=MARGIN_MSE, labels={"kind": "margin"}))

    with pytest.raises(ValueError, match=r'"SparseDistillKLDivLoss" needs score lists of 3 gold_sim, but .* holds 2 margins'):
        fit(make_recipe(), table)
    assert not list(tmp_path.glob("work-*"))


def test_a_table_of_another_collection_is_refused_before_anything_is_trained(
    make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent], collection: Collection, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"query 'q01' is not in the collection; rebuild the table"):
        fit(make_recipe(), None, replace(collection, queries={"elsewhere": "a cat"}))
    assert not list(tmp_path.glob("work-*"))


@pytest.mark.parametrize("loss", ["SparseDistillKLDivLoss", MARGIN_MSE])
def test_the_loss_falls(make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent], loss: str) -> None:
    student = {"lambda_query": 0.0, "lambda_passage": 0.0, "initial_active_dims": 60}
    trained = fit(make_recipe(loss=loss, student=student, max_steps=30, batch_size=16))

    losses = [entry["loss"] for entry in trained.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_the_regularizers_make_vectors_sparser(make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent]) -> None:
    weights = {"lambda_query": 1.0, "lambda_passage": 1.0}

    regularized = fit(make_recipe(student=weights, max_steps=40)).log_history
    free = fit(make_recipe(student=dict.fromkeys(weights, 0.0), max_steps=40)).log_history

    last = [[entry for entry in logs if "loss" in entry][-1] for logs in (regularized, free)]
    for name in ("query_active_dims", "passage_active_dims"):
        assert last[0][name] < 0.7 * last[1][name]


@pytest.mark.parametrize("prompt", ["", "number: "])
def test_passages_start_with_the_active_dims_asked_for(
    make_recipe: Callable[..., Recipe], collection: Collection, prompt: str
) -> None:
    recipe = make_recipe(student={"initial_active_dims": 50, "passage_prompt": prompt})

    vectors = untrained_student(recipe, collection).encode_document(list(collection.passages.values()))

    assert float((vectors.to_dense() > 0).sum()) / len(collection.passages) == pytest.approx(50, rel=0.1)


def test_the_order_of_the_passages_calibrates_nothing(make_recipe: Callable[..., Recipe], collection: Collection) -> None:
    texts = [f"{text} {number}" for number in range(8) for text in collection.passages.values()]  # more than the sample of 128
    many = {f"p{place}": text for place, text in enumerate(texts)}
    recipe = make_recipe(student={"initial_active_dims": 50})

    forward = untrained_student(recipe, replace(collection, passages=many))
    backward = untrained_student(recipe, replace(collection, passages=dict(reversed(many.items()))))

    assert torch.equal(decoder_of(forward).bias, decoder_of(backward).bias)


def test_the_bias_of_a_trained_head_is_left_alone(
    make_recipe: Callable[..., Recipe], collection: Collection, tiny_masked_lm_folder: Path
) -> None:
    recipe = make_recipe(student={"model": str(tiny_masked_lm_folder), "initial_active_dims": 50})

    with pytest.raises(ValueError, match=r"\[student\] initial_active_dims: .* brings a trained masked-LM head.*remove the key"):
        untrained_student(recipe, collection)


@pytest.mark.parametrize(("active", "is_warned"), [(None, True), (50, False)])
def test_a_start_with_the_whole_vocabulary_active_is_said(
    make_recipe: Callable[..., Recipe],
    collection: Collection,
    caplog: pytest.LogCaptureFixture,
    active: int | None,
    is_warned: bool,
) -> None:
    untrained_student(make_recipe(student={"initial_active_dims": active}), collection)

    assert ("nearly the whole vocabulary is active at the start" in caplog.text) is is_warned


def test_a_trained_head_is_not_told_how_to_start(
    make_recipe: Callable[..., Recipe], collection: Collection, caplog: pytest.LogCaptureFixture, tiny_masked_lm_folder: Path
) -> None:
    untrained_student(make_recipe(student={"model": str(tiny_masked_lm_folder), "initial_active_dims": None}), collection)

    assert "initial_active_dims" not in caplog.text


def test_a_masked_lm_student_trains(
    make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent], tiny_masked_lm_folder: Path
) -> None:
    trained = fit(make_recipe(student={"model": str(tiny_masked_lm_folder)}))

    assert trained.num_steps == 3
    assert trained.resumed_from_step == 0
    assert not trained.model.training


@pytest.mark.parametrize(("expansion", "side"), [("passage", "query"), ("query", "document")])
def test_the_table_of_a_static_side_learns_at_its_own_rate_and_the_transformer_at_its(
    make_recipe: Callable[..., Recipe], fit: Callable[..., TrainedStudent], collection: Collection, expansion: str, side: str
) -> None:
    settings: dict[str, Any] = {"student": {"expansion": expansion}, "loss": MARGIN_MSE, "max_steps": 1, "warmup_ratio": 0.0}
    recipe = make_recipe(**settings)
    own, same = fit(make_recipe(**settings, static_learning_rate=0.5)), fit(recipe)

    tables, rest = [], []
    for trained in (own, same):
        start = dict(untrained_student(recipe, collection).named_parameters())
        moved = {name: (value - start[name]).abs().max().item() for name, value in trained.model.named_parameters()}
        tables.append(moved.pop(f"0.sub_modules.{side}.0.weight"))
        rest.append(max(moved.values()))
    assert tables[0] == pytest.approx(0.5, rel=0.05)  # AdamW's first step moves each weight that has a gradient by its rate
    assert tables[1] < 0.05
    assert rest[0] == pytest.approx(rest[1], rel=0.5)


STUDENTS: dict[str, dict[str, Any]] = {
    "inference-free, a rate of its own": {"student": {"expansion": "passage", "dropout": 0.1}, "static_learning_rate": 0.1},
    "inference-free": {"student": {"expansion": "passage", "dropout": 0.1}},
    "query expansion only": {"student": {"expansion": "query", "dropout": 0.1}},
    "frozen table": {"student": {"expansion": "passage", "static_frozen": True}},
    "mini-batches": {"student": {"dropout": 0.1}, "mini_batch_size": 2},
    "adapters": {"student": {"lora_rank": 2, "dropout": 0.1}},
    "csr": {"student": {"kind": "csr", "hidden_dim": 64, "k": 4, "k_aux": 8, "dropout": 0.1}},
    "csr, frozen body": {"student": {"kind": "csr", "hidden_dim": 64, "k": 4, "k_aux": 8, "freeze_body": True}},
    "contrastive": {"labels": {"kind": "none"}, "loss": "SparseMultipleNegativesRankingLoss"},
    "library's own path": {"run": {"packed": False, "fused_head": False}, "student": {"dropout": 0.1}},
    "budget": {"student": {"budget": {"query_active_dims": 20, "passage_active_dims": 30}, "dropout": 0.1}},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_resumes_to_the_bit_and_reloads_without_this_project(
    make_recipe: Callable[..., Recipe],
    make_table: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path: Path,
    tiny_encoder_folder: Path,
    name: str,
) -> None:
    settings = STUDENTS[name]
    if "lora_rank" in settings.get("student", {}):
        pytest.importorskip("peft", reason="adapters need the extra 'lora'")
    student = {**settings.get("student", {}), **({"model": str(tiny_encoder_folder)} if "csr" in name else {})}
    run = {"save_steps": 2, **settings.get("run", {})}
    recipe = make_recipe(**{"max_steps": 6, **settings, "student": student, "run": run})
    table, places = make_table(recipe), {"work_folder": tmp_path / "work", "key": "key"}
    uninterrupted = train(recipe, table, collection, **places)
    shutil.rmtree(tmp_path / "work" / "checkpoint-6")

    resumed = train(recipe, table, collection, **places)

    assert (resumed.resumed_from_step, resumed.num_steps) == (4, 6)
    assert equal_weights(resumed, uninterrupted)
    texts = list(collection.passages.values())[:5]
    vectors = resumed.model.encode_document(texts).to_dense()
    resumed.model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    plain = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(plain.encode_document(texts).to_dense(), vectors)
    torch.testing.assert_close(plain.encode_query(texts).to_dense(), resumed.model.encode_query(texts).to_dense())
