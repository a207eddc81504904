"""The section of a recipe that says how a cross-encoder of one's own is fine-tuned, and how ``[[teachers]]`` name it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsekd.recipe.section import NAME, Section

TRAINED = "trained:"
"""``model = "trained:NAME"`` of a teacher is the cross-encoder that ``make train-teacher`` has last made as NAME."""


class TrainTeacher(Section):
    """A cross-encoder with one logit, fine-tuned on the train split's judgements and the recipe's candidates."""

    name: str = Field(pattern=NAME)
    """What ``model = "trained:NAME"`` of a teacher refers to; enters no key."""
    model: str = Field(min_length=1)
    """Body: any encoder, or a cross-encoder with one label to train on. A body without a head gets one drawn from ``seed``."""
    max_length: int = Field(default=256, ge=8)
    """Tokens per pair, special tokens included, in training and in the saved model. 256 is what small encoders were trained with;
    time grows with it."""
    loss: Literal["LambdaLoss", "ListNetLoss", "RankNetLoss"] = "LambdaLoss"
    """``LambdaLoss``: listwise, pairs weighted by what a swap costs in nDCG (Wang et al. 2018); the library's first choice.
    ``ListNetLoss``: listwise, cross entropy of two softmaxes (Cao et al. 2007). ``RankNetLoss``: pairwise (Burges et al. 2005)."""
    num_negatives: int = Field(default=7, ge=1)
    """Candidates per row beside its positive, drawn with a seed per query id; a query with fewer is dropped and counted."""
    batch_size: int = Field(default=8, ge=1)
    """Rows, of 1 + num_negatives pairs each, per optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass under autocast; master weights are float32 always."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows; ignored when max_steps is set. One is usual for rerankers."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; None derives them from epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW, reached after warmup, then linear to zero; bodies of 6 layers take 5e-5 to 2e-4."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps spent warming up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping by global norm."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the head, the negatives, data order and dropout."""
    dev_steps: int = Field(default=100, ge=1)
    """Measure dev nDCG@10 of reranking, and save, every this many steps and after the last; the best checkpoint is the result. A
    crash loses as many steps."""
    dev_queries: int = Field(default=100, ge=1)
    """Dev queries measured, those of smallest sha256(query_id)."""
    dev_depth: int = Field(default=50, ge=1)
    """BM25 passages reranked per dev query."""
    patience: int = Field(default=3, ge=1)
    """Measurements in a row without a better one after which training stops."""
