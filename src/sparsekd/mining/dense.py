"""Exact dense search: FAISS finds by brute force, float64 arithmetic decides.

A matrix product rounds differently with the number of queries in it (bit-equal scores in 18% of the cases, differences up to
2e-6, measured with faiss 1.15.1), so FAISS only proposes a window a little deeper than asked. The window is scored again pair
by pair and sorted by (score, passage_id): a query's result depends on no other query, thread count or device. Where the
window may be too short for that (many equal passages), the query is scored against all passages.
Q queries, P passages, D width, K search depth. Passage vectors are copied to a GPU, and at unit length under cosine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsekd.mining.ranking import Positions, Scores, best_first, empty_block, id_ranks, to_ids

Similarity = Literal["dot", "cosine", "euclidean", "manhattan"]

_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11", "faiss-gpu-cu12")
_QUERY_BLOCK = 1024
_PASSAGE_BLOCK = 4096  # rows copied in float64 at once: 13 MB at width 384
SLACK = 64
"""Ranks fetched beyond the depth: rounding moves a passage by a rank or two, duplicates by their number."""
_ROUNDING = 1e-5  # of |q|·|p|: five times the float32 rounding seen in products of width 1024
_UNIT = 1e-6  # vectors whose lengths are 1 but for float32's rounding are searched as they are under cosine
_BLAS_QUERIES = 20
"""Queries from which on FAISS is told to search by matrix products; by itself 1.15 waits for some 400, 13 times slower until then
(50,000 passages of width 384, depth 164, 2 cores)."""
_GPU_WINDOW = 2048  # FAISS selects at most this many per query on a GPU


def dense_search(
    query_vectors: NDArray[np.float32],
    passage_vectors: NDArray[np.float32],
    passage_ids: Sequence[str],
    *,
    similarity: Similarity,
    depth: int,
    device: str,
) -> tuple[list[list[str]], list[Scores]]:
    """Return each query's best ``depth`` passage_ids and float32 scores, ties by passage_id.

    Vectors are float32 [Q, D] and [P, D]. Scores are dot products, cosines or negative Euclidean distances.
    Raises ValueError for what ``DenseIndex`` refuses.
    """
    index = DenseIndex(passage_vectors, passage_ids, similarity=similarity, device=device)
    return to_ids(*index.search_positions(query_vectors, depth), passage_ids)


class DenseIndex:
    """Passage vectors ready to be searched; keeps a reference to ``passage_vectors``, which may be memory-mapped.

    Raises ValueError for an unsupported similarity, shapes that do not fit, non-finite vectors, a zero vector under cosine,
    a CUDA device that FAISS cannot use, and a broken FAISS installation.
    """

    def __init__(
        self, passage_vectors: NDArray[np.float32], passage_ids: Sequence[str], *, similarity: Similarity, device: str
    ) -> None:
        if similarity not in ("dot", "cosine", "euclidean"):
            raise ValueError(
                f"dense search: similarity {similarity!r} has no exact FAISS flat index here; "
                "expected dot, cosine or euclidean; choose another encoder for this miner"
            )
        if passage_vectors.ndim != 2 or len(passage_vectors) != len(passage_ids) or not len(passage_ids):
            raise ValueError(
                f"dense search: passage vectors have shape {passage_vectors.shape} for {len(passage_ids)} passage_ids; "
                "expected one row each and at least one"
            )
        self.passage_ids = passage_ids
        self._similarity = similarity
        self._vectors = passage_vectors
        self._id_rank = id_ranks(passage_ids)
        self._faiss = load_faiss()
        self._gpu_index = _gpu_index(passage_vectors.shape[1], similarity, device)
        self._lengths_P = np.empty(len(passage_ids)) if similarity == "cosine" else None
        self._longest = self._check_blocks()
        self._searched = self._searchable()

    def search_positions(
        self, query_vectors: NDArray[np.float32], depth: int, *, floors_Q: NDArray[np.float32] | None = None
    ) -> tuple[Positions, Scores]:
        """Return int32 [Q, K] positions and float32 [Q, K] scores, K = min(depth, P); no filler, every place is a passage.

        With ``floors_Q`` passages that score below a query's floor are of no interest and may be left out, -1 in their places.
        """
        if query_vectors.ndim != 2 or query_vectors.shape[1] != self._vectors.shape[1]:
            raise ValueError(
                f"dense search: query vectors have shape {query_vectors.shape}, passages have width {self._vectors.shape[1]}; "
                "both must come from the same encoder"
            )
        if self._gpu_index is not None:
            check_window(depth, depth + SLACK)
        num_passages = len(self.passage_ids)
        depth = min(depth, num_passages)
        window = min(num_passages, depth + SLACK)
        positions_QK, scores_QK = empty_block(len(query_vectors), depth)
        for start in range(0, len(query_vectors), _QUERY_BLOCK):
            block = np.ascontiguousarray(query_vectors[start : start + _QUERY_BLOCK], dtype=np.float32)
            lengths = check_vectors(block, [f"query row {start + row}" for row in range(len(block))], self._similarity)
            found, proposed = self._propose(unit_vectors(block, lengths) if self._similarity == "cosine" else block, window)
            for row, query in enumerate(block):
                floor = -np.inf if floors_Q is None else float(floors_Q[start + row])
                reaches = self._may_reach(found[row], floor, lengths[row])
                is_near = self._may_reach(found[row], self._score_of(found[row, depth - 1]), lengths[row])
                if window < num_passages and reaches[-1] and is_near[-1]:  # what lies outside may belong to the best
                    hits = np.arange(num_passages)
                else:
                    hits = proposed[row][reaches & is_near]
                best, scores = best_first(hits, self.pair_scores(query, hits), self._id_rank, depth)
                positions_QK[start + row, : len(best)], scores_QK[start + row, : len(best)] = best, scores
        return positions_QK, scores_QK

    def pair_scores(self, query_vector: NDArray[np.float32], positions: NDArray[Any]) -> Scores:
        """Return float32 [n]: the similarity of one query [D] to the passages at ``positions``, summed in float64."""
        return similarities(query_vector, self._vectors, positions, self._similarity, lengths_P=self._lengths_P)

    def _may_reach(self, found: Scores, floor: float, length: float) -> NDArray[np.bool_]:
        """Which of FAISS's scores, best first, are at or above ``floor``, rounding considered."""
        if floor == -np.inf:
            return np.ones(len(found), dtype=np.bool_)
        if self._similarity == "euclidean":
            return found <= floor**2 + self._tolerance(length)
        return found >= floor - self._tolerance(length)

    def _score_of(self, found: np.float32) -> float:
        """One of FAISS's scores in ours: it gives squared distances for euclidean."""
        return -math.sqrt(max(0.0, float(found))) if self._similarity == "euclidean" else float(found)

    def _tolerance(self, length: float) -> float:
        """How far FAISS may be off in the difference of two of its scores."""
        spread = {"cosine": 1.0, "dot": length * self._longest, "euclidean": (length + self._longest) ** 2}[self._similarity]
        return 2 * _ROUNDING * spread

    def _propose(self, block: NDArray[np.float32], window: int) -> tuple[Scores, NDArray[np.int64]]:
        """Return FAISS's scores and positions, [q, window] of each; on a CPU it searches the vectors as they lie, in no index."""
        if self._gpu_index is not None:
            found, proposed = self._gpu_index.search(block, window)
            return found, proposed
        metric = self._faiss.METRIC_L2 if self._similarity == "euclidean" else self._faiss.METRIC_INNER_PRODUCT
        found, proposed = self._faiss.knn(block, self._searched, window, metric)
        return found, proposed

    def _check_blocks(self) -> float:
        """Check all passages, and keep their lengths under cosine; return the greatest Euclidean length."""
        longest = 0.0
        for start, block in self._blocks():
            lengths = check_vectors(block, self.passage_ids[start : start + len(block)], self._similarity)
            longest = max(longest, float(lengths.max()))
            if self._lengths_P is not None:
                self._lengths_P[start : start + len(block)] = euclidean_lengths(block)
        return longest

    def _searchable(self) -> NDArray[np.float32]:
        """Return what FAISS is to search on a CPU: the vectors themselves, or at unit length under cosine; fill a GPU's index."""
        has_unit_length = self._lengths_P is None or bool((np.abs(self._lengths_P - 1) <= _UNIT).all())
        if self._gpu_index is None and has_unit_length:
            return np.ascontiguousarray(self._vectors, dtype=np.float32)
        copied = np.empty(self._vectors.shape if self._gpu_index is None else (0, 0), dtype=np.float32)
        for start, block in self._blocks():
            searched = block if self._lengths_P is None else unit_vectors(block, self._lengths_P[start : start + len(block)])
            if self._gpu_index is not None:
                self._gpu_index.add(searched)
            else:
                copied[start : start + len(block)] = searched
        return copied

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for start in range(0, len(self._vectors), _PASSAGE_BLOCK):
            yield start, np.ascontiguousarray(self._vectors[start : start + _PASSAGE_BLOCK], dtype=np.float32)


