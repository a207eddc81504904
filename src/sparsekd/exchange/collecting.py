"""The pairs of a file as indices into distinct texts: resolved, each once, with one score.

Costs the texts once and 12 bytes a row's pair while reading. Rows are read again only to say where a wrong one stands.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sparsekd.collection.reading import shown
from sparsekd.exchange.layouts import Layout
from sparsekd.exchange.rows import Row, refused


@dataclass(frozen=True)
class Texts:
    """A collection's texts by id, and whether rows that name others are left out and counted or refused."""

    queries: Mapping[str, str]
    passages: Mapping[str, str]
    skip_unknown: bool = False


@dataclass(frozen=True)
class Pairs:
    """Distinct pairs: pair i is (queries[query_index[i]], passages[passage_index[i]]) with gold_sim[i], float32."""

    queries: list[str]
    passages: list[str]
    query_index: NDArray[np.int64]
    passage_index: NDArray[np.int64]
    gold_sim: NDArray[np.float32]
    num_repeated: int
    """Pairs met again with the same score."""
    num_unknown: int
    """Pairs left out because the collection does not have their query or passage."""

    def shown(self, pair: int) -> str:
        """Return a pair for a message."""
        query, passage = self.queries[self.query_index[pair]], self.passages[self.passage_index[pair]]
        return f"query {shown(query)}, passage {shown(passage)}"


def collect_pairs(layout: Layout, read: Callable[[], Iterator[Row]], texts: Texts | None) -> Pairs:
    """Resolve and join the rows of ``read``, which may be called again to find a row's place.

    Raises ValueError if a row names an unknown id or a text that ``texts`` does not have (unless those are to be left out), if one
    pair has two scores, or nothing is left.
    """
    resolve = _Resolver(layout, texts)
    query_index, passage_index, gold_sim, row_of_pair = array("q"), array("q"), array("f"), array("q")
    num_unknown = 0
    for number, row in enumerate(read()):
        query = resolve.query(row)
        passages = [None if query is None else resolve.passage(row, passage) for passage in row.passages]
        for passage, score in zip(passages, row.scores, strict=True):
            if query is None or passage is None:
                num_unknown += 1
                continue
            query_index.append(query)
            passage_index.append(passage)
            gold_sim.append(score)
            row_of_pair.append(number)
    if not gold_sim:
        raise ValueError(
            f"all {num_unknown:,} pairs are of unknown queries or passages; check that the collection is the right one"
        )
    columns = (np.array(query_index), np.array(passage_index), np.array(gold_sim))
    found = Pairs(list(resolve.queries), list(resolve.passages), *columns, num_repeated=0, num_unknown=num_unknown)
    return _each_once(found, np.array(row_of_pair), read)


class _Resolver:
    """Index of each distinct text, in order of first use."""

    def __init__(self, layout: Layout, texts: Texts | None) -> None:
        self.queries: dict[str, int] = {}
        self.passages: dict[str, int] = {}
        self._by_id = layout.refers_to == "ids"
        if self._by_id and texts is None:
            raise ValueError(f"layout {layout.name} names queries and passages by id; say whose with --collection FOLDER")
        self._skips = texts is not None and texts.skip_unknown
        self._known = None if texts is None else (texts.queries, texts.passages)
        self._sets = None if texts is None or self._by_id else (set(texts.queries.values()), set(texts.passages.values()))

    def query(self, row: Row) -> int | None:
        return self._index(row, row.query, 0, self.queries)

    def passage(self, row: Row, passage: str) -> int | None:
        return self._index(row, passage, 1, self.passages)

    def _index(self, row: Row, word: str, side: int, index_by_text: dict[str, int]) -> int | None:
        text: str | None = word
        if self._by_id and self._known is not None:
            text = self._known[side].get(word)
        elif self._sets is not None and word not in self._sets[side]:
            text = None
        if text is not None:
            return index_by_text.setdefault(text, len(index_by_text))
        if self._skips:
            return None
        kind, file = ("query", "queries.jsonl") if side == 0 else ("passage", "corpus.jsonl")
        what, of = (f"{kind}_id", "an _id") if self._by_id else (kind, "a text")
        remedy = "they must agree character by character; leave such pairs out, counted, with --skip-unknown"
        raise refused(row.place, f"{what} {shown(word)}", f"{of} of the collection's {file}", remedy)


def _each_once(pairs: Pairs, row_of_pair: NDArray[np.int64], read: Callable[[], Iterator[Row]]) -> Pairs:
    """Return the pairs in order of first use, repeats taken out; ValueError where a repeat has another score."""
    code = pairs.query_index * len(pairs.passages) + pairs.passage_index
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    same_pair = first[inverse]
    other = np.flatnonzero(pairs.gold_sim != pairs.gold_sim[same_pair])
    if other.size:
        again, before = int(other[0]), int(same_pair[other[0]])
        places = [next(islice(read(), int(row_of_pair[pair]), None)).place for pair in (again, before)]
        raise refused(
            places[0],
            f"score {pairs.gold_sim[again]} of {pairs.shown(again)}, which {places[1]} scores {pairs.gold_sim[before]} "
            f"({other.size:,} pairs in all have two scores)",
            "one score per pair of texts",
            "keep the right one",
        )
    kept = np.sort(first)
    return Pairs(
        pairs.queries,
        pairs.passages,
        pairs.query_index[kept],
        pairs.passage_index[kept],
        pairs.gold_sim[kept],
        num_repeated=len(code) - len(kept),
        num_unknown=pairs.num_unknown,
    )
