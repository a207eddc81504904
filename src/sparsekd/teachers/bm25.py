"""BM25 as a teacher: the score that a BM25 search of the whole collection gives a passage, for wanted pairs alone.

The index is the miner's (src/sparsekd/mining/bm25.py), built at the first pair that needs a score: 8 bytes per posting, beside the
collection's texts. A pair's score depends on its two texts and the collection, never on the pairs around it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.bm25 import BM25Index
from sparsekd.recipe import BM25Teacher
from sparsekd.teachers.identity import bm25_identity


class BM25Scorer:
    """Scores pairs of any query and a passage of the collection; a Scorer."""

    def __init__(self, teacher: BM25Teacher, passages: Mapping[str, str]) -> None:
        self.num_truncated = 0
        self._teacher = teacher
        self._passages = passages

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Settings and the digest of all passages; the key of the score bank."""
        return bm25_identity(self._teacher, self._passages.values())

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n] >= 0 in input order; exactly 0 where query and passage share no token.

        Cheapest where pairs of one query come together. Raises ValueError if a passage is none of the collection's.
        """
        rows_by_query: dict[str, list[int]] = {}
        for row, (query, _) in enumerate(pairs):
            rows_by_query.setdefault(query, []).append(row)
        positions = np.array([self._position(passage) for _, passage in pairs], dtype=np.int32)
        gold_sim = np.zeros(len(pairs), dtype=np.float32)
        for query, rows in rows_by_query.items():
            gold_sim[rows] = self._index.pair_scores(query, positions[rows])
        return gold_sim

    def _position(self, passage: str) -> int:
        position = self._position_by_text.get(passage)
        if position is None:
            raise ValueError(
                f"teacher {self._teacher.name!r}: passage {passage[:80]!r} is none of the collection's {len(self._passages)}; "
                "BM25 scores by their statistics and knows no other; expected a passage of the collection"
            )
        return position

    @cached_property
    def _position_by_text(self) -> dict[str, int]:
        # Of equal texts the last: they have one score.
        return {text: position for position, text in enumerate(self._passages.values())}

    @cached_property
    def _index(self) -> BM25Index:
        return BM25Index(self._passages, self._teacher.k1, self._teacher.b)
