"""Regularizers of one side's vectors, over the global batch: lambda means the same on one process and on several.

Each is a function of column sums over all rows of all processes. The sums are added up across processes with their gradient, so
after DDP's averaging every parameter gets the gradient of the one global value; under GradCache the library hands over the whole
batch at once. Beside its value each regularizer keeps what the last global batch looked like, for schedules, budget and alarms.

B rows, V terms, ā_t the mean weight of term t over the rows, rows within the threshold counting as zeros (arXiv 2504.14839).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekd.training.custom import build_custom
from sparsekd.training.processes import global_rows, global_sum, sum_across_processes

DF_ALPHA = 0.1
"""Share of the vectors above which DF-FLOPS penalises a term by more than half: the paper's cutoff."""
DF_BETA = 10.0
"""Steepness of DF-FLOPS around its cutoff, the paper's."""
DF_DECAY = 0.99
"""Weight of the past in the running document frequency: about the last 100 steps, the paper's interval between two counts."""


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many of a collection's passages each term of the student's vocabulary occurs."""

    counts_V: Tensor
    """int64 [V]."""
    num_passages: int

    @classmethod
    def of(cls, token_ids: Iterable[Sequence[int]], vocabulary_size: int) -> DocumentFrequency:
        """Count from the token ids of each passage; a term repeated within one counts once."""
        counts_V, num_passages = torch.zeros(vocabulary_size, dtype=torch.int64), 0
        for ids in token_ids:
            counts_V[torch.tensor(sorted(set(ids)), dtype=torch.int64)] += 1
            num_passages += 1
        return cls(counts_V, num_passages)


class Regularizer(nn.Module):
    """A regularizer that remembers the last global batch; subclasses turn its mean weights into a value.

    ``threshold``: rows with at most this many active dims count as zeros.
    """

    name = ""
    """As the recipe has it."""

    def __init__(self, threshold: int | None = None) -> None:
        super().__init__()
        self.threshold = threshold
        self._counts: Tensor | None = None

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return the scalar value of float [B, V] ``embeddings``, those of this process, over the global batch."""
        num_active_B = torch.count_nonzero(embeddings.detach(), dim=1)
        num_terms = embeddings.shape[1]
        parts = (num_active_B.sum(), (num_active_B == 0).sum(), (num_active_B == num_terms).sum())
        counts = torch.stack([*parts, num_active_B.new_tensor(len(embeddings))])
        self._counts = sum_across_processes(counts)
        self._observe(embeddings.detach(), self._counts[3])
        if self.threshold is not None:
            embeddings = embeddings * (num_active_B > self.threshold).unsqueeze(1)
        return self._value(embeddings, self._counts[3])

    def _observe(self, embeddings_BV: Tensor, num_rows: Tensor) -> None:
        """Take in a batch before rows within the threshold are zeroed."""

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _mean_V(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        """float [V]: ā over ``num_rows`` of the global batch, at least float32 whatever autocast made of the vectors."""
        dtype = torch.promote_types(embeddings_BV.dtype, torch.float32)
        return global_sum(embeddings_BV.sum(dim=0, dtype=dtype)) / num_rows

    @property
    def active_dims(self) -> float:
        """Mean active dims of a row of the last global batch; 0 before the first."""
        return self._mean_of(0)

    @property
    def zero_rows(self) -> float:
        """Share of the rows of the last global batch without an active dim."""
        return self._mean_of(1)

    @property
    def full_share(self) -> float:
        """Share of the rows of the last global batch with every dim active."""
        return self._mean_of(2)

    def _mean_of(self, position: int) -> float:
        if self._counts is None or not int(self._counts[3]):
            return 0.0
        return int(self._counts[position]) / int(self._counts[3])

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        return {"threshold": self.threshold}

    @property
    def citation(self) -> str:
        """BibTeX of the source; empty where there is none."""
        return ""


class FlopsRegularizer(Regularizer):
    """FLOPS: Σ_t ā_t² (Paria et al. 2020, arXiv 2004.05665, eq. 4)."""

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        return self._mean_V(embeddings_BV, num_rows).square().sum()

    @property
    def citation(self) -> str:
        """BibTeX."""
        title = "Minimizing FLOPs to Learn Efficient Sparse Representations"
        return _misc("paria2020minimizing", title, "Biswajit Paria et al.", "2004.05665")


class L1Regularizer(Regularizer):
    """L1: mean over rows of Σ_t |w_t|."""

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        return self._mean_V(embeddings_BV.abs(), num_rows).sum()


class DFFlopsRegularizer(Regularizer):
    """DF-FLOPS: Σ_t (w_t ā_t)², w_t = 1 / (1 + (x_t^(log_α 2) − 1)^β) (Porco et al. 2025, arXiv 2505.15070).

    x_t is the share of the student's own vectors in which term t is active: w is near 0 for a rare term, 1/2 at x = α, 1 at x = 1,
    so that stop words pay and rare terms hardly do. The paper counts x over validation passages every 100 steps; here it is a
    running mean over global batches with decay 0.99, this one included. It starts at zero and is divided by the weight it has
    seen, so the first steps have unbiased counts. x is a buffer: save it with each checkpoint.
    """

    document_frequency_V: Tensor
    seen: Tensor

    def __init__(self, num_terms: int, threshold: int | None = None) -> None:
        super().__init__(threshold)
        self.register_buffer("document_frequency_V", torch.zeros(num_terms))
        self.register_buffer("seen", torch.zeros(()))

    def _observe(self, embeddings_BV: Tensor, num_rows: Tensor) -> None:
        if not torch.is_grad_enabled():
            return  # evaluation counts nothing
        share_V = sum_across_processes(torch.count_nonzero(embeddings_BV, dim=0)) / num_rows
        self.document_frequency_V.mul_(DF_DECAY).add_(share_V, alpha=1 - DF_DECAY)
        self.seen.mul_(DF_DECAY).add_(1 - DF_DECAY)

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        return (self.weight_V() * self._mean_V(embeddings_BV, num_rows)).square().sum()

    def weight_V(self) -> Tensor:
        """float32 [V] in [0, 1]: w of each term; 0 before the first batch."""
        # 1e-8: far below one vector in the batches remembered; the power then stays finite in float32.
        share_V = (self.document_frequency_V / self.seen.clamp(min=1e-8)).clamp(min=1e-8, max=1.0)
        exponent = math.log(2) / math.log(DF_ALPHA)
        return 1 / (1 + (share_V**exponent - 1).clamp(min=0) ** DF_BETA)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        return {**super().get_config_dict(), "alpha": DF_ALPHA, "beta": DF_BETA, "decay": DF_DECAY}

    @property
    def citation(self) -> str:
        """BibTeX."""
        title = "An Alternative to FLOPS Regularization to Effectively Productionize SPLADE-Doc"
        return _misc("porco2025dfflops", title, "Aldo Porco et al.", "2505.15070")


class IDFFlopsRegularizer(Regularizer):
    """IDF-FLOPS: Σ_t (ā_t / idf_t)², idf_t = 1 + ln((N + 1) / (df_t + 1)), in the spirit of Geng et al. 2024 (arXiv 2411.04403).

    A term found in every passage of the collection pays as in FLOPS, a rare one less by the square of its IDF. The paper fixes
    the principle, that IDF decides how much a term pays; this smoothed IDF, at least 1 so that no term pays more than in FLOPS, is
    chosen here.
    """

    idf_V: Tensor

    def __init__(self, document_frequency: DocumentFrequency, threshold: int | None = None) -> None:
        super().__init__(threshold)
        counts_V = document_frequency.counts_V.double()
        idf_V = 1 + torch.log((document_frequency.num_passages + 1) / (counts_V + 1))
        self.register_buffer("idf_V", idf_V.float(), persistent=False)

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        return (self._mean_V(embeddings_BV, num_rows) / self.idf_V).square().sum()

    @property
    def citation(self) -> str:
        """BibTeX."""
        title = "Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers"
        return _misc("geng2024towards", title, "Zhichao Geng et al.", "2411.04403")


class CustomRegularizer(Regularizer):
    """Somebody's own: ``inner.compute_loss_from_embeddings(embeddings)`` gets the rows of all processes."""

    def __init__(self, inner: nn.Module, threshold: int | None = None) -> None:
        super().__init__(threshold)
        self.inner = inner

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        value = cast(Any, self.inner).compute_loss_from_embeddings(global_rows(embeddings_BV))
        return cast(Tensor, value)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        own: dict[str, Any] = getattr(self.inner, "get_config_dict", dict)()
        return {**super().get_config_dict(), **own}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return str(getattr(self.inner, "citation", ""))


class ActiveDims(Regularizer):
    """No regularizer: counts active dims where nothing is regularized."""

    def _value(self, embeddings_BV: Tensor, num_rows: Tensor) -> Tensor:
        return embeddings_BV.new_zeros(())


def build_regularizer(
    name: str, model: nn.Module, *, threshold: int | None, document_frequency: DocumentFrequency | None = None
) -> Regularizer:
    """Return a new regularizer ``name`` of one side of ``model``.

    Raises ValueError where a custom one does not meet the contract, or IDF-FLOPS gets no ``document_frequency`` or another
    vocabulary's.
    """
    regularizer = _build(name, model, threshold, document_frequency)
    regularizer.name = name
    return regularizer


def _build(name: str, model: nn.Module, threshold: int | None, document_frequency: DocumentFrequency | None) -> Regularizer:
    if name == "FLOPS":
        return FlopsRegularizer(threshold)
    if name == "L1":
        return L1Regularizer(threshold)
    num_terms = int(cast(Any, model).get_embedding_dimension())
    if name == "DF-FLOPS":
        return DFFlopsRegularizer(num_terms, threshold)
    if name == "IDF-FLOPS":
        found = None if document_frequency is None else len(document_frequency.counts_V)
        if document_frequency is None or found != num_terms:
            raise ValueError(
                f'[student] regularizer = "IDF-FLOPS" needs the document frequency of {num_terms} terms in the collection, found '
                f"{found}; count it with the student's own tokenizer"
            )
        return IDFFlopsRegularizer(document_frequency, threshold)
    inner = build_custom("[student] regularizer", name, model)
    if not hasattr(inner, "compute_loss_from_embeddings"):
        raise ValueError(f"[student] regularizer = {name!r}: has no compute_loss_from_embeddings(embeddings); add it")
    _try_regularizer(name, inner, num_terms)
    return CustomRegularizer(inner, threshold)


def _try_regularizer(name: str, inner: nn.Module, num_terms: int) -> None:
    """Raise ValueError unless a two-row batch gives a finite scalar that depends on the vectors."""
    rows = torch.linspace(0.1, 1.0, 2 * num_terms).reshape(2, num_terms).requires_grad_()
    try:
        value = cast(Any, inner).compute_loss_from_embeddings(rows)
    except Exception as error:
        raise ValueError(f"[student] regularizer = {name!r} fails on a two-row batch: {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad or not bool(torch.isfinite(value)):
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.ndim else repr(value)
        expected = "expected a finite scalar tensor that depends on the vectors"
        raise ValueError(f"[student] regularizer = {name!r} gives {shown} on a two-row batch; {expected}")


def _misc(key: str, title: str, authors: str, arxiv: str) -> str:
    fields = {"title": title, "author": authors, "eprint": arxiv, "archivePrefix": "arXiv"}
    return "\n".join([f"@misc{{{key},", *(f"    {field}={{{value}}}," for field, value in fields.items()), "}"])
