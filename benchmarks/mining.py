"""Mining dense hard negatives: sentence-transformers' mine_hard_negatives(use_faiss=True) against mine_candidates.

Both get the same vectors from one file (clusters, unit length, so that the library's forced cosine is the model's own), find each
query's best passages exactly, leave out the positive and what scores above it, and keep the same number of negatives. The library
ends with a Dataset of texts in memory, ours with a published artifact. Times are taken turn by turn in one process, so that a busy
machine slows both; ratios are taken round by round, above 1 where ours is better. Peak memory growth is taken in a fresh process
per path, after imports and texts. Nothing is encoded and nothing is downloaded.

    python benchmarks/mining.py
    python benchmarks/mining.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import training_step
from numpy.typing import NDArray

PATHS = ("library", "ours")
WIDTH, DEPTH, NUM_NEGATIVES = 384, 100, 8
CLUSTERS, WORDS = 500, 60


def main() -> None:
    """Compare the paths; print a table and, last, one JSON line."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        place = options.vectors or make_vectors(options, Path(folder))
        data = Data(place, options.passages, options.queries)
        if options.measure:
            mine = path_of(options.measure, data)
            with training_step.ResidentMemory() as memory:
                mine()
            print(json.dumps({"memory_mb": (memory.peak - memory.before) / training_step.MEGABYTE}))
            return
        print(f"{options.passages} passages, {options.queries} queries, width {WIDTH}, depth {DEPTH}")
        paths = {name: path_of(name, data) for name in PATHS}
        for mine in paths.values():
            mine()  # imports and caches
        rounds = [{name: timed(mine) for name, mine in paths.items()} for _ in range(options.pairs)]
        memory_mb = {name: measured_alone(name, place) for name in PATHS}
    for name in PATHS:
        print(f"{name:>8} {statistics.median(each[name] for each in rounds):7.2f} s {memory_mb[name]:7.0f} MB")
    ratios = [each["library"] / each["ours"] for each in rounds]
    print(f"ours against the library: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")
    figures = {
        "bench": "mining",
        "passages": options.passages,
        "queries": options.queries,
        "ratio_time": statistics.median(ratios),
        "ratio_time_min": min(ratios),
        "ratio_time_max": max(ratios),
        "ratio_memory": memory_mb["library"] / memory_mb["ours"],
        "memory_mb": memory_mb,
        "seconds": {name: statistics.median(each[name] for each in rounds) for name in PATHS},
    }
    print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 passages, 1,000 queries, 3 pairs")
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--pairs", type=int, default=5, help="times each path is measured, in turn")
    parser.add_argument("--measure", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--vectors", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.queries, options.pairs = 1_000, 3
    if not 1 <= options.queries <= options.passages or options.pairs < 1:
        parser.error("expected at least 1 query, as many passages, and 1 pair")
    return options


def make_vectors(options: argparse.Namespace, folder: Path) -> Path:
    """Write passages' and queries' unit vectors, float32; query i lies near passage i. Return the folder."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    passages = centres[random.integers(0, CLUSTERS, options.passages)]
    passages += random.normal(size=passages.shape).astype(np.float32)
    queries = passages[: options.queries] + random.normal(size=(options.queries, WIDTH)).astype(np.float32)
    for name, vectors in (("passage", passages), ("query", queries)):
        np.save(folder / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return folder


class Data:
    """Texts, each beginning with its number, and the vectors that stand for an encoder's answer to them."""

    def __init__(self, folder: Path, num_passages: int, num_queries: int) -> None:
        self.folder = folder
        words = [f"word{number}" for number in range(5000)]
        drawn = np.random.default_rng(1).integers(0, len(words), (num_passages, WORDS)).tolist()
        self.passages = [f"{number} {' '.join(words[word] for word in row)}" for number, row in enumerate(drawn)]
        self.queries = [f"{number} which passage is it?" for number in range(num_queries)]

    def vectors(self, texts: Sequence[str], role: str) -> NDArray[np.float32]:
        """Return float32 [n, D] in the order of ``texts``, a copy, as an encoder gives."""
        rows = np.fromiter((int(text.partition(" ")[0]) for text in texts), dtype=np.int64, count=len(texts))
        mapped = np.load(self.folder / f"{role}.npy", mmap_mode="r")
        if len(rows) and len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all():  # read: mapped pages count as memory
            start = mapped.offset + int(rows[0]) * WIDTH * 4
            return np.fromfile(self.folder / f"{role}.npy", np.float32, len(rows) * WIDTH, offset=start).reshape(-1, WIDTH)
        return np.asarray(mapped[rows])


def path_of(name: str, data: Data) -> Callable[[], None]:
    """Return what mines by one of the paths, its imports done."""
    return {"library": library, "ours": ours}[name](data)


def library(data: Data) -> Callable[[], None]:
    """Return what mines by sentence-transformers, over a model that answers from the file."""
    import faiss  # noqa: F401
    import torch
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives, pairwise_cos_sim

    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        prompts={},
        encode_document=lambda texts, **_: data.vectors(texts, "passage"),
        encode_query=lambda texts, **_: data.vectors(texts, "query"),
        get_embedding_dimension=lambda: WIDTH,
        similarity_pairwise=pairwise_cos_sim,
    )
    pairs = Dataset.from_dict({"query": data.queries, "positive": data.passages[: len(data.queries)]})

    def mine() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            found = mine_hard_negatives(
                pairs,
                model,
                corpus=data.passages,
                range_max=DEPTH,
                absolute_margin=0.0,
                num_negatives=NUM_NEGATIVES,
                output_format="n-tuple",
                output_scores=True,
                use_faiss=True,
                verbose=False,
            )
        if not len(found):
            raise RuntimeError("the library found no negatives; the vectors are wrong")

    return mine