def similarities(
    query_vector: NDArray[np.float32],
    vectors: NDArray[np.float32],
    positions: NDArray[Any],
    similarity: Similarity,
    *,
    lengths_P: NDArray[np.float64] | None = None,
) -> Scores:
    """Return float32 [n]: the similarity of one query [D] to the rows of ``vectors`` [P, D] at ``positions``, summed in float64.

    A pair's result depends on that pair alone. ``lengths_P``, known Euclidean lengths, save time under cosine.
    """
    scores = np.empty(len(positions), dtype=np.float32)
    query = query_vector.astype(np.float64)
    for start in range(0, len(positions), _PASSAGE_BLOCK):
        part = slice(start, start + _PASSAGE_BLOCK)
        passages = np.asarray(vectors[positions[part]], dtype=np.float64)
        if similarity == "euclidean":
            scores[part] = -np.sqrt(((passages - query) ** 2).sum(axis=1))
            continue
        dots = (passages * query).sum(axis=1)
        if similarity == "cosine":
            lengths = euclidean_lengths(passages) if lengths_P is None else lengths_P[positions[part]]
            dots /= lengths * np.sqrt((query**2).sum())
        scores[part] = dots
    return scores


def euclidean_lengths(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return float64 [n], each row's summed on its own, in one order."""
    lengths: NDArray[np.float64] = np.sqrt((np.asarray(vectors, dtype=np.float64) ** 2).sum(axis=1))
    return lengths


def on_device(index: Any, device: str) -> tuple[Any, bool]:
    """Return a FAISS index on the device asked for, and whether that is a GPU; ValueError for a GPU that FAISS cannot use."""
    if not device.startswith("cuda"):
        return index, False
    faiss = load_faiss()
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    number = int(device.partition(":")[2] or 0)
    if num_gpus == 0 or number >= num_gpus:
        raise ValueError(
            f"[run] device = {device!r}, but FAISS sees {num_gpus} GPUs ({', '.join(installed_faiss()) or 'faiss'}); "
            "use --set run.search_device=cpu, or install faiss-gpu in place of faiss-cpu: "
            "a fresh environment with make setup EXTRAS=gpu"
        )
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index), True


