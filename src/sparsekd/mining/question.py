"""What a miner is asked and what it answers, whatever its kind.

Q queries, K search depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection
from sparsekd.mining.dense import Similarity
from sparsekd.mining.ranking import Positions, Scores
from sparsekd.mining.selection import ceiling_of, percentile_limit
from sparsekd.recipe import DenseMiner, Miner, Recipe, SparseMiner

if TYPE_CHECKING:
    import scipy.sparse


class VectorSource(Protocol):
    """Where dense and sparse miners get their vectors."""

    def similarity(self, spec: DenseMiner) -> Similarity:
        """Return the similarity the encoder was trained for."""
        ...

    def vectors(self, spec: DenseMiner, texts: Sequence[str], role: Literal["query", "passage"]) -> NDArray[np.float32]:
        """Return float32 [n, D] in the order of ``texts``."""
        ...

    def sparse_vectors(
        self, spec: SparseMiner, texts: Sequence[str], role: Literal["query", "passage"]
    ) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in the order of ``texts``."""
        ...


@dataclass(frozen=True)
class JudgedQuery:
    """A training query: the positives that are scored, and all that are judged."""

    query_id: str
    positive_ids: list[str]
    judged_ids: list[str]


@dataclass(frozen=True)
class Answer:
    """What one miner finds for some of the queries, Q of them."""

    positions_QK: Positions
    scores_QK: Scores
    positive_scores: Scores | None = None
    """float32, this miner's scores of the queries' positives, query by query; None where no filter asks or the miner has none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of this miner beside the counts."""


Search = Callable[[range], Answer]
"""One miner, ready to answer the queries of any rows; no answer depends on what else is asked."""


@dataclass(frozen=True)
class Ranking:
    """One miner's answer to all queries."""

    miner: Miner
    name: str
    positions_QK: Positions
    scores_QK: Scores
    ceilings_Q: NDArray[np.float64]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """What every miner is asked: all queries over all passages, under one recipe."""

    recipe: Recipe
    collection: Collection
    judged: Sequence[JudgedQuery]
    source: VectorSource

    @property
    def queries(self) -> list[str]:
        """The texts of the queries."""
        return [self.collection.queries[query.query_id] for query in self.judged]

    @property
    def filters_by_miner(self) -> bool:
        """Whether the miners' own scores of positives set ceilings."""
        negative_filter = self.recipe.mining.filter
        return negative_filter.by == "miner" and negative_filter.reads_scores

    def positive_scores(self, rows: range, scores_of: Callable[[int, list[str]], Scores]) -> Scores | None:
        """Return a miner's scores of the positives of some queries, as an ``Answer`` has them.

        ``scores_of`` gives its float32 scores of one query's positives, by row and passage_ids.
        """
        if not self.filters_by_miner:
            return None
        return np.concatenate([scores_of(row, self.judged[row].positive_ids) for row in rows])

    def ceilings(self, positive_scores: Scores | None) -> NDArray[np.float64]:
        """Return float64 [Q]: the score above which a miner's proposals are likely false negatives; infinity where there is none.

        ``positive_scores`` are an ``Answer``'s to all queries.
        """
        if positive_scores is None:
            return np.full(len(self.judged), np.inf)
        ends = np.cumsum([len(query.positive_ids) for query in self.judged])[:-1]
        negative_filter = self.recipe.mining.filter
        limit = percentile_limit(positive_scores, negative_filter)
        scores_by_row = np.split(positive_scores, ends)
        return np.array([ceiling_of(float(scores.min()), negative_filter, limit) for scores in scores_by_row])

    def positive_ids(self, rows: range) -> list[str]:
        """Return the scored positives of some queries, each passage_id once."""
        return list(dict.fromkeys(passage_id for row in rows for passage_id in self.judged[row].positive_ids))
