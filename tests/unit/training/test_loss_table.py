"""The whole loss table: every valid (data, label, loss, wrapper, student) row trains a tiny student, any other pairing is refused.

Trained means: from a published table, by the trainer, the loss of the whole table falls in a few steps, and what is saved loads in
plain sentence-transformers with the same vectors. The refusals are the recipe's, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from sentence_transformers import SparseEncoder
from transformers import AutoTokenizer

from sparsekd.collection.beir import Collection
from sparsekd.labels.building import build_table, table_fields
from sparsekd.labels.rows import Rows
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.recipe.loading import _explain
from sparsekd.recipe.rules import LOSSES, wrapper_of
from sparsekd.students.building import build_student
from sparsekd.training.fit import TrainedStudent, train
from sparsekd.training.losses import build_loss, loss_card

PASSAGES = ["heat is a method of flow", "the king of norman france", "smoke is one cause of disease", "air does flow on a wing"]
KL, MARGIN_MSE, IN_BATCH, TRIPLET = (
    f"Sparse{name}Loss" for name in ("DistillKLDiv", "MarginMSE", "MultipleNegativesRanking", "Triplet")
)
COSENT, ANGLE, COSINE, MSE = (f"Sparse{name}Loss" for name in ("CoSENT", "AnglE", "CosineSimilarity", "MSE"))
SPLADE_V3 = {KL: 1.0, MARGIN_MSE: 0.05, IN_BATCH: 0.1}

TWO_TEACHERS = [{"name": name, "kind": "sparse", "model": "m"} for name in ("t", "u")]

# (labels, loss): the table's rows but the last, under each wrapper that regularizes or reconstructs.
ROWS: list[tuple[dict[str, Any], Any]] = [
    ({"kind": "none", "num_negatives": 0}, IN_BATCH),
    ({"kind": "none", "num_negatives": 1}, IN_BATCH),
    ({"kind": "none", "num_negatives": 3}, IN_BATCH),
    ({"kind": "none", "num_negatives": 1}, TRIPLET),
    ({"kind": "none", "num_negatives": 3, "layout": "triplets"}, TRIPLET),
    ({"kind": "similarity"}, COSENT),
    ({"kind": "similarity"}, ANGLE),
    ({"kind": "similarity"}, COSINE),
    ({"kind": "margin", "num_negatives": 1}, MARGIN_MSE),
    ({"kind": "margin", "num_negatives": 3, "layout": "triplets"}, MARGIN_MSE),
    ({"kind": "margin", "num_negatives": 3}, MARGIN_MSE),
    ({"kind": "margin", "num_negatives": 3}, {MARGIN_MSE: 1.0, IN_BATCH: 0.5}),
    ({"kind": "score_list", "num_negatives": 1}, KL),
    ({"kind": "score_list", "num_negatives": 1}, MARGIN_MSE),
    ({"kind": "score_list", "num_negatives": 3, "layout": "triplets"}, KL),
    ({"kind": "score_list", "num_negatives": 3}, KL),
    ({"kind": "score_list", "num_negatives": 3}, MARGIN_MSE),
    ({"kind": "score_list", "num_negatives": 3}, SPLADE_V3),
    ({"kind": "score_list", "num_negatives": 1}, {KL: 1.0, TRIPLET: 0.1}),
]
KINDS = ("score_list", "margin", "none", "similarity", "embedding")
SPARSE_TEACHER = {"name": "t", "kind": "sparse", "model": "m"}


def recipe_of(**sections: Any) -> Recipe:
    document = {
        "collection": {"path": "c"},
        "mining": {"miners": [{"kind": "bm25", "quota": 8}]},
        "teachers": [{"name": "t", "kind": "dense", "model": "m"}],
        **sections,
        "student": {"model": "s", **sections.get("student", {})},
    }
    return Recipe.model_validate(document)


def identifier(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(str(each) for pair in value.items() for each in pair)
    return value if isinstance(value, str) else None


class DrawnVectors:
    """A VectorSource: a teacher of the student's own vocabulary, three weights for each text."""

    def __init__(self, folder: str) -> None:
        self.vocabulary: dict[str, int] | None = AutoTokenizer.from_pretrained(folder).get_vocab()

    def vectors(self, role: str, text_ids: Sequence[str]) -> scipy.sparse.csr_matrix:
        dense = np.zeros((len(text_ids), len(self.vocabulary or {})), dtype=np.float32)
        for row, text_id in enumerate(text_ids):
            generator = np.random.default_rng(list(f"{role} {text_id}".encode()))
            dense[row, generator.choice(dense.shape[1], 3, replace=False)] = generator.uniform(0.5, 2.0, 3)
        return scipy.sparse.csr_matrix(dense)