def check_window(depth: int, window: int) -> None:
    """Raise ValueError if a GPU cannot select ``window`` passages per query, as ``depth`` asks for."""
    if window > _GPU_WINDOW:
        limit = depth + _GPU_WINDOW - window
        raise ValueError(
            f"dense search: depth {depth} on a GPU, where {limit} is the limit; lower it or use --set run.search_device=cpu"
        )


def _gpu_index(width: int, similarity: Similarity, device: str) -> Any:
    """An empty exact index on the GPU asked for; None for a CPU, which needs none."""
    if not device.startswith("cuda"):
        return None
    faiss = load_faiss()
    return on_device(faiss.IndexFlatL2(width) if similarity == "euclidean" else faiss.IndexFlatIP(width), device)[0]


def installed_faiss() -> list[str]:
    """Return the installed distributions that own the package ``faiss``."""
    installed = []
    for name in _DISTRIBUTIONS:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def load_faiss() -> Any:
    """Import faiss; ValueError if none is installed or two distributions overwrote each other's files."""
    check_one_faiss(installed_faiss())
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA wheels raises RuntimeError
        raise ValueError(
            f"dense search needs FAISS, but import faiss failed ({error}); install faiss-cpu or faiss-gpu"
        ) from error
    faiss.cvar.distance_compute_blas_threshold = _BLAS_QUERIES
    return faiss


def check_one_faiss(installed: Sequence[str]) -> None:
    """Raise ValueError if more than one distribution owns the folder ``faiss``: the later one damaged the earlier one."""
    if len(installed) > 1:
        raise ValueError(
            f"{' and '.join(installed)} are both installed and share the folder faiss, so one of them is damaged; "
            "uninstall all of them, then install one"
        )


def check_vectors(vectors: NDArray[np.float32], names: Sequence[str], similarity: Similarity) -> NDArray[np.float64]:
    """Return Euclidean lengths [n] of finite vectors; ValueError naming the first that is not finite, or zero under cosine."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(lengths))
    if bad.size:
        raise ValueError(
            f"dense search: {bad.size} of {len(vectors)} vectors are not finite (first: {names[bad[0]]}); "
            'try dtype = "float32" for this encoder'
        )
    zero = np.flatnonzero(lengths == 0)
    if zero.size and similarity == "cosine":
        raise ValueError(
            f"dense search: {zero.size} of {len(vectors)} vectors are zero (first: {names[zero[0]]}), which have no cosine; "
            "check the encoder and the text"
        )
    return lengths


def unit_vectors(vectors: NDArray[np.float32], lengths: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return vectors [n, D] divided by their ``lengths`` [n], float32."""
    return (vectors / lengths[:, None]).astype(np.float32)
