"""The loss a recipe asks for, against hand-worked numbers and against the formulas written again in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder

from sparsekd.packed_body import packed
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.training.columns import merge_columns
from sparsekd.training.losses import build_loss, check_target_scale

Floats = NDArray[np.float64]
MARGIN_MSE = {"loss": "SparseMarginMSELoss"}


class Given(torch.nn.Module):
    """An encoder whose vectors are given, so that a loss is a function of numbers one can work by hand."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["vectors"]}


def parts_of(recipe: Recipe, query: Floats, passages: Sequence[Floats], labels: Floats) -> dict[str, float]:
    """Base loss and weighted regularizers of one batch."""
    loss = build_loss(Given(), recipe)  # type: ignore[arg-type]
    parts = loss([{"vectors": torch.tensor(array)} for array in (query, *passages)], torch.tensor(labels))
    return {name: float(value) for name, value in parts.items()}


def kl_divergence(student_sim_BN: Floats, gold_sim_BN: Floats, temperature: float) -> float:
    """T^2 · mean over rows of sum_n p_n (log p_n − log q_n), p and q softmax of gold_sim / T and student_sim / T."""
    log_p, log_q = (
        rows / temperature - np.log(np.exp(rows / temperature).sum(axis=1, keepdims=True)) for rows in (gold_sim_BN, student_sim_BN)
    )
    return float(temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def margin_mse(student_sim_BN: Floats, margin_BM: Floats) -> float:
    """Mean over rows and negatives of the squared difference of signed margins (Hofstätter et al. 2020, arXiv 2010.02666)."""
    return float(np.square(student_sim_BN[:, :1] - student_sim_BN[:, 1:] - margin_BM).mean())


def flops(vectors_BV: Floats) -> float:
    """Sum over terms of the squared batch mean (Paria et al. 2020, arXiv 2004.05665)."""
    return float(np.square(vectors_BV.mean(axis=0)).sum())


@pytest.fixture
def loss_of(make_recipe: Callable[..., Recipe]) -> Callable[..., Any]:
    """Return ``loss_of(lambda_query, lambda_passage, **sections)``: a function of vectors and labels that gives the parts."""

    def make(lambda_query: float = 0.0, lambda_passage: float = 0.0, **sections: Any) -> Any:
        student = {"lambda_query": lambda_query, "lambda_passage": lambda_passage, **sections.pop("student", {})}
        return partial(parts_of, make_recipe(student=student, **sections))

    return make


# Two rows, a positive and two negatives, three terms. student_sim: row 0: 2, 1, 0; row 1: 3, 0, 6.
QUERY = np.array([[1.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
PASSAGES = [
    np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 5.0]]),
    np.array([[0.0, 4.0, 1.0], [1.0, 0.0, 0.0]]),
    np.array([[0.0, 7.0, 0.0], [0.0, 2.0, 0.0]]),
]


def test_margin_mse_of_margins_on_hand_worked_numbers(loss_of: Callable[..., Any]) -> None:
    parts = loss_of(labels={"kind": "margin"}, **MARGIN_MSE)(QUERY, PASSAGES, np.array([[1.0, 4.0], [1.0, -3.0]]))

    # Student margins: 1, 2 and 3, -3; differences 0, -2, 2, 0; squares 0, 4, 4, 0.
    assert parts["base_loss"] == pytest.approx(2.0)


def test_margin_mse_of_score_lists_takes_the_positive_as_the_first(loss_of: Callable[..., Any]) -> None:
    parts = loss_of(**MARGIN_MSE)(QUERY, PASSAGES, np.array([[5.0, 4.0, 1.0], [0.0, -1.0, 3.0]]))

    assert parts["base_loss"] == pytest.approx(2.0)  # the same margins: 1, 4 and 1, -3


def test_margins_are_signed(loss_of: Callable[..., Any]) -> None:
    loss = loss_of(labels={"kind": "margin"}, **MARGIN_MSE)

    right = loss(QUERY, PASSAGES, np.array([[1.0, 2.0], [3.0, -3.0]]))
    wrong_sign = loss(QUERY, PASSAGES, np.array([[1.0, 2.0], [3.0, 3.0]]))

    assert right["base_loss"] == pytest.approx(0.0)
    assert wrong_sign["base_loss"] == pytest.approx(36 / 4)


def test_kl_on_hand_worked_numbers(loss_of: Callable[..., Any]) -> None:
    # At temperature 2 a row's softmax is (3/4, 1/4) for a difference of 2 log 3, and (1/2, 1/2) for none.
    query = np.array([[1.0], [1.0]])
    passages = [np.array([[2 * np.log(3)], [0.5]]), np.array([[0.0], [0.5]])]
    gold_sim = np.array([[7.0, 7.0], [4.0, 4.0]])

    parts = loss_of(temperature=2.0, labels={"num_negatives": 1})(query, passages, gold_sim)

    # Row 0: 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4) = 1/2 log(4/3); row 1: 0; times T² = 4, mean of 2 rows: log(4/3).
    assert parts["base_loss"] == pytest.approx(np.log(4 / 3))


def test_regularizers_on_hand_worked_numbers(loss_of: Callable[..., Any]) -> None:
    parts = loss_of(0.5, 0.25, **MARGIN_MSE)(QUERY, PASSAGES, np.array([[2.0, 1.0, 0.0], [3.0, 0.0, 6.0]]))

    # Queries: means 1/2, 3/2, 1/2: 11/4. Passages, all six together: means 3/6, 14/6, 6/6: (9 + 196 + 36)/36.
    assert parts["base_loss"] == pytest.approx(0.0)
    assert parts["query_regularizer_loss"] == pytest.approx(0.5 * 11 / 4)
    assert parts["document_regularizer_loss"] == pytest.approx(0.25 * 241 / 36)


def test_vectors_within_the_threshold_are_left_out_of_the_regularizer(loss_of: Callable[..., Any]) -> None:
    student = {"threshold_query": 1, "threshold_passage": 2}
    parts = loss_of(1.0, 1.0, student=student, **MARGIN_MSE)(QUERY, PASSAGES, np.array([[2.0, 1.0, 0.0], [3.0, 0.0, 6.0]]))

    # Query 1 has one active dim and every passage at most two; the mean is still over all of the batch.
    assert parts["query_regularizer_loss"] == pytest.approx(0.25 + 0.25)
    assert parts["document_regularizer_loss"] == pytest.approx(0.0)


@given(data=st.data(), rows=st.integers(1, 4), num_passages=st.integers(2, 4), terms=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_losses_equal_a_second_formula(data: st.DataObject, rows: int, num_passages: int, terms: int) -> None:
    seed, temperature = data.draw(st.integers(0, 2**31)), data.draw(st.floats(0.5, 5.0))
    generator = np.random.default_rng(seed)
    query, *passages = generator.uniform(0, 2, (num_passages + 1, rows, terms))
    labels = generator.normal(0, 3, (rows, num_passages))
    student_sim = np.stack([(query * passage).sum(axis=1) for passage in passages], axis=1)
    expected = {
        "SparseDistillKLDivLoss": kl_divergence(student_sim, labels, temperature),
        "SparseMarginMSELoss": margin_mse(student_sim, labels[:, :1] - labels[:, 1:]),
    }

    for name, base in expected.items():
        recipe = Recipe.model_validate(
            {
                "collection": {"path": "sample"},
                "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
                "teachers": [{"name": "t", "kind": "dense", "model": "m"}],
                "student": {"model": "m", "lambda_query": 0.3, "lambda_passage": 0.7},
                "training": {"loss": name, "temperature": temperature},
            }
        )
        parts = parts_of(recipe, query, passages, labels)

        assert parts["base_loss"] == pytest.approx(base, rel=1e-9, abs=1e-9)
        assert parts["query_regularizer_loss"] == pytest.approx(0.3 * flops(query))
        assert parts["document_regularizer_loss"] == pytest.approx(0.7 * flops(np.concatenate(passages)))


def test_each_run_has_a_loss_of_its_own(make_recipe: Callable[..., Recipe]) -> None:
    # The schedule changes the object: one that was used starts the next run at the wrong weight.
    recipe = make_recipe(student={"lambda_query": 0.2})
    model = build_student(recipe.student, Path(recipe.student.model))

    first, second = build_loss(model, recipe), build_loss(model, recipe)
    first.query_regularizer_weight = 1e-9

    assert second.query_regularizer_weight == 0.2
    assert second.query_regularizer is not first.query_regularizer


# How columns are embedded


@pytest.fixture
def packed_student(make_recipe: Callable[..., Recipe]) -> Iterator[tuple[SparseEncoder, SparseEncoder]]:
    """Two equal students, one inside ``packed``."""
    recipe = make_recipe()
    plain, flat = (build_student(recipe.student, Path(recipe.student.model)) for _ in range(2))
    with packed(flat) as reasons:
        assert not reasons
        yield plain, flat


def gradients_of(model: SparseEncoder, recipe: Recipe, columns: Sequence[Sequence[str]]) -> tuple[dict[str, float], torch.Tensor]:
    """Components of one step and its gradients, end to end."""
    model.train()
    model.zero_grad()
    loss = build_loss(model, recipe)
    labels = torch.linspace(0, 5, len(columns[0]) * (len(columns) - 1)).reshape(len(columns[0]), -1)
    torch.stack(list(loss([model.preprocess(list(texts)) for texts in columns], labels).values())).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.log_components(), torch.cat(gradients)


COLUMNS = [
    ["what is heat", "who was king"],
    ["heat is a method of flow", "the king of norman france"],
    ["air does flow on a wing in the shock", "rain"],
    ["one cause of disease", "a small river bridge over the water in the city"],
]


@pytest.mark.parametrize("wrapper", [{}, {"wrapper": "CachedSpladeLoss", "mini_batch_size": 1}, {"mini_batch_size": 4}])
def test_packed_and_padded_columns_merged_or_cut_have_one_loss_and_gradient(
    make_recipe: Callable[..., Recipe], packed_student: tuple[SparseEncoder, SparseEncoder], wrapper: dict[str, Any]
) -> None:
    plain, flat = packed_student
    expected, expected_gradients = gradients_of(plain, make_recipe(loss="SparseMarginMSELoss"), COLUMNS)

    for model in (plain, flat):
        found, gradients = gradients_of(model, make_recipe(loss="SparseMarginMSELoss", **wrapper), COLUMNS)

        assert found == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5 * float(expected_gradients.abs().max()))


def test_passages_take_one_forward_pass_whether_packed_or_padded(
    make_recipe: Callable[..., Recipe], packed_student: tuple[SparseEncoder, SparseEncoder]
) -> None:
    num_rows: list[int] = []

    for model in packed_student:
        handle = model.register_forward_hook(lambda module, inputs, output: num_rows.append(len(output["sentence_embedding"])))
        gradients_of(model, make_recipe(loss="SparseMarginMSELoss"), COLUMNS)
        handle.remove()

    assert num_rows == [2, 6] * 2


def test_packed_columns_are_laid_end_to_end() -> None:
    columns = [
        {"input_ids": torch.tensor([[1, 2, 3]]), "position_ids": torch.tensor([[0, 1, 0]]), **ends([0, 2, 3], 2)},
        {"input_ids": torch.tensor([[4, 5, 6, 7]]), "position_ids": torch.tensor([[0, 0, 1, 2]]), **ends([0, 1, 4], 3)},
    ]

    merged = merge_columns(columns)

    assert merged is not None
    assert merged["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert merged["position_ids"].tolist() == [[0, 1, 0, 0, 0, 1, 2]]
    assert merged["cu_seq_lens_q"].tolist() == merged["cu_seq_lens_k"].tolist() == [0, 2, 3, 4, 7]
    assert merged["cu_seq_lens_q"].dtype == torch.int32
    assert (merged["max_length_q"], merged["max_length_k"], merged["modality"]) == (3, 3, "text")


def ends(cumulative: list[int], longest: int) -> dict[str, Any]:
    lengths = torch.tensor(cumulative, dtype=torch.int32)
    return {
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
        "modality": "text",
    }


def test_columns_that_go_different_ways_are_not_merged() -> None:
    column = {"input_ids": torch.tensor([[1, 2, 3]]), **ends([0, 2, 3], 2)}

    assert merge_columns([column]) is None
    assert merge_columns([{**column, "task": "query"}, {**column, "task": "document"}]) is None
    assert merge_columns([{**column, "task": "document"}, column]) is None


# A weighted sum, and what is logged


def test_a_weighted_sum_has_a_component_for_each_loss_in_full_precision(loss_of: Callable[..., Any]) -> None:
    labels = np.array([[5.0, 4.0, 1.0], [0.0, -1.0, 3.0]])
    weights = {"SparseDistillKLDivLoss": 1.0, "SparseMarginMSELoss": 1e-6, "SparseMultipleNegativesRankingLoss": 0.5}

    parts = loss_of(1e-7, 0.0, loss=weights)(QUERY, PASSAGES, labels)

    student_sim = np.array([[2.0, 1.0, 0.0], [3.0, 0.0, 6.0]])
    in_batch = np.concatenate([QUERY @ passages.T for passages in PASSAGES], axis=1)  # columns: passage 0 of rows 0, 1, passage 1 …
    contrastive = np.mean([np.log(np.exp(in_batch[row]).sum()) - in_batch[row, row] for row in range(2)])
    assert parts["SparseDistillKLDivLoss"] == pytest.approx(kl_divergence(student_sim, labels, 2.0))
    assert parts["SparseMarginMSELoss"] == pytest.approx(1e-6 * 2.0)  # 4 decimals would show 0
    assert parts["SparseMultipleNegativesRankingLoss"] == pytest.approx(0.5 * contrastive)
    assert parts["query_regularizer_loss"] == pytest.approx(1e-7 * 11 / 4)


def test_a_single_loss_can_be_weighted(loss_of: Callable[..., Any]) -> None:
    parts = loss_of(loss={"SparseMarginMSELoss": 0.25})(QUERY, PASSAGES, np.array([[5.0, 4.0, 1.0], [0.0, -1.0, 3.0]]))

    assert parts["SparseMarginMSELoss"] == pytest.approx(0.25 * 2.0)


def test_components_are_remembered_until_the_next_step(make_recipe: Callable[..., Recipe]) -> None:
    loss = build_loss(Given(), make_recipe(student={"lambda_query": 0.5}, **MARGIN_MSE))  # type: ignore[arg-type]
    assert loss.log_components() == {}

    parts = loss([{"vectors": torch.tensor(array)} for array in (QUERY, *PASSAGES)], torch.zeros(2, 3))

    assert loss.log_components() == {name: float(value) for name, value in parts.items()}


@pytest.mark.parametrize(("width", "kind"), [(2, "score_list"), (4, "score_list"), (3, "margin"), (1, "margin")])
def test_labels_of_another_width_than_the_row_are_refused(loss_of: Callable[..., Any], width: int, kind: str) -> None:
    expected = 3 if kind == "score_list" else 2

    with pytest.raises(ValueError, match=rf'"{kind}" gives rows of 4 texts labels of shape \({expected},\), found \({width},\)'):
        loss_of(labels={"kind": kind}, **MARGIN_MSE)(QUERY, PASSAGES, np.zeros((2, width)))


def test_vectors_of_another_width_than_the_students_are_refused() -> None:
    recipe = recipe_of_vectors()
    loss = build_loss(Given(), recipe)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"labels have shape \(2, 1\), the student's vectors \(2, 3\); .* share one vocabulary"):
        loss([{"vectors": torch.tensor(QUERY)}], torch.zeros(2, 1))


def recipe_of_vectors(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "collection": {"path": "c"},
            "mining": {"miners": [{"kind": "bm25", "quota": 5}]},
            "teachers": [{"name": "t", "kind": "sparse", "model": "m"}],
            "labels": {"kind": "embedding"},
            "student": {"model": "s"},
            "training": {"loss": "SparseMSELoss", **training},
        }
    )


@pytest.mark.parametrize("spread", [0.12, 0.5, 22.0, 99.0])
def test_a_scale_that_teaches_is_taken(spread: float) -> None:
    check_target_scale(np.array([[0.0, spread]], dtype=np.float32), temperature=2.0)