def drawn_gold_sim(teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1.0, 1.0, len(query_ids)).astype(np.float32)


def table_of(recipe: Recipe, collection: Collection, cache: Path) -> ScoreTable:
    """Return the published table of the first four training queries, before it is parted into pairs, triplets or texts."""
    query_ids, order = list(collection.qrels["train"])[:4], list(collection.passages)
    passage_ids = [order[place * 5 : place * 5 + recipe.labels.num_negatives + 1] for place in range(len(query_ids))]
    return build_table(
        recipe,
        Rows(query_ids, passage_ids, {}, 0),
        cache=cache,
        fields=table_fields(recipe, "candidates", {"t": {"weights": "drawn"}}),
        gold_sim=drawn_gold_sim,
        vectors=DrawnVectors(recipe.student.model) if recipe.labels.kind == "embedding" else None,
    )


@pytest.fixture
def trained(collection: Collection, tmp_path: Path) -> Callable[[Recipe], TrainedStudent]:
    """Return ``trained(recipe)``: its student after 6 steps of the whole table each, by the trainer and on the fast path."""

    def run(recipe: Recipe) -> TrainedStudent:
        table = table_of(recipe, collection, tmp_path / "cache")
        pace = {"batch_size": len(table), "max_steps": 6, "learning_rate": 2e-3, "warmup_ratio": 0.0, "lambda_warmup_ratio": 0.1}
        paced = recipe.model_copy(update={"training": recipe.training.model_copy(update=pace)})
        return train(paced, table, collection, work_folder=tmp_path / "work", key="key")

    return run


def assert_learns_and_reloads(student: TrainedStudent, folder: Path) -> None:
    first, last = (entry for entry in student.log_history if "loss" in entry)  # the first step, the mean of the others
    assert last["loss"] < first["loss"]
    # What is logged adds up to the loss, in full precision.
    for entry in (first, last):
        parts = [value for name, value in entry.items() if name in LOSSES or "_loss" in name]
        assert sum(parts) == pytest.approx(entry["loss"], rel=1e-5)

    student.model.save_pretrained(str(folder), create_model_card=False)
    plain = SparseEncoder(str(folder), device="cpu")

    for encode in ("encode_query", "encode_document"):
        ours, theirs = (getattr(each, encode)(PASSAGES).to_dense() for each in (student.model, plain))
        assert torch.equal(ours, theirs)
        assert int((ours > 0).sum()) > 0


@pytest.mark.parametrize(
    ("wrapper", "expansion"),
    [
        ("SpladeLoss", "both"),
        *(
            pytest.param(wrapper, expansion, marks=pytest.mark.slow)
            for wrapper in ("SpladeLoss", "CachedSpladeLoss")
            for expansion in ("both", "passage", "query")
            if (wrapper, expansion) != ("SpladeLoss", "both")
        ),
    ],
)
@pytest.mark.parametrize(("labels", "loss"), ROWS, ids=identifier)
def test_a_splade_student_learns_and_reloads(
    trained: Callable[[Recipe], TrainedStudent],
    tiny_headless_folder: Path,
    tmp_path: Path,
    labels: dict[str, Any],
    loss: Any,
    wrapper: str,
    expansion: str,
) -> None:
    cached = {"mini_batch_size": 3} if wrapper == "CachedSpladeLoss" else {}
    pressed = [side for side in ("query", "passage") if expansion in ("both", side)]
    student = {"dropout": 0.0, "expansion": expansion, **{f"lambda_{side}": 1e-5 for side in pressed}}
    recipe = recipe_of(
        labels=labels,
        training={"loss": loss, "wrapper": wrapper, **cached},
        student={"model": str(tiny_headless_folder), **student},
    )

    assert_learns_and_reloads(trained(recipe), tmp_path / "student")


