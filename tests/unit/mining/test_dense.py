from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.mining.dense import DenseIndex, check_one_faiss, dense_search

SIMILARITIES = ["dot", "cosine", "euclidean"]


def vectors(num: int, width: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(num, width)).astype(np.float32)


def brute_force(queries: NDArray[Any], passages: NDArray[Any], similarity: str) -> NDArray[np.float64]:
    queries, passages = queries.astype(np.float64), passages.astype(np.float64)
    if similarity == "euclidean":
        distances: NDArray[np.float64] = -np.linalg.norm(queries[:, None] - passages[None], axis=2)
        return distances
    if similarity == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        passages = passages / np.linalg.norm(passages, axis=1, keepdims=True)
    products: NDArray[np.float64] = queries @ passages.T
    return products


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("num_passages", "depth"), [(300, 20), (300, 300), (5, 100), (1, 1)])
def test_search_equals_brute_force(similarity: Any, num_passages: int, depth: int) -> None:
    queries, passages = vectors(17, 24, seed=1), vectors(num_passages, 24, seed=2)
    passage_ids = [f"p{number}" for number in range(num_passages)]

    ids, scores = dense_search(queries, passages, passage_ids, similarity=similarity, depth=depth, device="cpu")

    expected = brute_force(queries, passages, similarity)
    best = np.argsort(-expected, axis=1)[:, :depth]
    assert ids == [[f"p{position}" for position in row] for row in best]
    np.testing.assert_allclose(np.stack(scores), np.take_along_axis(expected, best, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_equal_passages_come_by_passage_id_however_many(similarity: Any) -> None:
    passages = np.repeat(vectors(2, 8, seed=3), 500, axis=0)
    passage_ids = [f"p{number:04d}" for number in range(1000)][::-1]
    query = passages[:1]

    ids, _ = dense_search(query, passages, passage_ids, similarity=similarity, depth=10, device="cpu")

    scores = dict(zip(passage_ids, brute_force(query, passages, similarity)[0].round(6), strict=True))
    assert ids[0] == sorted(passage_ids, key=lambda passage_id: (-scores[passage_id], passage_id))[:10]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_query_does_not_change_what_another_finds(similarity: Any) -> None:
    queries, passages = vectors(64, 32, seed=4), vectors(500, 32, seed=5)
    index = DenseIndex(passages, [f"p{number}" for number in range(500)], similarity=similarity, device="cpu")

    positions_QK, scores_QK = index.search_positions(queries, 10)

    for row in range(0, 64, 7):
        alone, alone_scores = index.search_positions(queries[row : row + 1], 10)
        np.testing.assert_array_equal(alone[0], positions_QK[row])
        np.testing.assert_array_equal(alone_scores[0], scores_QK[row])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_pair_scores_are_bit_equal_to_search(similarity: Any) -> None:
    queries, passages = vectors(3, 33, seed=6), vectors(200, 33, seed=7)
    index = DenseIndex(passages, [f"p{number}" for number in range(200)], similarity=similarity, device="cpu")

    positions_QK, scores_QK = index.search_positions(queries, 5)

    for row in range(3):
        np.testing.assert_array_equal(index.pair_scores(queries[row], positions_QK[row]), scores_QK[row])
        np.testing.assert_array_equal(index.pair_scores(queries[row], positions_QK[row, :1]), scores_QK[row, :1])


@pytest.mark.parametrize(
    ("similarity", "unit", "is_copied"), [("dot", False, False), ("cosine", True, False), ("cosine", False, True)]
)
def test_vectors_are_searched_where_they_lie_unless_cosine_needs_them_of_unit_length(
    similarity: Any, unit: bool, is_copied: bool
) -> None:
    queries, passages = vectors(17, 24, seed=1), vectors(5000, 24, seed=2)
    if unit:
        passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    index = DenseIndex(passages, [f"p{number}" for number in range(5000)], similarity=similarity, device="cpu")

    positions_QK, _ = index.search_positions(queries, 30)

    assert np.shares_memory(index._searched, passages) is not is_copied
    np.testing.assert_array_equal(positions_QK, np.argsort(-brute_force(queries, passages, similarity), axis=1)[:, :30])


@pytest.mark.parametrize("num_queries", [1, 19, 20, 1025])
def test_however_many_queries_faiss_is_given_at_once_each_finds_the_same(num_queries: int) -> None:
    queries, passages = vectors(1025, 16, seed=12), vectors(700, 16, seed=13)
    index = DenseIndex(passages, [f"p{number:03d}" for number in range(700)], similarity="dot", device="cpu")

    found = index.search_positions(queries[:num_queries], 40)

    for ours, theirs in zip(found, index.search_positions(queries, 40), strict=True):
        np.testing.assert_array_equal(ours, theirs[:num_queries])


def test_no_filler_leaves_the_search() -> None:
    ids, scores = dense_search(vectors(2, 4, 8), vectors(3, 4, 9), ["a", "b", "c"], similarity="dot", depth=50, device="cpu")

    assert [sorted(row) for row in ids] == [["a", "b", "c"]] * 2
    assert np.isfinite(np.stack(scores)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_passage_vector_that_is_not_finite_is_refused_by_id(value: float) -> None:
    passages = vectors(4, 4, seed=10)
    passages[2, 1] = value

    with pytest.raises(ValueError, match=r"1 of 4 vectors are not finite \(first: p2\)"):
        DenseIndex(passages, ["p0", "p1", "p2", "p3"], similarity="dot", device="cpu")


def test_a_query_vector_that_is_not_finite_is_refused_by_row() -> None:
    index = DenseIndex(vectors(4, 4, seed=11), ["p0", "p1", "p2", "p3"], similarity="dot", device="cpu")
    queries = vectors(3, 4, seed=12)
    queries[1] = np.nan

    with pytest.raises(ValueError, match=r"1 of 3 vectors are not finite \(first: query row 1\)"):
        index.search_positions(queries, 2)


def test_a_zero_vector_is_refused_under_cosine_only() -> None:
    passages = np.zeros((2, 4), dtype=np.float32)

    with pytest.raises(ValueError, match=r"2 of 2 vectors are zero \(first: a\), which have no cosine"):
        DenseIndex(passages, ["a", "b"], similarity="cosine", device="cpu")
    assert (
        DenseIndex(passages, ["a", "b"], similarity="dot", device="cpu").search_positions(passages, 2)[0].tolist()
        == [[0, 1]] * 2
    )


def test_manhattan_is_refused_with_what_is_possible() -> None:
    with pytest.raises(
        ValueError, match="similarity 'manhattan' has no exact FAISS flat index here; expected dot, cosine or euclidean"
    ):
        dense_search(vectors(1, 2, 1), vectors(1, 2, 1), ["a"], similarity="manhattan", depth=1, device="cpu")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for 2 passage_ids"):
        DenseIndex(vectors(3, 4, 1), ["a", "b"], similarity="dot", device="cpu")
    index = DenseIndex(vectors(2, 4, 1), ["a", "b"], similarity="dot", device="cpu")
    with pytest.raises(ValueError, match=r"shape \(1, 5\), passages have width 4"):
        index.search_positions(vectors(1, 5, 1), 1)


def test_cuda_without_a_gpu_in_faiss_is_refused_and_never_falls_back() -> None:
    faiss = pytest.importorskip("faiss")
    if faiss.get_num_gpus() > 0:
        pytest.skip("this FAISS has a GPU")

    message = (
        r"device = 'cuda:0', but FAISS sees 0 GPUs \(faiss-.*use --set run.search_device=cpu, or install faiss-gpu in place of"
    )
    with pytest.raises(ValueError, match=message):
        DenseIndex(vectors(2, 4, 1), ["a", "b"], similarity="dot", device="cuda:0")


def test_a_depth_beyond_the_gpus_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    index = DenseIndex(vectors(2, 4, 1), ["a", "b"], similarity="dot", device="cpu")
    monkeypatch.setattr(index, "_gpu_index", object())

    message = r"depth 5000 on a GPU, where \d+ is the limit; lower it or use --set run.search_device=cpu"
    with pytest.raises(ValueError, match=message):
        index.search_positions(vectors(1, 4, 1), 5000)


def test_two_faiss_distributions_are_refused_by_name() -> None:
    check_one_faiss(["faiss-cpu 1.15.1"])

    with pytest.raises(ValueError, match=r"faiss-cpu 1.15.1 and faiss-gpu 1.15.1 are both installed .* one of them is damaged"):
        check_one_faiss(["faiss-cpu 1.15.1", "faiss-gpu 1.15.1"])


def test_a_missing_faiss_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # import faiss now raises, as where it is not installed

    with pytest.raises(ValueError, match=r"needs FAISS, but import faiss failed \(.*\); install faiss-cpu or faiss-gpu"):
        dense_search(vectors(1, 4, 1), vectors(2, 4, 2), ["a", "b"], similarity="dot", depth=1, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_gpu_finds_what_the_cpu_finds(similarity: Any) -> None:
    queries, passages = vectors(50, 64, seed=13), vectors(5000, 64, seed=14)
    passage_ids = [f"p{number}" for number in range(5000)]

    on_cpu = dense_search(queries, passages, passage_ids, similarity=similarity, depth=20, device="cpu")
    on_gpu = dense_search(queries, passages, passage_ids, similarity=similarity, depth=20, device="cuda")

    assert on_gpu[0] == on_cpu[0]
    np.testing.assert_array_equal(np.stack(on_gpu[1]), np.stack(on_cpu[1]))
