from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.mining.approximate import ApproximateIndex, describe_parameters, index_parameters, recall

NUM_PASSAGES, WIDTH = 10_000, 8


def clustered(num: int, seed: int) -> NDArray[np.float32]:
    """Vectors around 100 centres, as texts' are: without clusters no list is nearer than another."""
    centres = np.random.default_rng(0).normal(size=(100, WIDTH))
    random = np.random.default_rng(seed)
    return (centres[random.integers(0, 100, num)] + 0.3 * random.normal(size=(num, WIDTH))).astype(np.float32)


@functools.cache  # training takes seconds
def filled(kind: Any, similarity: Any = "dot", depth: int = 10) -> ApproximateIndex:
    passages = clustered(NUM_PASSAGES, 1)
    index = ApproximateIndex(kind, WIDTH, index_parameters(kind, NUM_PASSAGES, depth), similarity=similarity, device="cpu")
    if index.num_train_vectors:
        index.train(passages[: index.num_train_vectors])
    for start in range(0, NUM_PASSAGES, 3000):
        index.add(passages[start : start + 3000])
    return index


@pytest.mark.parametrize(
    ("kind", "similarity"),
    [*((kind, similarity) for kind in ("ivf-flat", "hnsw") for similarity in ("dot", "cosine", "euclidean")), ("ivf-pq", "cosine")],
)
def test_most_of_the_best_passages_are_among_the_proposals(kind: Any, similarity: Any) -> None:
    queries, passages = clustered(50, 2), clustered(NUM_PASSAGES, 1)

    proposed = filled(kind, similarity).search(queries, 10)

    left, right = queries.astype(np.float64), passages.astype(np.float64)
    if similarity == "cosine":
        left, right = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (left, right))
    scores = left @ right.T
    if similarity == "euclidean":
        scores = 2 * scores - (right**2).sum(axis=1)
    assert recall(proposed, np.argsort(-scores, axis=1)[:, :10]) > 0.85
    assert all(len({*row[row >= 0]}) == (row >= 0).sum() for row in proposed)


@pytest.mark.parametrize("kind", ["ivf-flat", "hnsw"])
def test_an_index_built_twice_proposes_the_same(kind: Any) -> None:
    queries = clustered(20, 3)

    first, second = filled(kind).search(queries, 10), filled.__wrapped__(kind).search(queries, 10)

    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("kind", "num_passages", "expected"),
    [
        ("ivf-flat", 2_496, {"lists": 64, "probes": 4, "train_vectors": 2_496, "window": 164}),
        ("ivf-flat", 52_345, {"lists": 512, "probes": 32, "train_vectors": 52_345, "window": 164}),
        ("ivf-flat", 8_841_823, {"lists": 8192, "probes": 512, "train_vectors": 2_097_152, "window": 164}),
        ("ivf-pq", 1_000_000, {"lists": 2048, "probes": 128, "train_vectors": 524_288, "bits": 8, "refine": 4, "window": 464}),
        ("hnsw", 100, {"links": 32, "build_effort": 200, "search_effort": 328, "window": 164}),
    ],
)
def test_parameters_follow_from_the_number_of_passages(kind: Any, num_passages: int, expected: dict[str, int]) -> None:
    assert index_parameters(kind, num_passages, 100) == expected


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq"])
def test_every_list_has_vectors_to_be_trained_on_whatever_the_size(kind: Any) -> None:
    for num_passages in range(9_984, 400_000, 997):
        parameters = index_parameters(kind, num_passages, 100)

        assert parameters["train_vectors"] >= 39 * parameters["lists"]
        assert parameters["lists"] <= 4 * num_passages**0.5
        assert parameters["probes"] >= 4


@pytest.mark.parametrize(("kind", "few", "needed"), [("ivf-flat", 2_495, "2,496"), ("ivf-pq", 9_983, "9,984")])
def test_too_few_passages_to_train_on_are_refused_with_what_would_do(kind: Any, few: int, needed: str) -> None:
    message = f"index = '{kind}': {few:,} passages are too few to train it, it needs {needed} .39 for each centroid.; use index = "
    with pytest.raises(ValueError, match=message):
        index_parameters(kind, few, 100)


def test_parameters_are_told_by_name() -> None:
    assert describe_parameters(index_parameters("hnsw", 5, 1)) == "links 32, build_effort 200, search_effort 130, window 65"


def test_a_collection_smaller_than_the_window_is_searched_whole() -> None:
    passages = clustered(5, 1)
    index = ApproximateIndex("hnsw", WIDTH, index_parameters("hnsw", 5, 10), similarity="dot", device="cpu")
    index.add(passages)

    assert sorted(index.search(passages[:1], 10)[0].tolist()) == [0, 1, 2, 3, 4]


def test_hnsw_on_a_gpu_and_other_similarities_are_refused() -> None:
    parameters = index_parameters("hnsw", 5, 1)

    with pytest.raises(ValueError, match=r"device = 'cuda': FAISS has no HNSW index for GPUs; use index = \"ivf-flat\" or --set"):
        ApproximateIndex("hnsw", WIDTH, parameters, similarity="dot", device="cuda")
    with pytest.raises(ValueError, match="similarity 'manhattan' has no FAISS index here; expected dot, cosine or euclidean"):
        ApproximateIndex("hnsw", WIDTH, parameters, similarity="manhattan", device="cpu")


def test_a_gpu_that_faiss_does_not_see_is_refused() -> None:
    faiss = pytest.importorskip("faiss")
    if faiss.get_num_gpus() > 0:
        pytest.skip("this FAISS has a GPU")

    with pytest.raises(ValueError, match=r"device = 'cuda:0', but FAISS sees 0 GPUs"):
        ApproximateIndex("ivf-flat", 4, index_parameters("ivf-flat", 5_000, 1), similarity="dot", device="cuda:0")


def test_vectors_that_are_not_finite_are_refused() -> None:
    index = ApproximateIndex("hnsw", 2, index_parameters("hnsw", 5, 1), similarity="dot", device="cpu")

    with pytest.raises(ValueError, match=r"1 of 2 vectors are not finite \(first: passage row 1\)"):
        index.add(np.array([[1, 2], [np.nan, 1]], dtype=np.float32))


def test_recall_by_hand() -> None:
    exact, found = np.array([[1, 2, 3], [4, -1, -1]]), np.array([[3, 1, 9], [5, 6, -1]])

    assert recall(found, exact) == 2 / 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq"])
def test_a_gpu_index_proposes_most_of_what_the_cpu_index_does(kind: Any) -> None:
    passages, queries, parameters = clustered(NUM_PASSAGES, 1), clustered(20, 3), index_parameters(kind, NUM_PASSAGES, 10)
    index = ApproximateIndex(kind, WIDTH, parameters, similarity="dot", device="cuda")
    index.train(passages)
    index.add(passages)

    assert recall(index.search(queries, 10), filled(kind).search(queries, 10)[:, :10]) > 0.9
