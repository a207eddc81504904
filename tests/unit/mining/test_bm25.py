from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
import Stemmer

from sparsekd.mining.bm25 import BM25Index

WORDS = ["cat", "cats", "dog", "running", "runs", "city", "river", "the", "heart", "disease", "a", "x1"]


def random_texts(num: int, longest: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(0, longest))) for _ in range(num)]


def brute_force(passages: dict[str, str], query: str, k1: float, b: float) -> dict[str, float]:
    """BM25 by the textbook, in Python floats."""
    stem = Stemmer.Stemmer("porter").stemWord

    def terms(text: str) -> list[str]:
        return [stem(word) for word in re.findall(r"\b\w\w+\b", text.lower())]

    bags = {passage_id: Counter(terms(text)) for passage_id, text in passages.items()}
    mean_length = sum(bag.total() for bag in bags.values()) / len(bags)
    scores = dict.fromkeys(passages, 0.0)
    for term in terms(query):
        df = sum(term in bag for bag in bags.values())
        idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
        for passage_id, bag in ((passage_id, bag) for passage_id, bag in bags.items() if bag[term]):
            scores[passage_id] += idf * bag[term] / (bag[term] + k1 * (1 - b + b * bag.total() / mean_length))
    return scores


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75), (2.0, 0.0), (0.5, 1.0)])
def test_scores_equal_the_formula_for_every_passage(k1: float, b: float) -> None:
    passages = {f"p{number}": text for number, text in enumerate(random_texts(40, 12, seed=1))}
    queries = random_texts(15, 5, seed=2)

    ids, scores = BM25Index(passages, k1, b).search(queries, depth=len(passages))

    for query, found, values in zip(queries, ids, scores, strict=True):
        expected = {passage_id: score for passage_id, score in brute_force(passages, query, k1, b).items() if score > 0}
        assert set(found) == set(expected)
        np.testing.assert_allclose(values, [expected[passage_id] for passage_id in found], rtol=1e-5)


def test_best_come_first_and_ties_by_passage_id_also_at_the_cut() -> None:
    passages = {"b": "cat", "c": "cat", "a": "cat", "z": "cat cat dog", "d": "cat"}

    ids, scores = BM25Index(passages, 0.9, 0.4).search(["cat"], depth=3)

    assert ids == [["z", "a", "b"]] or ids == [["a", "b", "c"]]
    assert list(scores[0]) == sorted(scores[0], reverse=True)
    assert BM25Index({key: "cat" for key in passages}, 0.9, 0.4).search(["cat"], depth=3)[0] == [["a", "b", "c"]]


def test_a_passage_without_a_shared_token_is_never_returned() -> None:
    index = BM25Index({"p0": "cat", "p1": "dog"}, 0.9, 0.4)

    ids, scores = index.search(["cats"], depth=10)

    assert ids == [["p0"]]
    assert scores[0].shape == (1,)
    assert scores[0].dtype == np.float32


@pytest.mark.parametrize("query", ["zebra", "", "a", "??"])
def test_a_query_without_a_known_token_returns_nothing(query: str) -> None:
    index = BM25Index({"p0": "a cat", "p1": "a dog"}, 0.9, 0.4)

    ids, scores = index.search([query], depth=10)

    assert ids == [[]]
    assert scores[0].size == 0


def test_a_query_does_not_change_what_another_finds() -> None:
    passages = {f"p{number}": text for number, text in enumerate(random_texts(30, 12, seed=3))}
    queries = random_texts(10, 5, seed=4)
    index = BM25Index(passages, 0.9, 0.4)

    together = index.search(queries, depth=7)
    alone = [index.search([query], depth=7) for query in queries]

    assert together[0] == [ids[0] for ids, _ in alone]
    for values, (_, single) in zip(together[1], alone, strict=True):
        np.testing.assert_array_equal(values, single[0])


def test_pair_scores_are_bit_equal_to_search() -> None:
    passages = {f"p{number}": text for number, text in enumerate(random_texts(30, 12, seed=5))}
    index = BM25Index(passages, 0.9, 0.4)
    query = "cat cats running city zebra"

    positions_QK, scores_QK = index.search_positions([query], depth=30)
    everything = np.zeros(30, dtype=np.float32)
    everything[positions_QK[0][positions_QK[0] >= 0]] = scores_QK[0][positions_QK[0] >= 0]

    np.testing.assert_array_equal(index.pair_scores(query, np.arange(30)), everything)


def test_passages_without_words_are_searched_and_never_found() -> None:
    assert BM25Index({"p0": "", "p1": "?"}, 0.9, 0.4).search(["cat"], depth=3)[0] == [[]]
    assert BM25Index({"p0": "", "p1": "cat"}, 0.9, 0.4).search(["cat"], depth=3)[0] == [["p1"]]


def test_no_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="no passages to index; expected at least one"):
        BM25Index({}, 0.9, 0.4)
