"""Approximate dense search: FAISS IVF-Flat, IVF-PQ and HNSW with parameters that follow from the collection's size.

They find fewer of the best passages than ``dense`` does, so whoever uses them measures how many (``vector_rankings``), and their
proposals are scored again exactly. What they save comes at that price: at 100,000 passages of width 384, 64 probes gave recall@100
.91 for 0.56 of the exact index's time, after 5.5 s of training (2 CPU cores, faiss 1.15).
Lists are trained from a fixed seed, HNSW is built by one thread: with several its links depend on their order.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.dense import SLACK, Similarity, check_vectors, check_window, load_faiss, on_device, unit_vectors

IndexKind = Literal["ivf-flat", "ivf-pq", "hnsw"]

INDEX_VERSION = 1
"""Raised when the same kind and passages would get other parameters, or another index under them."""
MIN_LISTS = 64
"""Below this many lists there is nothing to gain over a flat index."""
VECTORS_PER_LIST = 39
"""FAISS's own min_points_per_centroid: with fewer, k-means places centroids on single vectors."""
MAX_VECTORS_PER_LIST = 256
"""FAISS's own max_points_per_centroid: more training vectors are not used."""
_CODES = 256  # of a product quantizer of 8 bits, trained like lists
_REFINE = 4  # codes misplace passages, so four times the depth is scored again exactly
_QUERY_BLOCK = 1024


def index_parameters(kind: IndexKind, num_passages: int, depth: int) -> dict[str, int]:
    """Return the index's parameters by name, for plans, manifests and ``ApproximateIndex``.

    lists: the power of 2 at or below 4 √P (FAISS's guideline is 4 √P to 16 √P) that has ``VECTORS_PER_LIST`` vectors for each;
    probes: a sixteenth of them. Raises ValueError if that many vectors cannot train an index of this kind.

    >>> index_parameters("ivf-flat", 100_000, 100)
    {'lists': 1024, 'probes': 64, 'train_vectors': 100000, 'window': 164}
    """
    if kind == "hnsw":
        window = depth + SLACK
        return {"links": 32, "build_effort": 200, "search_effort": max(64, 2 * window), "window": window}
    needed = VECTORS_PER_LIST * (_CODES if kind == "ivf-pq" else MIN_LISTS)
    if num_passages < needed:
        raise ValueError(
            f"[mining.miners] index = {kind!r}: {num_passages:,} passages are too few to train it, it needs {needed:,} "
            f'({VECTORS_PER_LIST} for each centroid); use index = "flat", which is exact'
        )
    lists: int = 2 ** int(math.log2(min(4 * math.sqrt(num_passages), num_passages / VECTORS_PER_LIST)))
    parameters = {"lists": lists, "probes": lists // 16}
    parameters["train_vectors"] = min(num_passages, MAX_VECTORS_PER_LIST * max(lists, _CODES if kind == "ivf-pq" else 0))
    if kind == "ivf-pq":
        parameters |= {"bits": 8, "refine": _REFINE}
    return {**parameters, "window": depth * parameters.get("refine", 1) + SLACK}


class ApproximateIndex:
    """An index to be trained on a sample, given all passages in blocks, and then searched.

    Raises ValueError for an unsupported similarity, a device that FAISS or the kind cannot use, and vectors that ``DenseIndex``
    refuses too.
    """

    def __init__(self, kind: IndexKind, width: int, parameters: dict[str, int], *, similarity: Similarity, device: str) -> None:
        if similarity not in ("dot", "cosine", "euclidean"):
            raise ValueError(
                f"dense search: similarity {similarity!r} has no FAISS index here; expected dot, cosine or euclidean; choose "
                "another encoder for this miner"
            )
        if kind == "hnsw" and device.startswith("cuda"):
            raise ValueError(
                f"[run] device = {device!r}: FAISS has no HNSW index for GPUs; "
                'use index = "ivf-flat" or --set run.search_device=cpu'
            )
        self._faiss = load_faiss()
        self._kind = kind
        self._similarity = similarity
        self._parameters = parameters
        metric = self._faiss.METRIC_L2 if similarity == "euclidean" else self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.index_factory(width, _description(kind, width, parameters), metric)
        if kind == "hnsw":
            index.hnsw.efConstruction = parameters["build_effort"]
            index.hnsw.efSearch = parameters["search_effort"]
        self._index, self._on_gpu = on_device(index, device)
        if kind != "hnsw":
            self._index.nprobe = parameters["probes"]

    @property
    def num_train_vectors(self) -> int:
        """How many vectors ``train`` wants; 0 where there is nothing to train."""
        return self._parameters.get("train_vectors", 0)

    def train(self, vectors: NDArray[np.float32]) -> None:
        """Place the centroids by a sample of passage vectors float32 [n, D]."""
        self._index.train(self._prepared(vectors, "training row"))

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Add the next passages' vectors, float32 [n, D]; positions count on from those added before."""
        prepared = self._prepared(vectors, "passage row")
        num_threads = self._faiss.omp_get_max_threads()
        if self._kind == "hnsw":
            self._faiss.omp_set_num_threads(1)
        try:
            self._index.add(prepared)
        finally:
            self._faiss.omp_set_num_threads(num_threads)

    def search(self, query_vectors: NDArray[np.float32], depth: int) -> NDArray[np.int32]:
        """Return int32 [Q, W] positions of passages that may be among the best ``depth``, -1 where fewer were found; no order."""
        window = min(self._parameters["window"], int(self._index.ntotal))
        if self._on_gpu:
            check_window(depth, window)
        positions_QW = np.empty((len(query_vectors), window), dtype=np.int32)
        for start in range(0, len(query_vectors), _QUERY_BLOCK):
            block = self._prepared(query_vectors[start : start + _QUERY_BLOCK], "query row")
            positions_QW[start : start + len(block)] = self._index.search(block, window)[1]
        return positions_QW

    def _prepared(self, vectors: NDArray[np.float32], what: str) -> NDArray[np.float32]:
        """Contiguous, checked, and of unit length under cosine."""
        block = np.ascontiguousarray(vectors, dtype=np.float32)
        lengths = check_vectors(block, [f"{what} {row}" for row in range(len(block))], self._similarity)
        return unit_vectors(block, lengths) if self._similarity == "cosine" else block


def _description(kind: IndexKind, width: int, parameters: dict[str, int]) -> str:
    """What FAISS's index factory is asked for; product codes of a byte per four dims, or of as few as divide the width."""
    if kind == "hnsw":
        return f"HNSW{parameters['links']}"
    if kind == "ivf-flat":
        return f"IVF{parameters['lists']},Flat"
    parts = max(number for number in range(1, max(1, width // 4) + 1) if width % number == 0)
    return f"IVF{parameters['lists']},PQ{parts}x{parameters['bits']}"


def describe_parameters(parameters: dict[str, int]) -> str:
    """Return the parameters in words, for plans and logs."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def recall(found_QK: NDArray[Any], exact_QK: NDArray[Any]) -> float:
    """Return the share of exact positions [Q, K] that were found too, over all queries; -1 is nothing on either side."""
    wanted = [set(row[row >= 0].tolist()) for row in exact_QK]
    hits = sum(len(row & set(found.tolist())) for row, found in zip(wanted, found_QK, strict=True))
    return hits / max(1, sum(len(row) for row in wanted))
