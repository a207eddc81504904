"""Search with a student's index: ours, exact, against scipy's plain sparse product, exact, and Seismic, approximate.

All search the same vectors, drawn from a seed: passages of some 120 active dims of 30,522 and queries of some 30, dims by a law
like Zipf's (the most frequent is in a third of the passages; a random query and passage share 1.3 dims), weights log-normal. Half
of a query are dims of a passage, with its weights. The drawn passages lie in files and are read block by block. Each path builds,
and then opens and searches, in fresh processes, one thread each; there its peak memory growth is taken, mapped files included.
Times are CPU seconds (system time included, waiting for other programs not), taken turn by turn in one process; ratios are taken
round by round, above 1 where ours is faster. Ours must find what the product finds, ids and every bit of the scores. Seismic is
measured where it is installed; most of the time goes into building its index. Nothing is downloaded.

    python benchmarks/search.py
    python benchmarks/search.py --passages 1_000_000 --queries 200 --without-seismic
    python benchmarks/search.py --quick
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import training_step
from numpy.typing import NDArray

NUM_DIMS, PASSAGE_DIMS, QUERY_DIMS = 30_522, 120, 30
BLOCK = 1 << 14  # passages drawn, and read, at once
DEPTH = 10
FILLER = -1
SINGLE = 200  # queries asked one by one in each round
SEISMIC_CUTS = {"seismic": (1000, 0.9), "seismic_cut": (10, 0.7)}
"""(query_cut, heap_factor): every term of a query with a narrow margin, and a setting of sentence-transformers' search helper."""
PRODUCT_BYTES = 1 << 28
"""What scipy's product of one block of queries may hold."""

Found = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Positions and scores, both [Q, DEPTH], best first."""


def main() -> None:
    """Compare the paths; print a table and, last, one JSON line."""
    options = parse_arguments()
    if options.alone:
        name, part, folder = options.alone
        print(json.dumps(measure(PATHS[name](Drawn(Path(folder))), part)))
        return
    with tempfile.TemporaryDirectory(prefix="sparsekd-bench-") as folder:
        drawn = Drawn.make(Path(folder), options.passages, options.queries)
        has_seismic = find_spec("seismic") is not None and not options.without_seismic
        names = [name for name in PATHS if has_seismic or not name.startswith("seismic")]
        figures = drawn.figures() | {name: run_alone(name, "build", drawn) for name in names}
        for name in names:
            figures[name] |= run_alone(name, "search", drawn)
        compare({name: PATHS[name](drawn) for name in names}, options.pairs, figures)
    show(names, figures)
    print(json.dumps({"bench": "search", **figures}))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 passages, 100 queries, 2 pairs")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--pairs", type=int, default=3, help="times each path is measured, in turn")
    parser.add_argument("--without-seismic", action="store_true", help="ours and scipy's alone")
    parser.add_argument("--alone", nargs=3, metavar=("PATH", "PART", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.passages, options.queries, options.pairs = 2_000, 100, 2
    if options.passages < DEPTH or min(options.queries, options.pairs) < 1:
        parser.error(f"expected at least {DEPTH} passages, 1 query and 1 pair")
    return options


@dataclass(frozen=True)
class Drawn:
    """A folder of drawn vectors: blocks of passages and one of queries, CSR float32, indices sorted."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, num_passages: int, num_queries: int) -> Drawn:
        """Draw and write them; memory is one block's."""
        for start in range(0, num_passages, BLOCK):
            random = np.random.default_rng([0, start])
            _save(folder / f"passages-{start:010}", draw(random, min(BLOCK, num_passages - start), PASSAGE_DIMS))
        drawn = cls(folder)
        _save(folder / "queries", draw_queries(next(drawn.blocks()), num_queries))
        return drawn

    def blocks(self) -> Iterator[scipy.sparse.csr_matrix]:
        """Yield the passages, block after block."""
        for path in sorted(self.folder.glob("passages-*.indptr.npy")):
            yield _load(path.with_name(path.name.removesuffix(".indptr.npy")))

    def queries(self) -> scipy.sparse.csr_matrix:
        """Return all queries."""
        return _load(self.folder / "queries")

    def figures(self) -> dict[str, Any]:
        """Return sizes and what decides the cost of a search: active dims, and the dims that query and passage share on average."""
        queries, num_passages, postings_V = self.queries(), 0, np.zeros(NUM_DIMS, np.int64)
        for block in self.blocks():
            num_passages += block.shape[0]
            postings_V += np.bincount(block.indices, minlength=NUM_DIMS)
        shared = float(np.bincount(queries.indices, minlength=NUM_DIMS) @ postings_V) / queries.shape[0] / num_passages
        return {
            "passages": num_passages,
            "queries": queries.shape[0],
            "passage_active_dims": float(postings_V.sum() / num_passages),
            "query_active_dims": queries.nnz / queries.shape[0],
            "shared_dims": shared,
            "largest_share_of_passages": float(postings_V.max() / num_passages),
        }


