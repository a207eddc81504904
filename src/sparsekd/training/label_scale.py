"""What labels are multiplied by so that a loss on them need not make all of the student's dot products larger or smaller.

A teacher's scores live on a scale of their own, cosines within 1, dot products of a SPLADE within hundreds. What a loss on them
does to an untrained student first is to change the size of its margins, and with them its active dims, which die in a few steps and
come back in many. The size that leaves it alone is not that of equal spread: where teacher and student agree in part only, the
margins that fit the labels best are smaller than the labels.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.labels.score_table import ScoreTable
from sparsekd.students.fast import fast_student
from sparsekd.training.development import encode_sparse
from sparsekd.training.rows import LABEL_COLUMN, text_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)

_ROWS = 96  # margins of 96 × 3 pairs: two samples of NFCorpus gave 13.9 and 14.6
_LEAST_AGREEMENT = 0.2


def label_scale_of(model: SparseEncoder, table: ScoreTable, rows: Dataset, *, packed: bool, fused: bool) -> float:
    """Return the scale of ``table``'s labels at which MarginMSE would leave the size of ``model``'s margins as it is.

    With s the student's margins and t those of the labels, over ``_ROWS`` rows spread evenly over ``rows``, the squared error of
    a · s to c · t is least at a = 1 if c = Σ s² / Σ s·t. Three digits, so that rounding on another machine changes nothing.
    Raises ValueError if s and t hardly agree (Σ s·t / sqrt(Σ s² · Σ t²) below 0.2): then no scale keeps the student's margins.
    """
    chosen = torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).round().long().tolist()
    sample: dict[str, Any] = rows[chosen]
    query, *passages = text_columns(table.kind, table.num_passages)
    with fast_student(model, packed=packed, fused=fused), torch.inference_mode():
        queries = encode_sparse(model, sample[query], "query")
        columns = [encode_sparse(model, sample[column], "passage") for column in passages]
    student_RN = torch.stack([(queries * column).sum(dim=1).to_dense() for column in columns], dim=1).double()
    labels_RN = torch.tensor(sample[LABEL_COLUMN], dtype=torch.float64)
    margins = _margins(student_RN), labels_RN if table.kind == "margin" else _margins(labels_RN)
    return scale_between(*margins)


def scale_between(student: torch.Tensor, labels: torch.Tensor) -> float:
    """Return Σ s² / Σ s·t of two equal shapes of margins, to three digits; ValueError where they hardly agree.

    >>> scale_between(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0]))
    5.0
    """
    power, product = float((student**2).sum()), float((student * labels).sum())
    whole = (power * float((labels**2).sum())) ** 0.5
    agreement = product / whole if whole else 0.0
    if agreement < _LEAST_AGREEMENT:
        raise ValueError(
            f'[training] label_scale = "student": the untrained student\'s margins agree with the labels by {agreement:.2f} '
            f"(1 is all, expected at least {_LEAST_AGREEMENT:g}), so no scale keeps them; state a number, or start from a "
            "student that ranks already"
        )
    scale = float(f"{power / product:.3g}")
    rms = (power / student.numel()) ** 0.5
    logger.info("labels times %g: the student's margins of rms %.3g then fit them as they are", scale, rms)
    return scale


def _margins(scores_RN: torch.Tensor) -> torch.Tensor:
    return scores_RN[:, :1] - scores_RN[:, 1:]