def first_of_each_kind_fast(rows: list[tuple[dict[str, Any], Any]]) -> list[Any]:
    """Return the rows, those slow whose kind of labels has come before."""
    kinds = [labels["kind"] for labels, _ in rows]
    return [pytest.param(*row, marks=[pytest.mark.slow] if kinds[place] in kinds[:place] else []) for place, row in enumerate(rows)]


@pytest.mark.parametrize(("labels", "loss"), first_of_each_kind_fast(ROWS), ids=identifier)
def test_a_csr_student_learns_and_reloads(
    trained: Callable[[Recipe], TrainedStudent], tiny_encoder_folder: Path, tmp_path: Path, labels: dict[str, Any], loss: Any
) -> None:
    student = {"kind": "csr", "model": str(tiny_encoder_folder), "dropout": 0.0, "hidden_dim": 96, "k": 8, "k_aux": 16}
    recipe = recipe_of(labels=labels, training={"loss": loss, "wrapper": "CSRLoss"}, student=student)

    assert_learns_and_reloads(trained(recipe), tmp_path / "student")


def test_a_student_learns_vectors_and_reloads(
    trained: Callable[[Recipe], TrainedStudent], tiny_headless_folder: Path, tmp_path: Path
) -> None:
    """Texts that share a vector (sentence_1…N with one label) are rows of one text each here: the loss is the same mean."""
    recipe = recipe_of(
        labels={"kind": "embedding"},
        teachers=[SPARSE_TEACHER],
        training={"loss": MSE, "wrapper": "none"},
        student={"model": str(tiny_headless_folder), "dropout": 0.0},
    )

    assert_learns_and_reloads(trained(recipe), tmp_path / "student")


@pytest.mark.parametrize("regularizer", ["FLOPS", "L1", "DF-FLOPS", "IDF-FLOPS"])
def test_every_regularizer_presses_active_weight_down(
    trained: Callable[[Recipe], TrainedStudent], tiny_headless_folder: Path, regularizer: str
) -> None:
    presses = {"regularizer": regularizer, "lambda_query": 10.0, "lambda_passage": 10.0, "dropout": 0.0}
    recipe = recipe_of(training={"loss": MARGIN_MSE}, student={"model": str(tiny_headless_folder), **presses})
    before = build_student(recipe.student, tiny_headless_folder).encode_document(PASSAGES).to_dense().sum()

    after = trained(recipe).model.encode_document(PASSAGES).to_dense().sum()

    assert float(after) < float(before)


def test_the_table_above_names_every_loss_with_every_kind_it_stands_beside() -> None:
    def names(loss: Any) -> list[str]:
        return [loss] if isinstance(loss, str) else list(loss)

    tried = {(name, labels["kind"]) for labels, loss in ROWS for name in names(loss)} | {(MSE, "embedding")}
    # Triplets on margins differ from triplets on score lists by the column that they do not read.
    assert {(name, kind) for name, kinds in LOSSES.items() for kind in kinds} - tried == {(TRIPLET, "margin")}


# What is refused, with the reason and what would do


