"""The stopping rule against numbers worked out by hand, and splits that cannot stop anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sparsekd.collection.beir import Collection
from sparsekd.recipe import TrainTeacher
from sparsekd.teacher_training.development import METRIC, DevReranking

PASSAGES = {"a": "1", "b": "2", "c": "3", "d": "4"}
SECTION = TrainTeacher(name="own", model="m", dev_depth=3, dev_queries=2)


class ByText:
    """Scores a pair by the number that its passage's text is, times ``sign``."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def predict(self, pairs: Sequence[tuple[str, str]], **kwargs: Any) -> np.ndarray:
        return np.array([self.sign * float(passage) for _, passage in pairs])


def collection(dev: dict[str, dict[str, int]]) -> Collection:
    return Collection(PASSAGES, {"q": "question", "r": "another"}, {"train": {"q": {"a": 1}}, "dev": dev}, {})


def first_stage(question: str, another: str = "") -> Any:
    """Return what finds these passage_ids, a letter each, for the two queries."""
    found = {"question": list(question), "another": list(another)}
    return lambda queries, depth: [found[query][:depth] for query in queries]


def test_ndcg_is_that_of_the_reranked_first_stage() -> None:
    dev = DevReranking(SECTION, collection({"q": {"c": 1}}), first_stage("abc"))

    assert dev.bm25 == pytest.approx(1 / math.log2(4))  # c is third
    assert dev(ByText(1)) == {METRIC: pytest.approx(1.0)}
    assert dev(ByText(-1)) == {METRIC: pytest.approx(1 / math.log2(4))}


def test_a_judged_passage_that_the_first_stage_missed_cannot_be_reranked() -> None:
    # grades 2 (d, not found) and 1 (b): DCG 1 at the first rank, ideal 2 + 1 / log2(3)
    dev = DevReranking(SECTION, collection({"q": {"d": 2, "b": 1}}), first_stage("ba"))

    assert dev(ByText(1)) == {METRIC: pytest.approx(1 / (2 + 1 / math.log2(3)))}


def test_the_mean_is_over_queries_and_one_without_passages_is_0() -> None:
    dev = DevReranking(SECTION, collection({"q": {"c": 1}, "r": {"a": 1}}), first_stage("c"))

    assert dev(ByText(1)) == {METRIC: pytest.approx(0.5)}


def test_equal_scores_keep_the_first_stage_s_order() -> None:
    dev = DevReranking(SECTION, collection({"q": {"c": 1}}), first_stage("abc"))

    assert dev(ByText(0))[METRIC] == pytest.approx(dev.bm25)


@pytest.mark.parametrize("qrels", [{"train": {"q": {"a": 1}}}, {"train": {"q": {"a": 1}}, "dev": {}}], ids=["no file", "empty"])
def test_no_dev_judgements_are_refused(qrels: dict[str, Any]) -> None:
    judged = Collection(PASSAGES, {"q": "question"}, qrels, {})

    with pytest.raises(ValueError, match=r"no dev query has judgements \(splits with judgements: train\); expected qrels/dev.tsv"):
        DevReranking(SECTION, judged, first_stage("a"))


def test_a_first_stage_that_finds_nothing_judged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dev_depth = 3: BM25's best passages of 1 dev queries hold none that is judged"):
        DevReranking(SECTION, collection({"q": {"d": 1}}), first_stage("abcd"))
