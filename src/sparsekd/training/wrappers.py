"""What stands around the main loss: sentence-transformers' wrappers, with all passages in one forward pass.

Each has ``log_components``, and ``query_regularizer``, ``document_regularizer`` and their ``_weight``, which schedules drive; where
nothing is regularized the weights are 0 and the regularizers only count active dims.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers.sparse_encoder import losses as library
from torch import Tensor, nn

from sparsekd.training.columns import Features, embed_columns, merge_columns
from sparsekd.training.regularizers import ActiveDims

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

Components = dict[str, Tensor]


def check_labels(kind: str, num_columns: int, labels: Tensor | None) -> None:
    """Raise ValueError unless ``labels`` are what ``num_columns`` texts a row and the kind of labels make them.

    The library tells scores from margins by their width alone: a score list without its positive, margins with a leading zero, or
    a column of texts too many would be read as the other kind without a word.
    """
    widths = {"score_list": (num_columns - 1,), "margin": (num_columns - 2,), "similarity": ()}
    if kind == "none" or kind not in widths:
        return
    found = None if labels is None else tuple(labels.shape[1:])
    if found != widths[kind]:
        raise ValueError(
            f'[labels] kind = "{kind}" gives rows of {num_columns} texts labels of shape {widths[kind]}, found {found}; '
            "rebuild the table with make teacher-scores"
        )


class LoggedComponents:
    """Keeps the last value of each component of a loss."""

    kind = "none"
    """Of the labels; ``build_loss`` sets it."""
    names: tuple[str, ...] = ()
    """Of the main losses, as the recipe has them."""
    _components: dict[str, Tensor | float]

    def log_components(self) -> dict[str, float]:
        """Return the last value of each component of this process in full precision; empty before the first step."""
        return {name: float(value) for name, value in getattr(self, "_components", {}).items()}

    def _keep(self, components: Components) -> Components:
        self._components = {name: value.detach() for name, value in components.items()}
        return components


class DistillationLoss(LoggedComponents, library.SpladeLoss):
    """SpladeLoss with all passages in one forward pass."""

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Components:
        """Return the components of the loss of one batch; the trainer adds them up."""
        columns = list(sentence_features)
        check_labels(self.kind, len(columns), labels)
        embeddings = [column["sentence_embedding"] for column in embed_columns(self.model, columns)]
        base = cast(Any, self.loss).compute_loss_from_embeddings(embeddings, labels)
        components: Components = dict(base) if isinstance(base, dict) else {"base_loss": base}
        passages = cast(Any, self.document_regularizer).compute_loss_from_embeddings(torch.cat(embeddings[1:]))
        components["document_regularizer_loss"] = passages * self.document_regularizer_weight
        queries = cast(Any, self.query_regularizer).compute_loss_from_embeddings(embeddings[0])
        components["query_regularizer_loss"] = queries * self.query_regularizer_weight
        return self._keep(components)


class CachedDistillationLoss(LoggedComponents, library.CachedSpladeLoss):
    """CachedSpladeLoss whose mini-batches are cut from all passages together: GradCache, exact, one forward pass more."""

    _num_columns = 0

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Components:
        """Return the components of the loss of one batch; the first carries the gradient of all."""
        query, *passages = list(sentence_features)
        check_labels(self.kind, 1 + len(passages), labels)
        self._num_columns = len(passages)
        merged = merge_columns(passages)
        components: Components = super().forward([query, *(passages if merged is None else [merged])], labels)
        self._components = dict(self._component_values)
        return components

    def calculate_loss(self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False) -> Tensor:
        """Return the loss from the mini-batches' embeddings, split into the columns they were merged from."""
        columns = [torch.cat(column) for column in reps]
        if len(columns) == 2:
            columns = [columns[0], *columns[1].chunk(self._num_columns)]
        total: Tensor = super().calculate_loss([[column] for column in columns], labels, with_backward=with_backward)
        return total


class ReconstructedLoss(LoggedComponents, library.CSRLoss):
    """CSRLoss with its reconstruction and all passages in one forward pass.

    Its reconstruction is taken per process and averaged. Nothing is regularized: a CSR vector has k active dims by construction.
    """

    query_regularizer_weight = 0.0
    document_regularizer_weight = 0.0

    def __init__(self, model: SparseEncoder, loss: nn.Module, beta: float, gamma: float) -> None:
        super().__init__(model, loss, beta=beta, gamma=gamma)
        self.query_regularizer, self.document_regularizer = ActiveDims(), ActiveDims()

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Components:
        """Return the components of the loss of one batch; the trainer adds them up."""
        columns = list(sentence_features)
        check_labels(self.kind, len(columns), labels)
        columns = embed_columns(self.model, columns)
        embeddings = [column["sentence_embedding"] for column in columns]
        components: Components = self.reconstruction_loss.compute_loss_from_embeddings(columns)
        base = cast(Any, self.loss).compute_loss_from_embeddings(embeddings, labels)
        for name, value in (base if isinstance(base, dict) else {"base_loss": base}).items():
            components[name] = value * self.gamma
        self.query_regularizer.compute_loss_from_embeddings(embeddings[0])
        self.document_regularizer.compute_loss_from_embeddings(torch.cat(embeddings[1:]))
        return self._keep(components)


class StandaloneLoss(LoggedComponents, nn.Module):
    """A loss without a wrapper: SparseMSELoss, or one's own with a ``forward``. Nothing is regularized."""

    query_regularizer_weight = 0.0
    document_regularizer_weight = 0.0

    def __init__(self, model: SparseEncoder, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        # One count for both sides: rows of one text hold queries and passages alike.
        self.query_regularizer = self.document_regularizer = ActiveDims()

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Components:
        """Return the components of the loss of one batch; ValueError if labels and vectors have not one shape."""
        features = list(sentence_features)
        check_labels(self.kind, len(features), labels)
        if isinstance(self.loss, library.SparseMSELoss):
            (column,) = embed_columns(self.model, features)
            vectors_BV = column["sentence_embedding"]
            if labels is None or labels.shape != vectors_BV.shape:
                found = None if labels is None else tuple(labels.shape)
                raise ValueError(
                    f"SparseMSELoss: labels have shape {found}, the student's vectors {tuple(vectors_BV.shape)}; teacher and "
                    "student must share one vocabulary"
                )
            self.document_regularizer.compute_loss_from_embeddings(vectors_BV)
            return self._keep({"base_loss": self.loss.compute_loss_from_embeddings([vectors_BV], [labels])})
        seen: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda module, inputs, output: seen.append(output["sentence_embedding"].detach()))
        try:
            value = self.loss(features, labels)
        finally:
            handle.remove()
        self.document_regularizer.compute_loss_from_embeddings(torch.cat(seen))
        return self._keep(dict(value) if isinstance(value, dict) else {"base_loss": value})