def draw(random: np.random.Generator, rows: int, active_dims: float) -> scipy.sparse.csr_matrix:
    """Draw vectors: normal numbers of dims, with replacement, by a shifted Zipf law; repeated ones stay once. Ranks are no dims."""
    counts = np.maximum(1, random.normal(active_dims * 1.03, active_dims / 4, rows)).astype(np.int64)  # 3 in 100 are repeated
    quantiles = dim_quantiles()
    keys = np.repeat(np.arange(rows), counts) * NUM_DIMS + quantiles[random.integers(0, len(quantiles), counts.sum())]
    keys.sort()  # np.unique of NumPy 2.4 hashes, 50 times as slow here
    keys = keys[np.append(True, keys[1:] != keys[:-1])]
    weights = random.lognormal(-1.2, 0.8, len(keys)).astype(np.float32)
    starts = np.searchsorted(keys, np.arange(rows + 1) * NUM_DIMS).astype(np.int32)
    return scipy.sparse.csr_matrix((weights, (keys % NUM_DIMS).astype(np.int32), starts), shape=(rows, NUM_DIMS))


@functools.cache
def dim_quantiles() -> NDArray[np.int64]:
    """Return dims, each as often as its odds ask: drawing from these is four times as fast as searching the law itself."""
    odds = 1 / (np.arange(1, NUM_DIMS + 1) + 30) ** 0.9
    ranks = np.searchsorted(np.cumsum(odds / odds.sum()), (np.arange(1 << 20) + 0.5) / (1 << 20)).clip(max=NUM_DIMS - 1)
    return np.random.default_rng(0).permutation(NUM_DIMS)[ranks]


def draw_queries(passages: scipy.sparse.csr_matrix, num_queries: int) -> scipy.sparse.csr_matrix:
    """Draw queries of which half are dims of one passage each; where both halves have a dim, the larger weight stays."""
    random = np.random.default_rng(1)
    relevant = passages[random.integers(0, passages.shape[0], num_queries)]
    relevant.data[random.random(relevant.nnz) > QUERY_DIMS / 2 / PASSAGE_DIMS] = 0
    queries = relevant.maximum(draw(random, num_queries, QUERY_DIMS / 2)).tocsr()
    queries.eliminate_zeros()
    queries.sort_indices()
    return queries


