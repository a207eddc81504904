"""Losses of one's own, ``module:Class``; and what a model card and a checkpoint get of any loss."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.training.losses import build_loss, loss_card, own_state, restore_own_state

COLUMNS = [
    ["what is heat", "who was king"],
    ["heat is a method of flow", "the king of norman france"],
    ["air does flow on a wing in the shock", "rain"],
    ["one cause of disease", "a small river bridge over the water in the city"],
]


# One's own


class Cosine(torch.nn.Module):
    """1 − cosine of query and positive; labels unread."""

    citation = "@misc{cosine}"

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def compute_loss_from_embeddings(self, embeddings: list[torch.Tensor], labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"angle": 1 - torch.cosine_similarity(embeddings[0], embeddings[1]).mean()}

    def get_config_dict(self) -> dict[str, Any]:
        return {"sides": ("query", "positive"), "margin": None, "power": 1}


class Alone(torch.nn.Module):
    """Mean squared distance of query and positive, from features: a loss that needs no wrapper."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: torch.Tensor | None) -> torch.Tensor:
        query, positive, *_ = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return (query - positive).square().mean()


class Deaf(Cosine):
    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any) -> Any:
        return torch.zeros(())


class Picky(Cosine):
    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any) -> Any:
        raise IndexError("list index out of range")


@pytest.fixture
def own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_losses")
    module.__dict__.update({kind.__name__: kind for kind in (Cosine, Alone, Deaf, Picky)})
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("own_losses")
def test_a_loss_of_ones_own_stands_in_a_wrapper_and_in_a_sum(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(loss={"own_losses:Cosine": 2.0, "SparseMarginMSELoss": 1.0})
    model = build_student(recipe.student, Path(recipe.student.model))

    components = build_loss(model, recipe)([model.preprocess(list(texts)) for texts in COLUMNS], torch.rand(2, 3))

    assert set(components) == {
        "own_losses:Cosine.angle", "SparseMarginMSELoss", "query_regularizer_loss", "document_regularizer_loss",
    }  # fmt: skip
    assert all(value.requires_grad for value in components.values())


@pytest.mark.usefixtures("own_losses")
def test_a_loss_of_ones_own_may_stand_alone(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(loss="own_losses:Alone", wrapper="none")
    model = build_student(recipe.student, Path(recipe.student.model))
    random_state = torch.get_rng_state()
    loss = build_loss(model, recipe)
    assert torch.equal(torch.get_rng_state(), random_state)  # the two-row check draws nothing

    components = loss([model.preprocess(list(texts)) for texts in COLUMNS], torch.zeros(2, 3))

    assert list(components) == ["base_loss"]
    assert loss.document_regularizer.active_dims > 0
    assert (loss.query_regularizer_weight, loss.document_regularizer_weight) == (0.0, 0.0)


@pytest.mark.usefixtures("own_losses")
@pytest.mark.parametrize(
    ("name", "wrapper", "reason"),
    [
        ("own_losses:Alone", None, r"has no compute_loss_from_embeddings\(embeddings, labels\), which a wrapper needs; .*\"none\""),
        ("own_losses:Deaf", None, r"gives tensor\(0\.\) on a two-row batch; expected a finite scalar tensor, or a dictionary"),
        ("own_losses:Picky", None, r"fails on a two-row batch of 4 columns with labels of shape \(2, 3\): IndexError: list index"),
        ("own_losses:Cosine", "none", "fails on a two-row batch of 4 columns"),  # no forward
        ("own_losses:Gone", None, "own_losses has no Gone; expected module:Class"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_refused(
    make_recipe: Callable[..., Recipe], name: str, wrapper: str | None, reason: str
) -> None:
    recipe = make_recipe(loss=name, wrapper=wrapper)
    model = build_student(recipe.student, Path(recipe.student.model))

    with pytest.raises(ValueError, match=rf"^\[training\] loss = '{name}'[: ].*{reason}"):
        build_loss(model, recipe)


# What the model card and a checkpoint get


@pytest.mark.usefixtures("own_losses")
def test_the_card_says_what_was_minimised(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(
        loss={"SparseDistillKLDivLoss": 1.0, "SparseMultipleNegativesRankingLoss": 0.5, "own_losses:Cosine": 0.1},
        student={"regularizer": "DF-FLOPS", "threshold_passage": 4},
        mini_batch_size=8,
    )

    card = loss_card(build_loss(build_student(recipe.student, Path(recipe.student.model)), recipe))

    assert card["wrapper"] == "CachedSpladeLoss"
    assert [(part["name"], part["weight"]) for part in card["losses"]] == [
        ("SparseDistillKLDivLoss", 1.0), ("SparseMultipleNegativesRankingLoss", 0.5), ("own_losses:Cosine", 0.1),
    ]  # fmt: skip
    assert card["losses"][0]["config"]["temperature"] == 2.0
    assert card["losses"][2]["config"] == {"sides": "('query', 'positive')", "power": 1}
    assert card["regularizers"]["passage"] == {
        "name": "DF-FLOPS",
        "config": {"threshold": 4, "alpha": 0.1, "beta": 10.0, "decay": 0.99},
    }
    assert [source in "\n".join(card["citations"]) for source in ("2101.06983", "2010.11386", "1807.03748", "2505.15070")] == [
        True
    ] * 4
    assert "@misc{cosine}" in card["citations"]
    assert json.loads(json.dumps(card)) == card


def test_a_loss_keeps_its_own_state_through_a_checkpoint_and_none_of_the_models(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(student={"regularizer": "DF-FLOPS"}, loss="SparseMarginMSELoss")
    model = build_student(recipe.student, Path(recipe.student.model))
    before, after = build_loss(model, recipe), build_loss(model, recipe)
    features = [model.preprocess(list(texts)) for texts in COLUMNS]
    before(features, torch.zeros(2, 3))

    restore_own_state(after, {name: tensor.clone() for name, tensor in own_state(before).items()})

    names = [f"{side}_regularizer.{name}" for side in ("document", "query") for name in ("document_frequency_V", "seen")]
    assert sorted(own_state(before)) == sorted(names)
    assert float(after.document_regularizer.seen) == pytest.approx(0.01)
    assert torch.equal(after.document_regularizer.weight_V(), before.document_regularizer.weight_V())
    assert own_state(build_loss(model, make_recipe())) == {}
    with pytest.raises(
        ValueError, match=r"the checkpoint's loss keeps \[\], this recipe's keeps \['document_regularizer.*start anew"
    ):
        restore_own_state(after, {})