def refusal_of(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe_of(**sections)
    return "\n".join(_explain(problem) for problem in caught.value.errors())


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(kind, loss) for loss, taken in LOSSES.items() for kind in KINDS if kind not in taken],
)
def test_a_loss_on_labels_that_it_cannot_read_is_refused(kind: str, loss: str) -> None:
    said = refusal_of(labels={"kind": kind, "num_negatives": 1}, training={"loss": loss}, teachers=[SPARSE_TEACHER])

    assert said.startswith(f'[training] loss = "{loss}" needs [labels] kind = ')
    assert f', not "{kind}": ' in said
    assert "; or choose loss = " in said


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        # names
        ({"training": {"loss": "MarginMSE"}}, "[training] loss = 'MarginMSE' is not known; did you mean SparseMarginMSELoss?"),
        ({"training": {"loss": "x"}}, "[training] loss = 'x' is not known; expected one of: SparseDistillKLDivLoss, "),
        ({"training": {"loss": {}}}, "[training] loss names no loss; expected at least one of: "),
        ({"student": {"regularizer": "DF-FLOP"}}, "[student] regularizer = 'DF-FLOP' is not known; did you mean DF-FLOPS?"),
        # rows
        (
            {"labels": {"num_negatives": 0}},
            '[labels] num_negatives = 0 gives pairs, which only kind = "none", layout = "list" takes; kind = "score_list" needs',
        ),
        (
            {"labels": {"kind": "none", "num_negatives": 0, "layout": "triplets"}, "training": {"loss": TRIPLET}},
            "[labels] num_negatives = 0 gives pairs, which only kind = \"none\", layout = \"list\" takes; ",
        ),
        (
            {"labels": {"kind": "similarity", "layout": "triplets"}, "training": {"loss": COSENT}},
            '[labels] layout = "triplets" needs rows of a query, a positive and negatives, but kind = "similarity" has none',
        ),
        (
            {"labels": {"kind": "embedding"}, "training": {"loss": MSE}},
            '[labels] kind = "embedding" teaches the vectors of one teacher of kind "sparse", but the recipe has 0: []; name',
        ),
        (
            {"labels": {"kind": "embedding"}, "training": {"loss": MSE}, "teachers": TWO_TEACHERS},
            "but the recipe has 2: ['t', 'u']; name exactly one",
        ),
        (
            {
                "labels": {"kind": "embedding"},
                "training": {"loss": MSE},
                "teachers": [SPARSE_TEACHER],
                "student": {"expansion": "passage"},
            },
            '[student] expansion = "passage" beside [labels] kind = "embedding": queries and passages stand in one column',
        ),
        (
            {
                "labels": {"kind": "embedding"},
                "training": {"loss": MSE},
                "teachers": [SPARSE_TEACHER],
                "student": {"query_prompt": "q: "},
            },
            "[student] query_prompt = 'q: ' and passage_prompt = '' beside [labels] kind = ",
        ),
        # losses
        (
            {"labels": {"kind": "none", "num_negatives": 4}, "training": {"loss": TRIPLET}},
            '[training] loss = "SparseTripletLoss" takes rows of one negative, these have 4; set [labels] layout = "triplets"',
        ),
        (
            {"labels": {"kind": "embedding"}, "training": {"loss": {MSE: 1, "a:B": 1}}, "teachers": [SPARSE_TEACHER]},
            '[training] loss = SparseMSELoss beside "a:B": it compares whole vectors and stands alone; remove the others',
        ),
        (
            {"training": {"loss": IN_BATCH}},
            '[training] loss = "SparseMultipleNegativesRankingLoss" reads no label, so the scores of [labels] kind = "score_list" '
            'would be ignored; set kind = "none", or add a loss that reads them: "SparseDistillKLDivLoss" or "SparseMarginMSELoss"',
        ),
        (
            {"labels": {"kind": "margin", "num_negatives": 1}, "training": {"loss": TRIPLET}},
            '"SparseTripletLoss" reads no label, so the scores of [labels] kind = "margin" would be ignored; set kind = "none", '
            'or add a loss that reads them: "SparseMarginMSELoss"',
        ),
        (
            {"labels": {"kind": "none", "num_negatives": 0}, "training": {"loss": IN_BATCH, "batch_size": 1}},
            "[training] batch_size = 1 gives loss = \"SparseMultipleNegativesRankingLoss\" nothing to compare a row with; raise it",
        ),
        (
            {"labels": {"kind": "similarity"}, "training": {"loss": COSENT, "batch_size": 1}},
            '[training] batch_size = 1 gives loss = "SparseCoSENTLoss" nothing to compare a row with; raise it',
        ),
        # wrappers
        (
            {"labels": {"kind": "embedding"}, "training": {"loss": MSE, "wrapper": "SpladeLoss"}, "teachers": [SPARSE_TEACHER]},
            '[training] wrapper = "SpladeLoss" around SparseMSELoss: the library would pair columns with rows and train every text',
        ),
        (
            {
                "labels": {"kind": "embedding"},
                "training": {"loss": MSE, "wrapper": "CachedSpladeLoss", "mini_batch_size": 2},
                "teachers": [SPARSE_TEACHER],
            },
            '[training] wrapper = "CachedSpladeLoss" around SparseMSELoss: the library would pair columns with rows and train',
        ),
        (
            {"labels": {"kind": "embedding"}, "training": {"loss": MSE, "mini_batch_size": 2}, "teachers": [SPARSE_TEACHER]},
            '[training] mini_batch_size = 2 acts in CachedSpladeLoss only, not in "none"; remove it',
        ),
        (
            {"training": {"wrapper": "none"}},
            '[training] wrapper = "none" leaves "SparseDistillKLDivLoss" without a regularizer, and the library refuses',
        ),
        (
            {"training": {"wrapper": "none", "loss": {"a:B": 1.0, "c:D": 2.0}}},
            '[training] wrapper = "none" leaves "a:B" or "c:D" without a regularizer',
        ),
        (
            {"training": {"wrapper": "CSRLoss"}},
            '[training] wrapper = "CSRLoss" needs [student] kind = "csr": a splade student has no autoencoder to reconstruct with; '
            'set wrapper = "SpladeLoss" or remove the key',
        ),
        (
            {"training": {"wrapper": "SpladeLoss"}, "student": {"kind": "csr"}},
            '[training] wrapper = "SpladeLoss" on a csr student trains its autoencoder without reconstruction; set wrapper = '
            '"CSRLoss" or remove the key',
        ),
        (
            {"training": {"wrapper": "CachedSpladeLoss", "mini_batch_size": 4}, "student": {"kind": "csr"}},
            '[training] wrapper = "CachedSpladeLoss" on a csr student trains its autoencoder without reconstruction; set wrapper',
        ),
        (
            {"training": {"wrapper": "none"}, "student": {"kind": "csr"}},
            '[training] wrapper = "none" on a csr student trains its autoencoder without reconstruction; set wrapper = "CSRLoss"',
        ),
        (
            {"training": {"wrapper": "SpladeLos"}},
            "[training] wrapper = 'SpladeLos': input should be 'SpladeLoss', 'CachedSpladeLoss', 'CSRLoss' or 'none'",
        ),
        (
            {"labels": {"kind": "embedding"}, "training": {"loss": MSE}, "student": {"kind": "csr"}, "teachers": [SPARSE_TEACHER]},
            '[student] kind = "csr" cannot learn [labels] kind = "embedding": its dims are its own',
        ),
        (
            {"training": {"wrapper": "CachedSpladeLoss"}},
            '[training] wrapper = "CachedSpladeLoss" needs mini_batch_size, the rows embedded at once; set it',
        ),
        (
            {"training": {"wrapper": "SpladeLoss", "mini_batch_size": 4}},
            '[training] mini_batch_size = 4 acts in CachedSpladeLoss only, not in "SpladeLoss"; remove it or set wrapper = '
            '"CachedSpladeLoss"',
        ),
        ({"training": {"mini_batch_size": 4}, "student": {"kind": "csr"}}, 'CachedSpladeLoss only, not in "CSRLoss"; remove it'),
        # students
        ({"student": {"k": 8}}, '[student] k = 8 acts on kind = "csr" only; remove the key'),
        ({"student": {"freeze_body": True}}, '[student] freeze_body = True acts on kind = "csr" only; remove the key'),
        ({"student": {"static_frozen": True}}, '[student] static_frozen = True needs expansion = "passage" or "query": no side is'),
        (
            {"training": {"static_learning_rate": 0.01}},
            "[training] static_learning_rate = 0.01 is for the table of a side without a transformer, and [student] expansion = ",
        ),
        (
            {"training": {"static_learning_rate": 0.01}, "student": {"expansion": "passage", "static_frozen": True}},
            "and [student] static_frozen = true leaves it as it starts; remove the key",
        ),
        ({"student": {"lora_alpha": 8.0}}, "[student] lora_alpha = 8.0 scales adapters, of which there are none: set lora_rank"),
        (
            {"student": {"kind": "csr", "lora_rank": 4, "freeze_body": True}},
            "[student] lora_rank = 4 beside freeze_body = true: adapters would train what is frozen; remove one",
        ),
        ({"student": {"budget": {}}}, "[student.budget] is empty; set query_active_dims, passage_active_dims or both"),
        ({"student": {"budget": {"query_active_dims": 0}}}, "[student.budget] query_active_dims = 0: input should be greater than"),
        ({"student": {"budget": {"passage_active_dims": -1}}}, "input should be greater than 0"),
    ],
)  # fmt: skip
def test_an_impossible_pairing_is_refused_with_the_reason(sections: dict[str, Any], message: str) -> None:
    assert message in refusal_of(**sections)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("regularizer", "L1"),
        ("lambda_query", 0.1),  # the default, but somebody asked for it
        ("lambda_passage", 0.5),
        ("threshold_query", 4),
        ("threshold_passage", 4),
        ("budget", {"query_active_dims": 40}),
    ],
)
def test_what_is_not_regularized_takes_no_regularizer_and_no_budget(key: str, value: Any) -> None:
    alone = {"labels": {"kind": "embedding"}, "training": {"loss": MSE}, "teachers": [SPARSE_TEACHER]}
    shown = key if key == "budget" else f"{key} = {value!r}"

    assert f"[student] {shown} has no effect: SparseMSELoss stands alone" in refusal_of(student={key: value}, **alone)
    assert f'[student] {shown} acts on kind = "splade" only: a csr student has k active dims' in refusal_of(
        student={"kind": "csr", key: value}
    )


