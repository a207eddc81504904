"""The loss a recipe asks for: sentence-transformers' own, with a regularizer that also reports active dims.

Main loss (SparseDistillKLDivLoss or SparseMarginMSELoss) + lambda_query * FLOPS(queries) + lambda_passage * FLOPS(passages),
where FLOPS is Paria et al. 2020 (arXiv 2004.05665): sum over terms of the squared batch mean of the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SparseDistillKLDivLoss, SparseMarginMSELoss, SpladeLoss
from torch import Tensor, nn

from sparsekd.recipe import Recipe

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder


class FlopsRegularizer(FlopsLoss):
    """FLOPS that remembers how many dims were active in the batch it last saw."""

    def __init__(self, model: SparseEncoder, threshold: int | None = None) -> None:
        super().__init__(model, threshold=threshold)
        self.active_dims = 0.0

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return the scalar FLOPS of float [B, V] ``embeddings``."""
        self.active_dims = float(torch.count_nonzero(embeddings.detach())) / max(len(embeddings), 1)
        loss: Tensor = super().compute_loss_from_embeddings(embeddings)
        return loss


def build_loss(model: SparseEncoder, recipe: Recipe) -> SpladeLoss:
    """Return a new SpladeLoss around the recipe's main loss. One per run: the schedule changes the object's weights."""
    student, training = recipe.student, recipe.training
    main: nn.Module
    if training.loss == "SparseDistillKLDivLoss":
        main = SparseDistillKLDivLoss(model, temperature=training.temperature)
    else:
        main = SparseMarginMSELoss(model)
    return SpladeLoss(
        model,
        main,
        document_regularizer_weight=student.lambda_passage,
        query_regularizer_weight=student.lambda_query,
        document_regularizer=FlopsRegularizer(model, student.threshold_passage),
        query_regularizer=FlopsRegularizer(model, student.threshold_query),
    )
