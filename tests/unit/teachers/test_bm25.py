"""BM25 as a teacher: what a pair's score is, what it depends on, and what its identity says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.bank.scores import ScoreBank
from sparsekd.mining.bm25 import BM25Index
from sparsekd.recipe import BM25Teacher, Run
from sparsekd.teachers.bm25 import BM25Scorer
from sparsekd.teachers.identity import bm25_identity
from sparsekd.teachers.scoring import PairTexts, bank_scorer

Draw = Callable[..., list[str]]

SETTINGS = [{}, {"k1": 1.2, "b": 0.75}, {"k1": 2.0, "b": 0.0}]


def teacher(**fields: Any) -> BM25Teacher:
    return BM25Teacher(**{"name": "lexical", "kind": "bm25", **fields})


def by_id(texts: list[str]) -> dict[str, str]:
    return {f"p{number}": text for number, text in enumerate(texts)}


@pytest.fixture
def passages(draw_texts: Draw) -> dict[str, str]:
    """40 passages, one of them twice, one without a word."""
    texts = draw_texts(40, longest=12, seed=1)
    return by_id([*texts, texts[3], "?"])


@pytest.fixture
def pairs(draw_texts: Draw, passages: dict[str, str]) -> list[tuple[str, str]]:
    """Every pair of 9 queries, one of them repeating its words, one unknown, and the passages."""
    queries = [*draw_texts(7, longest=4, seed=2), "heat heat flow", "zebra"]
    return [(query, passage) for query in queries for passage in passages.values()]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_pairs_score_is_bit_equal_to_what_a_search_of_the_collection_gives(
    settings: dict[str, Any], passages: dict[str, str], pairs: list[tuple[str, str]]
) -> None:
    gold_sim = BM25Scorer(teacher(**settings), passages).score(pairs)

    queries = list(dict.fromkeys(query for query, _ in pairs))
    ids, scores = BM25Index(passages, settings.get("k1", 0.9), settings.get("b", 0.4)).search(queries, len(passages))
    found = {
        (query, passages[passage_id]): score
        for query, passage_ids, values in zip(queries, ids, scores, strict=True)
        for passage_id, score in zip(passage_ids, values.tolist(), strict=True)
    }
    assert gold_sim.dtype == np.float32
    assert gold_sim.tolist() == [found.get(pair, 0.0) for pair in pairs]


def test_a_pair_without_a_shared_token_scores_exactly_0() -> None:
    scorer = BM25Scorer(teacher(), {"p0": "a river in the city", "p1": "cats and dogs"})

    gold_sim = scorer.score([("rivers", "cats and dogs"), ("rivers", "a river in the city"), ("xylem", "cats and dogs")])

    assert gold_sim[[0, 2]].tolist() == [0.0, 0.0]
    assert gold_sim[1] > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_pairs_score_does_not_depend_on_the_pairs_around_it(
    seed: int, passages: dict[str, str], pairs: list[tuple[str, str]]
) -> None:
    whole = BM25Scorer(teacher(), passages).score(pairs)
    generator = np.random.default_rng(seed)
    order, cuts = generator.permutation(len(pairs)), np.sort(generator.choice(len(pairs), 20))

    scorer, apart = BM25Scorer(teacher(), passages), np.empty_like(whole)
    for rows in np.split(order, cuts):
        apart[rows] = scorer.score([pairs[row] for row in rows])

    assert apart.tobytes() == whole.tobytes()


def test_the_order_of_the_collection_changes_no_bit_of_a_score(passages: dict[str, str], pairs: list[tuple[str, str]]) -> None:
    backwards = {f"other-{passage_id}": text for passage_id, text in reversed(passages.items())}

    whole, again = (BM25Scorer(teacher(), texts).score(pairs) for texts in (passages, backwards))

    assert again.tobytes() == whole.tobytes()


def test_a_passage_of_another_collection_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^teacher 'lexical': passage 'a dog' is none of the collection's 1; BM25 scores by"):
        BM25Scorer(teacher(), {"p0": "a cat"}).score([("cat", "a dog")])


def test_scores_are_banked_by_query_and_a_second_time_no_index_is_built(
    tmp_path: Path, passages: dict[str, str], draw_texts: Draw
) -> None:
    queries, texts = draw_texts(5, seed=2), list(passages.values())
    query_index, passage_index = np.divmod(np.arange(5 * len(texts), dtype=np.int32), len(texts))
    wanted = PairTexts(queries, texts, query_index, passage_index)
    scorer = BM25Scorer(teacher(), passages)
    scores = ScoreBank(tmp_path).open(scorer.identity)
    first = bank_scorer(scorer, "lexical", Run(shard_pairs=16), scores, wanted, by_query=True)

    # Without passages an index is refused.
    again = bank_scorer(BM25Scorer(teacher(), {}), "lexical", Run(), scores, wanted, by_query=True)

    unique = 5 * len(set(texts))
    assert asdict(first) == {"pairs": unique, "pairs_scored": unique, "pairs_reused": 0, "num_truncated": 0}
    assert (again.pairs_scored, again.pairs_reused) == (0, unique)


# Identity


def identity_key(passages: list[str], **fields: Any) -> str:
    return key_of(bm25_identity(teacher(**fields), passages))


def test_identity_says_all_that_can_change_a_score() -> None:
    identity = bm25_identity(teacher(), ["a cat"])

    digest = identity.pop("passages")
    assert len(digest) == 64
    assert identity == {
        "stage": "teachers/bm25 v1",
        "kind": "bm25",
        "version": 1,
        "variant": "lucene",
        "k1": 0.9,
        "b": 0.4,
        "tokens": {"pattern": r"(?u)\b\w\w+\b", "lower_case": True, "stop_words": None, "stemmer": "porter"},
        "precision": "float32",
    }
    assert json.loads(json.dumps(identity)) == identity


def test_the_order_and_ids_of_passages_and_the_teachers_name_enter_no_key(passages: dict[str, str]) -> None:
    texts = list(passages.values())

    assert identity_key(texts[::-1], name="another") == identity_key(texts)
    assert BM25Scorer(teacher(), passages).identity == BM25Scorer(teacher(), by_id(texts[::-1])).identity


def test_every_setting_and_every_passage_enters_the_key() -> None:
    texts = ["a cat", "a dog"]
    collections = [texts, ["a cat", "a dog", ""], ["a cat", "a dog", "a dog"], ["a cat"], ["a cat", "A dog"]]

    keys = [identity_key(each) for each in collections] + [identity_key(texts, k1=1.2), identity_key(texts, b=0.5)]

    assert len(set(keys)) == len(keys)


def test_a_repeated_passage_changes_scores_and_so_enters_the_key() -> None:
    pair = [("cat", "a cat")]

    once, twice = (BM25Scorer(teacher(), by_id(texts)).score(pair) for texts in (["a cat", "dog"], ["a cat", "dog", "dog"]))

    assert once.tolist() != twice.tolist()


def test_scoring_imports_no_torch() -> None:
    code = (
        "import sys; from sparsekd.recipe import BM25Teacher; from sparsekd.teachers import scoring; from sparsekd.teachers.bm25 "
        "import BM25Scorer\n"
        "scorer = BM25Scorer(BM25Teacher(name='b', kind='bm25'), {'p': 'a cat'})\n"
        "print(scorer.identity['kind'], scorer.score([('cats', 'a cat')]) > 0, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert done.stdout == "bm25 [ True] False\n"