@pytest.mark.parametrize("key", ["initial_active_dims", "head_warmup_steps"])
def test_a_csr_student_has_no_head_to_prepare(key: str) -> None:
    assert f'[student] {key} = 5 acts on kind = "splade" only' in refusal_of(student={"kind": "csr", key: 5})


@pytest.mark.parametrize(("expansion", "side"), [("passage", "query"), ("query", "passage")])
def test_a_static_side_takes_no_pressure(expansion: str, side: str) -> None:
    reason = f'has no effect with expansion = "{expansion}": a {side} has the terms it is written in; remove the key'

    for key, value in ((f"lambda_{side}", 0.2), (f"threshold_{side}", 3)):
        assert refusal_of(student={"expansion": expansion, key: value}) == f"[student] {key} = {value} {reason}"
    budget = {f"{side}_active_dims": 40.0}
    assert refusal_of(student={"expansion": expansion, "budget": budget}) == f"[student.budget] {side}_active_dims {reason}"


def test_a_recipe_that_a_program_wrote_out_whole_is_still_one() -> None:
    for student in ({"kind": "csr", "k": 8}, {"expansion": "passage"}):
        recipe = recipe_of(student=student)

        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("sections", "wrapper"),
    [
        ({}, "SpladeLoss"),
        ({"training": {"mini_batch_size": 8}}, "CachedSpladeLoss"),
        ({"student": {"kind": "csr", "k": 8, "k_aux": 16}}, "CSRLoss"),
        ({"labels": {"kind": "embedding"}, "training": {"loss": MSE}, "teachers": [SPARSE_TEACHER]}, "none"),
    ],
)
def test_a_recipe_without_a_wrapper_takes_the_one_that_its_student_and_loss_need(
    sections: dict[str, Any], wrapper: str, tiny_headless_folder: Path, tiny_encoder_folder: Path
) -> None:
    recipe = recipe_of(**sections)
    model = build_student(recipe.student, tiny_encoder_folder if recipe.student.kind == "csr" else tiny_headless_folder)

    assert wrapper_of(recipe) == wrapper
    assert loss_card(build_loss(model, recipe))["wrapper"] == wrapper


def test_a_static_side_is_not_pressed(tiny_headless_folder: Path, make_recipe: Callable[..., Recipe]) -> None:
    both = build_student(make_recipe().student, tiny_headless_folder)

    loss = build_loss(both, recipe_of(student={"expansion": "passage", "lambda_passage": 0.5}))

    assert (loss.query_regularizer_weight, loss.document_regularizer_weight) == (0.0, 0.5)
