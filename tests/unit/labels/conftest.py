"""Candidate rows and a teacher by dictionary: everything labels need, without search or teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.mining.candidates import CandidateRow
from sparsekd.recipe import Recipe

_LOSS_BY_KIND = {
    "score_list": "SparseMarginMSELoss",
    "margin": "SparseMarginMSELoss",
    "none": "SparseMultipleNegativesRankingLoss",
    "similarity": "SparseCoSENTLoss",
    "embedding": "SparseMSELoss",
}


class KnownScores:
    """A GoldSim over {teacher: {(query_id, passage_id): score}}; NaN for other pairs. Remembers what it was asked."""

    def __init__(self, scores: dict[str, dict[tuple[str, str], float]]) -> None:
        self.scores = scores
        self.asked: list[str] = []

    def __call__(self, teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        self.asked.append(teacher)
        pairs = zip(query_ids, passage_ids, strict=True)
        return np.array([self.scores[teacher].get(pair, np.nan) for pair in pairs], dtype=np.float32)


@pytest.fixture
def known_scores() -> type[KnownScores]:
    return KnownScores


@pytest.fixture
def candidate_row() -> Callable[..., CandidateRow]:
    """Return ``make(query_id, positives, bm25="abc", dense="de")``: one letter is one passage_id."""

    def make(query_id: str, positives: str, **by_miner: str) -> CandidateRow:
        ids = [letter for letters in by_miner.values() for letter in letters]
        miner = [name for name, letters in by_miner.items() for _ in letters]
        ranks = [rank for letters in by_miner.values() for rank in range(1, len(letters) + 1)]
        return CandidateRow(query_id, list(positives), ids, miner, [1.0] * len(ids), ranks)

    return make


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Return ``make(labels, negative_filter, teachers)``: a valid recipe around a labels section."""

    def make(
        labels: dict[str, Any] | None = None,
        negative_filter: dict[str, Any] | None = None,
        teachers: Sequence[str | dict[str, Any]] = ("judge",),
        **sections: Any,
    ) -> Recipe:
        document: dict[str, Any] = {
            "collection": {"path": "somewhere"},
            "mining": {"miners": [{"kind": "bm25", "quota": 50}], "filter": negative_filter or {}},
            "teachers": [
                {"name": name, "kind": "cross-encoder", "model": f"models/{name}"} if isinstance(name, str) else name
                for name in teachers
            ],
            "labels": {"num_negatives": 2, **(labels or {})},
            "student": {"model": "some/student"},
            "training": {"loss": _LOSS_BY_KIND[(labels or {}).get("kind", "score_list")]},
        }
        return Recipe.model_validate({**document, **sections})

    return make
