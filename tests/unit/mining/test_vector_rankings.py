"""Miners over vectors: shards equal the whole, recall is measured, positives are scored by the miner itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray

from sparsekd.collection.beir import Collection
from sparsekd.mining.question import JudgedQuery, Question, Ranking
from sparsekd.mining.ranking import NONE
from sparsekd.mining.searches import Searches

NUM_PASSAGES, NUM_QUERIES, WIDTH = 3_000, 40, 12
DENSE = {"kind": "dense", "quota": 3, "depth": 20, "model": "some/encoder"}
SPARSE = {"kind": "sparse", "quota": 3, "depth": 20, "model": "some/student"}


class NumberedVectors:
    """A VectorSource: a text is a number, and its vector is drawn around one of 60 centres, so for 2,900 numbers; then again."""

    def __init__(self, similarity: Any) -> None:
        self._similarity = similarity
        centres = np.random.default_rng(0).normal(size=(60, WIDTH))
        random = np.random.default_rng(1)
        self._vectors = (centres[random.integers(0, 60, 2900)] + 0.3 * random.normal(size=(2900, WIDTH))).astype(np.float32)
        self.longest = 0

    def similarity(self, spec: Any) -> Any:
        return self._similarity

    def vectors(self, spec: Any, texts: Sequence[str], role: Any) -> NDArray[np.float32]:
        self.longest = max(self.longest, len(texts))
        return self._vectors[[int(text) % 2900 for text in texts]]

    def sparse_vectors(self, spec: Any, texts: Sequence[str], role: Any) -> Any:
        dense = self.vectors(spec, texts, role)
        return scipy.sparse.csr_matrix(np.where(dense > 0.8, dense, 0))


@pytest.fixture
def rank(make_recipe: Any, fields_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranking]:
    """Return ``rank(miner, similarity, shard)``: the miner's answer to 40 queries over 3,000 passages, some of them equal."""
    ids = [f"p{number}" for number in range(NUM_PASSAGES)]
    queries = {f"q{number}": str(70 * number) for number in range(NUM_QUERIES)}
    collection = Collection({each: each[1:] for each in ids}, queries, {}, {})
    judged = [JudgedQuery(query_id, [f"p{number}", f"p{number + 50}"], []) for number, query_id in enumerate(queries)]

    def rank_by(
        miner: dict[str, Any], similarity: str = "dot", shard: int = 10**6, run: dict[str, str] | None = None, **mining: Any
    ) -> Ranking:
        recipe = make_recipe({"miners": [miner], **mining}, run={"shard_passages": shard, **(run or {})})
        source = NumberedVectors(similarity)
        question, fields = Question(recipe, collection, judged, source), fields_of(recipe, collection, similarity)
        searches = Searches(question, cache=tmp_path_factory.mktemp("cache"), fields=fields)  # another each time: all is searched
        searches.share({})
        [found] = searches.rankings()
        assert source.longest <= max(shard, NUM_PASSAGES if "index" in miner else NUM_QUERIES)
        return found

    return rank_by


@pytest.mark.parametrize("shard", [150, 2_999])
@pytest.mark.parametrize(("miner", "similarity"), [(DENSE, "dot"), (DENSE, "cosine"), (DENSE, "euclidean"), (SPARSE, "dot")])
def test_shard_by_shard_equals_the_single_index_to_the_id_and_the_bit(
    rank: Callable[..., Ranking], miner: dict[str, Any], similarity: str, shard: int
) -> None:
    whole, parts = rank(miner, similarity), rank(miner, similarity, shard)

    np.testing.assert_array_equal(parts.positions_QK, whole.positions_QK)
    np.testing.assert_array_equal(parts.scores_QK, whole.scores_QK)


@pytest.mark.parametrize("shard", [999, 10**6])
@pytest.mark.parametrize("miner", [DENSE, SPARSE])
def test_a_filter_by_the_miner_scores_positives_as_the_search_does(
    rank: Callable[..., Ranking], miner: dict[str, Any], shard: int
) -> None:
    found = rank({**miner, "depth": NUM_PASSAGES}, shard=shard, filter={"absolute_margin": 0.0})

    for number in range(NUM_QUERIES):
        score = dict(zip(found.positions_QK[number].tolist(), found.scores_QK[number].tolist(), strict=True))
        assert found.ceilings_Q[number] == min(score.get(number, 0.0), score.get(number + 50, 0.0))


@pytest.mark.parametrize("kind", ["ivf-flat", "hnsw"])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean"])
def test_an_approximate_index_is_scored_exactly_and_its_recall_is_what_it_says(
    rank: Callable[..., Ranking], kind: str, similarity: str
) -> None:
    exact, found = rank(DENSE, similarity), rank({**DENSE, "index": kind}, similarity)

    hits, wanted = 0, 0
    for row in range(NUM_QUERIES):
        score = dict(zip(exact.positions_QK[row].tolist(), exact.scores_QK[row].tolist(), strict=True))
        for position, value in zip(found.positions_QK[row].tolist(), found.scores_QK[row].tolist(), strict=True):
            assert position == NONE or score.get(position, value) == value
        hits += len({*score} & {*found.positions_QK[row].tolist()})
        wanted += len(score)
        is_found = found.positions_QK[row] != NONE
        assert (np.diff(found.scores_QK[row][is_found]) <= 0).all()
    assert found.facts["recall"] == round(hits / wanted, 4) > 0.8
    assert found.facts["recall_queries"] == NUM_QUERIES
    assert (found.facts["index"], exact.facts) == (kind, {})


@pytest.mark.parametrize("kind", ["ivf-flat", "hnsw"])
def test_shards_change_nothing_in_an_approximate_index(rank: Callable[..., Ranking], kind: str) -> None:
    whole, parts = rank({**DENSE, "index": kind}), rank({**DENSE, "index": kind}, shard=700)

    np.testing.assert_array_equal(parts.positions_QK, whole.positions_QK)
    np.testing.assert_array_equal(parts.scores_QK, whole.scores_QK)
    assert parts.facts == whole.facts


def test_too_few_passages_to_train_on_are_refused_before_anything_is_encoded(rank: Callable[..., Ranking]) -> None:
    with pytest.raises(ValueError, match="3,000 passages are too few to train it, it needs 9,984"):
        rank({**DENSE, "index": "ivf-pq"})


def test_vectors_of_a_gpu_are_searched_on_the_cpu_where_asked(rank: Callable[..., Ranking]) -> None:
    faiss = pytest.importorskip("faiss")
    if faiss.get_num_gpus() > 0:
        pytest.skip("this FAISS has a GPU")
    expected = rank(DENSE)

    found = rank(DENSE, run={"device": "cuda", "search_device": "cpu"})

    np.testing.assert_array_equal(found.positions_QK, expected.positions_QK)
    np.testing.assert_array_equal(found.scores_QK, expected.scores_QK)
    with pytest.raises(ValueError, match=r"FAISS sees 0 GPUs .*use --set run.search_device=cpu"):
        rank(DENSE, run={"device": "cuda"})


def test_recall_and_parameters_are_logged(rank: Callable[..., Ranking], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sparsekd.mining")

    rank({**DENSE, "index": "hnsw"})

    assert "depth 20, build_effort 200, index hnsw, links 32, recall " in caplog.text