def ours(data: Data) -> Callable[[], None]:
    """Return what mines by ``mine_candidates`` and publishes."""
    import faiss  # noqa: F401
    import pandas as pd  # noqa: F401 # 51 MB that pyarrow imports with the first table; for the library, datasets has

    from sparsekd.collection.beir import Collection
    from sparsekd.mining.candidates import COLLECTION_FILES, candidates_fields
    from sparsekd.mining.miners import mine_candidates
    from sparsekd.recipe import Recipe

    class Source:
        def similarity(self, spec: Any) -> Any:
            return "cosine"

        def vectors(self, spec: Any, texts: Sequence[str], role: str) -> NDArray[np.float32]:
            return data.vectors(texts, role)

        def sparse_vectors(self, spec: Any, texts: Sequence[str], role: str) -> Any:
            raise NotImplementedError

    miner = {"kind": "dense", "model": "vectors", "quota": NUM_NEGATIVES, "depth": DEPTH}
    recipe = Recipe.model_validate(
        {
            "collection": {"path": "synthetic"},
            "mining": {"miners": [miner], "filter": {"absolute_margin": 0.0}},
            "teachers": [{"name": "none", "kind": "cross-encoder", "model": "none"}],
            "student": {"model": "none"},
        }
    )
    collection = Collection(
        {f"p{number}": text for number, text in enumerate(data.passages)},
        {f"q{number}": text for number, text in enumerate(data.queries)},
        {"train": {f"q{number}": {f"p{number}": 1} for number in range(len(data.queries))}},
        {},
    )

    fields = candidates_fields(recipe, dict.fromkeys(COLLECTION_FILES, "synthetic"), [{"vectors": "synthetic"}])

    def mine() -> None:
        with tempfile.TemporaryDirectory() as cache:
            mine_candidates(recipe, collection, cache=Path(cache), fields=fields, source=Source())

    return mine


def timed(mine: Callable[[], None]) -> float:
    """Return the seconds of one run."""
    started = time.perf_counter()
    mine()
    return time.perf_counter() - started


def measured_alone(path: str, vectors: Path) -> float:
    """Return the peak memory growth of one path in a fresh process, MB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", path, "--vectors", str(vectors)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["memory_mb"])


if __name__ == "__main__":
    main()
