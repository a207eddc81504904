"""The loss a recipe asks for: sentence-transformers' own losses and wrappers, made exact over packed rows and several processes.

Main loss or a weighted sum of them, plus lambda_query times the queries' regularizer plus lambda_passage times the passages'. The
wrappers (``training.wrappers``) keep every component in full precision, which the library's trainer rounds to 4 decimals.
One loss per run: schedules change the object's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sparse_encoder import losses as library
from torch import Tensor, nn

from sparsekd.recipe import Recipe
from sparsekd.recipe.rules import is_custom, num_columns, wrapper_of
from sparsekd.training.columns import Features
from sparsekd.training.custom import build_custom
from sparsekd.training.processes import global_rows
from sparsekd.training.regularizers import ActiveDims, DocumentFrequency, build_regularizer
from sparsekd.training.wrappers import (
    CachedDistillationLoss,
    Components,
    DistillationLoss,
    ReconstructedLoss,
    StandaloneLoss,
)

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

# Losses over pairs of rows: the mean of the processes' values is not their value over the global batch, so they get all rows.
_OVER_ROWS = ("SparseMultipleNegativesRankingLoss", "SparseCoSENTLoss", "SparseAnglELoss")


class WeightedLosses(nn.Module):
    """A weighted sum of main losses: a dictionary of weight · value by the loss's name, which the wrappers log one by one."""

    def __init__(self, losses: dict[str, nn.Module], weights: dict[str, float]) -> None:
        super().__init__()
        self.names = list(losses)
        self.losses = nn.ModuleList(losses.values())
        self.weights = [weights[name] for name in self.names]

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Components:
        """Return weight · value of each loss over the columns' float [B, V] ``embeddings``."""
        components: Components = {}
        for name, weight, loss in zip(self.names, self.weights, self.losses, strict=True):
            value = cast(Any, loss).compute_loss_from_embeddings(embeddings, labels)
            parts = {f"{name}.{part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
            components.update({part: each * weight for part, each in parts.items()})
        return components

    def get_config_dict(self) -> dict[str, Any]:
        """Return the weights, for the model card."""
        return {"weights": dict(zip(self.names, self.weights, strict=True))}


class OverRows(nn.Module):
    """A loss over pairs of rows, given the rows of all processes: each computes the value of the global batch."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss over the global batch."""
        gathered = [global_rows(rows) for rows in embeddings]
        value = cast(Any, self.loss).compute_loss_from_embeddings(gathered, None if labels is None else global_rows(labels))
        return cast(Tensor, value)


def build_loss(model: SparseEncoder, recipe: Recipe, *, document_frequency: DocumentFrequency | None = None) -> Any:
    """Return a new loss of ``model`` as the recipe wants it, with ``log_components``, ``query_regularizer`` and ``_weight`` and the
    same for documents.

    ``document_frequency``, of the student's terms in the collection, is what IDF-FLOPS needs. Raises ValueError where a loss or
    regularizer of one's own does not meet its contract on a two-row batch.
    """
    training, student, wrapper = recipe.training, recipe.student, wrapper_of(recipe)
    losses = {name: _main_loss(model, name, recipe) for name in training.losses}
    (name, main), *more = losses.items()
    if more or training.losses[name] != 1.0:
        main = WeightedLosses(losses, training.losses)
    if wrapper == "none":
        loss: nn.Module = StandaloneLoss(model, main)
    elif wrapper == "CSRLoss":
        loss = ReconstructedLoss(model, main, training.csr_beta, training.csr_gamma)
    else:
        sides = [
            build_regularizer(student.regularizer, model, threshold=threshold, document_frequency=document_frequency)
            for threshold in (student.threshold_query, student.threshold_passage)
        ]
        settings: dict[str, Any] = {
            # A static side has the terms it is written in: nothing to press.
            "query_regularizer_weight": 0.0 if student.expansion == "passage" else student.lambda_query,
            "document_regularizer_weight": 0.0 if student.expansion == "query" else student.lambda_passage,
            "query_regularizer": sides[0],
            "document_regularizer": sides[1],
        }
        if wrapper == "CachedSpladeLoss":
            settings["mini_batch_size"] = training.mini_batch_size
            loss = CachedDistillationLoss(model, main, **settings)
        else:
            loss = DistillationLoss(model, main, **settings)
    made = cast(Any, loss)
    made.kind, made.names = recipe.labels.kind, tuple(losses)
    for name in filter(is_custom, training.losses):
        _try_loss(name, losses[name], recipe, model, alone=wrapper == "none")
    return loss


def loss_card(loss: nn.Module) -> dict[str, Any]:
    """Return what a model card says of ``loss`` (``build_loss``), as plain values.

    ``wrapper``: its class in the library. ``losses``: name, weight and config of each main loss, named as in the recipe.
    ``regularizers``: name and config by side, where there are any. ``citations``: BibTeX, each once.
    """
    main = cast(Any, loss).loss
    parts = list(zip(main.losses, main.weights, strict=True)) if isinstance(main, WeightedLosses) else [(main, 1.0)]
    mains = [(part.loss if isinstance(part, OverRows) else part, weight) for part, weight in parts]
    sides = {"query": cast(Any, loss).query_regularizer, "passage": cast(Any, loss).document_regularizer}
    regularizers = {side: module for side, module in sides.items() if not isinstance(module, ActiveDims)}
    cited = [*([] if isinstance(loss, StandaloneLoss) else [loss]), *(part for part, _ in mains), *regularizers.values()]
    citations = [str(getattr(part, "citation", "")).strip() for part in cited]
    return {
        "wrapper": next((name for kind, name in _WRAPPERS.items() if isinstance(loss, kind)), "none"),
        "losses": [
            {"name": name, "weight": weight, "config": _plain(_config(part))}
            for name, (part, weight) in zip(cast(Any, loss).names, mains, strict=True)
        ],
        "regularizers": {side: {"name": module.name, "config": _plain(_config(module))} for side, module in regularizers.items()},
        "citations": list(dict.fromkeys(citation for citation in citations if citation)),
    }


def check_target_scale(gold_sim_RN: NDArray[np.float32], temperature: float) -> None:
    """Raise ValueError if a softmax of the score lists at ``temperature`` teaches nothing or nothing but the best passage.

    gold_sim_RN: float32, all score lists of a table. In the middle row max − min, divided by the temperature, must lie in 0.05 to
    50: below, the teacher's probabilities differ by less than 5 % (saturated sigmoids do); above, all but one are below 1e-21. The
    library looks at its first batch only, warns, and trains on.
    """
    spread = float(np.median(np.ptp(gold_sim_RN, axis=1)))
    if 0.05 <= spread / temperature <= 50:
        return
    what = "almost the same probability to every passage" if spread < temperature else "all probability to one passage"
    raise ValueError(
        f"[training] temperature = {temperature:g}: gold_sim spread over {spread:.3g} in the middle row, so the softmax gives "
        f"{what}; set a temperature near {max(spread / 5, 1e-6):.2g}, or a [labels.calibration] (neither asks a teacher)"
    )


def own_state(loss: nn.Module) -> dict[str, Tensor]:
    """Return the tensors a loss keeps of its own, without the model's: what a checkpoint needs beside the model to resume."""
    of_model = {id(tensor) for tensor in cast(Any, loss).model.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in loss.state_dict(keep_vars=True).items() if id(tensor) not in of_model}


def restore_own_state(loss: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what ``own_state`` returned; ValueError if it is not the state of such a loss."""
    expected = own_state(loss)
    if expected.keys() != state.keys() or any(expected[name].shape != state[name].shape for name in state):
        raise ValueError(f"the checkpoint's loss keeps {sorted(state)}, this recipe's keeps {sorted(expected)}; start anew")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])


def _main_loss(model: SparseEncoder, name: str, recipe: Recipe) -> nn.Module:
    training = recipe.training
    settings: dict[str, Any] = {}
    if is_custom(name):
        loss = build_custom("[training] loss", name, model)
        if wrapper_of(recipe) != "none" and not hasattr(loss, "compute_loss_from_embeddings"):
            raise ValueError(
                f"[training] loss = {name!r}: has no compute_loss_from_embeddings(embeddings, labels), which a wrapper needs; "
                'add it, or set wrapper = "none"'
            )
        return loss
    if name == "SparseDistillKLDivLoss":
        settings = {"temperature": training.temperature}
    elif name in ("SparseMultipleNegativesRankingLoss", "SparseCoSENTLoss", "SparseAnglELoss"):
        settings = {"scale": training.scale}
    elif name == "SparseTripletLoss":
        settings = {"triplet_margin": training.triplet_margin}
    made: nn.Module = getattr(library, name)(model, **settings)
    return OverRows(made) if name in _OVER_ROWS else made


def _try_loss(name: str, loss: nn.Module, recipe: Recipe, model: SparseEncoder, *, alone: bool) -> None:
    """Raise ValueError unless a two-row batch gives a finite scalar, or a dictionary of them, that reaches the model."""
    width, num_terms = num_columns(recipe), int(model.get_embedding_dimension() or 0)
    shapes = {"score_list": (2, width - 1), "margin": (2, width - 2), "similarity": (2,), "embedding": (2, num_terms)}
    shape = shapes.get(recipe.labels.kind)
    labels = None if shape is None else torch.linspace(0, 1, torch.Size(shape).numel(), device=model.device).reshape(shape)
    was_training = model.training
    # A check must change nothing that the run sees: no draw of dropout, no count of dead dims.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        model.eval()
        try:
            if alone:
                value = loss(_two_rows(model, width), labels)
            else:
                first = torch.linspace(0.1, 1.0, 2 * num_terms, device=model.device).reshape(2, num_terms)
                rows = [(first * (number + 1)).requires_grad_() for number in range(width)]
                value = cast(Any, loss).compute_loss_from_embeddings(rows, labels)
        except Exception as error:
            what = f"[training] loss = {name!r} fails on a two-row batch of {width} columns with labels of shape {shape}"
            raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
        finally:
            model.train(was_training)
    values = list(value.values()) if isinstance(value, dict) else [value]
    good = [isinstance(each, Tensor) and each.ndim == 0 and bool(torch.isfinite(each)) for each in values]
    if not values or not all(good) or not any(each.requires_grad for each in values):
        raise ValueError(
            f"[training] loss = {name!r} gives {value!r} on a two-row batch; expected a finite scalar tensor, or a dictionary of "
            "them, that depends on the embeddings"
        )


def _two_rows(model: SparseEncoder, num_columns: int) -> list[Features]:
    from sentence_transformers.base.modules import Router

    texts, columns = ["a short text", "a second text that is longer"], []
    for number in range(num_columns):
        task = {"task": "document" if number else "query"} if isinstance(model[0], Router) else {}
        features = model.preprocess(texts, **task)
        moved = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in features.items()}
        columns.append(moved | task)
    return columns


_WRAPPERS: dict[type[nn.Module], str] = {
    CachedDistillationLoss: "CachedSpladeLoss",
    DistillationLoss: "SpladeLoss",
    ReconstructedLoss: "CSRLoss",
}


def _config(module: nn.Module) -> dict[str, Any]:
    return dict(getattr(module, "get_config_dict", dict)())


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold, show the rest as text, leave out None."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            plain[key] = _plain(value)
        elif value is not None:
            plain[key] = value if isinstance(value, int | float | str) else str(value)
    return plain