class Ours:
    """The index that ``sparsekd search`` keeps."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, self.place = drawn, drawn.folder / "ours"

    def build(self) -> None:
        """Write blocks of postings and publish them."""
        from sparsekd.retrieval.building import joined_blocks, published

        with published(self.place, {"bench": "search", "student": {}, "collection": {}}, {}) as writer:
            for vectors in joined_blocks(self.drawn.blocks()):
                writer.add(vectors)
            num_passages = sum(writer.block_passages)
            writer.finish(passage_ids(num_passages), np.zeros(num_passages, np.int64), None, has_unit_length=False)

    def open(self) -> Callable[[scipy.sparse.csr_matrix], Found]:
        """Verify the index and return its search."""
        from sparsekd.retrieval.index import StudentIndex

        index = StudentIndex.open(self.place)
        return lambda queries: index.search(queries, DEPTH)


class Product:
    """scipy's product of queries and transposed passages, and argpartition of each query's scores."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, self.place = drawn, drawn.folder / "scipy"

    def build(self) -> None:
        """Transpose all passages and write them."""
        self.place.mkdir()
        _save(self.place / "passages", scipy.sparse.vstack(list(self.drawn.blocks()), format="csr").T.tocsr())

    def open(self) -> Callable[[scipy.sparse.csr_matrix], Found]:
        """Read the postings into memory and return the search, in blocks of as many queries as fit."""
        passages_VP = _load(self.place / "passages", (NUM_DIMS, self.drawn.figures()["passages"]))
        step = max(1, PRODUCT_BYTES // (8 * passages_VP.shape[1]))

        def search(queries: scipy.sparse.csr_matrix) -> Found:
            parts = [self.best(queries[start : start + step] @ passages_VP) for start in range(0, queries.shape[0], step)]
            return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

        return search

    @staticmethod
    def best(scores_QP: scipy.sparse.csr_matrix) -> Found:
        """Return each query's best. Only stored scores are looked at: 1.3 times as fast as a dense copy and one argpartition."""
        positions = np.full((scores_QP.shape[0], DEPTH), FILLER, np.int32)
        scores = np.zeros((scores_QP.shape[0], DEPTH), np.float32)
        for row in range(scores_QP.shape[0]):
            part = slice(scores_QP.indptr[row], scores_QP.indptr[row + 1])
            found, found_scores = scores_QP.indices[part], scores_QP.data[part]
            if len(found) > DEPTH:
                kept = np.argpartition(found_scores, len(found) - DEPTH)[-DEPTH:]
                found, found_scores = found[kept], found_scores[kept]
            order = np.argsort(-found_scores)
            positions[row, : len(order)], scores[row, : len(order)] = found[order], found_scores[order]
        return positions, scores


class Seismic:
    """pyseismic-lsr's index, exported as ``sparsekd export engine`` does."""

    query_cut, heap_factor = SEISMIC_CUTS["seismic"]

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, self.place = drawn, drawn.folder / "engine"

    def build(self) -> None:
        """Write the vectors as JSON lines and have the package build its index."""
        from sparsekd.engines.seismic import write_seismic
        from sparsekd.engines.vectors import Source, Vectors

        self.place.mkdir()
        ids = passage_ids(self.drawn.figures()["passages"])
        write_seismic(Source(Vectors(ids, Blocks(self.drawn)), NUM_DIMS, None), self.place)

    def open(self) -> Callable[[scipy.sparse.csr_matrix], Found]:
        """Load the index and return its search, one query after another; names of dims are ready beforehand."""
        import seismic

        from sparsekd.engines.seismic import INDEX

        index = seismic.SeismicIndex.load(str(self.place / INDEX))
        names = np.array([str(dim) for dim in range(NUM_DIMS)], seismic.get_seismic_string())

        def search(queries: scipy.sparse.csr_matrix) -> Found:
            positions = np.full((queries.shape[0], DEPTH), FILLER, np.int32)
            scores = np.zeros((queries.shape[0], DEPTH), np.float32)
            for row in range(queries.shape[0]):
                part = slice(queries.indptr[row], queries.indptr[row + 1])
                dims, how = names[queries.indices[part]], {"query_cut": self.query_cut, "heap_factor": self.heap_factor}
                for place, (_, score, passage) in enumerate(index.search("q", dims, queries.data[part], k=DEPTH, **how)):
                    positions[row, place], scores[row, place] = int(passage[1:]), score
            return positions, scores

        return search


class SeismicCut(Seismic):
    """The same index, asked for the heaviest terms only."""

    query_cut, heap_factor = SEISMIC_CUTS["seismic_cut"]

    def build(self) -> None:
        """Nothing: the index stands."""


PATHS: dict[str, Any] = {"ours": Ours, "scipy": Product, "seismic": Seismic, "seismic_cut": SeismicCut}


@dataclass(frozen=True)
class Blocks:
    """Passages that can be read again and again."""

    drawn: Drawn

    def __iter__(self) -> Iterator[scipy.sparse.csr_matrix]:
        """Read them from the first."""
        return self.drawn.blocks()


def passage_ids(count: int) -> list[str]:
    """Return p0, p1, …; ties go by these, as text."""
    return [f"p{number}" for number in range(count)]


def measure(path: Any, part: str) -> dict[str, Any]:
    """Build, or open and search, in this process; return seconds, peak memory growth and, of what was built, bytes."""
    queries = path.drawn.queries()
    if part == "build":
        started = time.process_time()
        with training_step.ResidentMemory() as memory:
            path.build()
        seconds = time.process_time() - started
        size = sum(file.stat().st_size for file in path.place.rglob("*") if file.is_file())
        return {"build_s": seconds, "build_memory_mb": grown_mb(memory), "index_mb": size / training_step.MEGABYTE}
    with training_step.ResidentMemory() as memory:
        path.open()(queries)
    return {"search_memory_mb": grown_mb(memory)}


def grown_mb(memory: training_step.ResidentMemory) -> float:
    """Return the peak above what the process began with."""
    return float(memory.peak - memory.before) / training_step.MEGABYTE


def run_alone(name: str, part: str, drawn: Drawn) -> dict[str, Any]:
    """Measure a part in a fresh process on one thread."""
    command = [sys.executable, __file__, "--alone", name, part, str(drawn.folder)]
    one_thread = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | one_thread)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(paths: dict[str, Any], num_rounds: int, figures: dict[str, Any]) -> None:
    """Time every path in turn, all queries at once and one by one, and hold what they find against the exact."""
    queries = next(iter(paths.values())).drawn.queries()
    searches = {name: path.open() for name, path in paths.items()}
    found = {name: search(queries) for name, search in searches.items()}  # and warms every path up
    require_equal(found["ours"], found["scipy"])
    rounds: list[dict[str, float]] = []
    latencies: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(num_rounds):
        rounds.append({name: timed(search, queries) for name, search in searches.items()})
        for name, search in searches.items():
            latencies[name] += [timed(search, queries[row]) for row in range(min(SINGLE, queries.shape[0]))]
    for name in searches:
        ratios = [each[name] / each["ours"] for each in rounds]
        p50, p95 = np.percentile(latencies[name], [50, 95]) * 1e3
        figures[name] |= {
            "queries_per_s": queries.shape[0] / statistics.median(each[name] for each in rounds),
            "latency_ms": {"p50": float(p50), "p95": float(p95)},
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "ratio_latency": float(p50 / np.percentile(latencies["ours"], 50) / 1e3),
            "overlap": overlap(found["scipy"], found[name]),
        }


