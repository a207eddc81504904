"""Scores from the bank by query_id and passage_id: the ``GoldSim`` that rows and labels ask.

Digests each distinct text of a question once, about a million a second; keeps nothing between questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank.scores import TeacherScores
from sparsekd.bank.text_key import text_keys
from sparsekd.collection.beir import Collection


class BankedScores:
    """Looks up raw gold_sim of a collection's pairs; ``scores`` by teacher name."""

    def __init__(self, collection: Collection, scores: Mapping[str, TeacherScores]) -> None:
        self._collection = collection
        self._scores = dict(scores)

    def __call__(self, teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """Return float32 [n] for aligned ids, NaN where the bank has none."""
        query_keys = _keys(query_ids, self._collection.queries)
        passage_keys = _keys(passage_ids, self._collection.passages)
        return self._scores[teacher].lookup(query_keys, passage_keys)


def _keys(ids: Sequence[str], text_by_id: Mapping[str, str]) -> NDArray[np.uint64]:
    """uint64 [n, 2] content keys, in the order of ``ids``."""
    place_by_id = {text_id: place for place, text_id in enumerate(dict.fromkeys(ids))}
    keys = text_keys(text_by_id[text_id] for text_id in place_by_id)
    return keys[np.fromiter((place_by_id[text_id] for text_id in ids), dtype=np.int64, count=len(ids))]
