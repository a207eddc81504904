"""BM25 over the passages: bm25s builds the postings, this module reads them.

Lucene variant, Porter stemmer, no stop-word list, lower-cased words of two characters or more. Scores are float32 sums in the
order of the query's tokens (repeated tokens count each time), so a query's scores depend on nothing but itself and the
passages. Costs 8 bytes per posting and one float32 per passage while searching; never queries x passages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import bm25s
import numpy as np
import Stemmer
from numpy.typing import NDArray

from sparsekd.mining.ranking import Positions, Scores, best_first, empty_block, id_ranks, to_ids

BM25_VERSION = 1
"""Raised when the same settings and passages would give other scores, by this code or by another bm25s or PyStemmer."""
VARIANT = "lucene"
STEMMER = "porter"
_WORD = re.compile(r"(?u)\b\w\w+\b")


def scoring_fields(k1: float, b: float) -> dict[str, Any]:
    """Return everything beside the passages that can change a score, JSON-able."""
    return {
        "version": BM25_VERSION,
        "variant": VARIANT,
        "k1": k1,
        "b": b,
        "tokens": {"pattern": _WORD.pattern, "lower_case": True, "stop_words": None, "stemmer": STEMMER},
        "precision": "float32",
    }


class BM25Index:
    """Searches passages by BM25.

    score(q, p) = sum over tokens t of q of ln(1 + (P − df + .5) / (df + .5)) · tf / (tf + k1 · (1 − b + b · |p| / mean |p|)),
    the accurate Lucene form of Kamphuis et al. 2020 (ECIR, "Which BM25 do you mean?"), without the constant factor k1 + 1.
    Raises ValueError if there are no passages.
    """

    def __init__(self, passages: Mapping[str, str], k1: float, b: float) -> None:
        if not passages:
            raise ValueError("BM25: no passages to index; expected at least one")
        self.passage_ids = list(passages)
        self._id_rank = id_ranks(self.passage_ids)
        self._stemmer = Stemmer.Stemmer(STEMMER)
        self._token_by_word: dict[str, int] = {}
        self._token_by_stem: dict[str, int] = {}
        tokens = [self._learn(text) for text in passages.values()]
        postings = self._postings(tokens, k1, b)
        self._weights: Scores = postings["data"]
        self._positions: Positions = postings["indices"]
        self._starts: NDArray[np.int64] = postings["indptr"]

    @property
    def document_frequency(self) -> dict[str, int]:
        """Passages that hold each stem, by stem; stems in reading order."""
        return dict(zip(self._token_by_stem, np.diff(self._starts).tolist(), strict=True))

    def search(self, queries: Sequence[str], depth: int) -> tuple[list[list[str]], list[Scores]]:
        """Return each query's best ``depth`` passage_ids and scores; fewer where fewer passages share a token with it."""
        positions_QK, scores_QK = self.search_positions(queries, depth)
        return to_ids(positions_QK, scores_QK, self.passage_ids)

    def search_positions(self, queries: Sequence[str], depth: int) -> tuple[Positions, Scores]:
        """Return the same as int32 [Q, K] positions (-1 filler) and float32 [Q, K] scores, K = min(depth, P)."""
        positions_QK, scores_QK = empty_block(len(queries), min(depth, len(self.passage_ids)))
        scores_P = np.zeros(len(self.passage_ids), dtype=np.float32)
        for row, query in enumerate(queries):
            tokens = self._tokens(query)
            for token in tokens:
                scores_P[self._posting(token)] += self._weights[self._starts[token] : self._starts[token + 1]]
            hits = np.flatnonzero(scores_P)
            positions, scores = best_first(hits, scores_P[hits], self._id_rank, depth)
            positions_QK[row, : len(positions)], scores_QK[row, : len(scores)] = positions, scores
            for token in tokens:
                scores_P[self._posting(token)] = 0
        return positions_QK, scores_QK

    def pair_scores(self, query: str, positions: NDArray[Any]) -> Scores:
        """Return float32 [n]: the query's score of the passages at ``positions``, bit-equal to search's; 0 = no match."""
        scores = np.zeros(len(positions), dtype=np.float32)
        for token in self._tokens(query):
            posting = self._posting(token)
            places = np.minimum(np.searchsorted(posting, positions), len(posting) - 1)
            matches = posting[places] == positions
            scores[matches] += self._weights[self._starts[token] + places[matches]]
        return scores

    def _posting(self, token: int) -> Positions:
        """Ascending positions of the passages that hold the token; never empty."""
        return self._positions[self._starts[token] : self._starts[token + 1]]

    def _learn(self, text: str) -> list[int]:
        """Token ids of a passage; new stems get the next id, in reading order, so ids do not depend on hashing."""
        tokens = []
        for word in _WORD.findall(text.lower()):
            token = self._token_by_word.get(word)
            if token is None:
                token = self._token_by_stem.setdefault(self._stemmer.stemWord(word), len(self._token_by_stem))
                self._token_by_word[word] = token
            tokens.append(token)
        return tokens

    def _tokens(self, query: str) -> list[int]:
        """Token ids of a query; words no passage holds add nothing to any score and are left out."""
        stems = self._stemmer.stemWords(_WORD.findall(query.lower()))
        return [self._token_by_stem[stem] for stem in stems if stem in self._token_by_stem]

    def _postings(self, tokens: list[list[int]], k1: float, b: float) -> dict[str, Any]:
        if not self._token_by_stem:  # passages without a single word: bm25s divides by their mean length, 0
            return {"data": np.empty(0, np.float32), "indices": np.empty(0, np.int32), "indptr": np.zeros(1, np.int64)}
        model = bm25s.BM25(method=VARIANT, k1=k1, b=b)
        unique = list(range(len(self._token_by_stem)))
        postings: dict[str, Any] = model.build_index_from_ids(unique, tokens, show_progress=False)
        return postings