def timed(search: Callable[[scipy.sparse.csr_matrix], Found], queries: scipy.sparse.csr_matrix) -> float:
    """Return the CPU seconds of one call."""
    started = time.process_time()
    search(queries)
    return time.process_time() - started


def require_equal(ours: Found, exact: Found) -> None:
    """Raise AssertionError unless scores agree to the bit, and passages wherever no other has the same score."""
    if not np.array_equal(ours[1], exact[1]):
        raise AssertionError("our search's scores are not those of scipy's product")
    tied = np.zeros(ours[1].shape, dtype=np.bool_)
    tied[:, 1:] |= ours[1][:, 1:] == ours[1][:, :-1]
    tied[:, :-1] |= tied[:, 1:]
    tied[:, -1] = True  # argpartition takes any of those that tie with the last
    if not np.array_equal(ours[0][~tied], exact[0][~tied]):
        raise AssertionError("our search's passages are not those of scipy's product")


def overlap(exact: Found, found: Found) -> float:
    """Return the mean share of the exact best that is found."""
    shares = [len(np.intersect1d(one, other)) / DEPTH for one, other in zip(exact[0], found[0], strict=True)]
    return statistics.mean(shares)


def show(names: list[str], figures: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{figures['passages']:,} passages of {figures['passage_active_dims']:.0f} active dims, {figures['queries']:,} queries of "
        f"{figures['query_active_dims']:.0f}; {figures['shared_dims']:.2f} shared, best {DEPTH}"
    )
    heads = ("queries/s", "p50 ms", "p95 ms", "ours times as fast", "overlap", "build s", "build MB", "index MB", "search MB")
    print(f"{'':<12}" + "".join(f"{head:>{max(10, len(head) + 2)}}" for head in heads))
    for name in names:
        each = figures[name]
        ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**each["ratio"])
        print(
            f"{name:<12}{each['queries_per_s']:>11.0f}{each['latency_ms']['p50']:>10.2f}{each['latency_ms']['p95']:>10.2f}"
            f"{ratio:>20}{each['overlap']:>10.4f}{each['build_s']:>10.1f}{each['build_memory_mb']:>10.0f}"
            f"{each['index_mb']:>10.0f}{each['search_memory_mb']:>11.0f}"
        )


def _save(place: Path, vectors: scipy.sparse.csr_matrix) -> None:
    for part in ("indptr", "indices", "data"):
        np.save(place.with_name(f"{place.name}.{part}.npy"), getattr(vectors, part))


def _load(place: Path, shape: tuple[int, int] | None = None) -> scipy.sparse.csr_matrix:
    starts, indices, data = (np.load(place.with_name(f"{place.name}.{part}.npy")) for part in ("indptr", "indices", "data"))
    return scipy.sparse.csr_matrix((data, indices, starts), shape=shape or (len(starts) - 1, NUM_DIMS))


if __name__ == "__main__":
    main()
