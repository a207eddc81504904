"""Runs the miners over the training queries and publishes what policy keeps.

One miner at a time: its index is built, all queries searched, and the index freed, so memory holds one index and 8 bytes per
query and rank of each miner. Vectors come from the caller, who owns encoders and their bank; no torch here.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsekd.artifact import publish
from sparsekd.collection.beir import Collection
from sparsekd.mining.bm25 import BM25Index
from sparsekd.mining.candidates import KIND, SCHEMA, SHORTFALL_FILE, Candidates, candidates_folder, miner_names
from sparsekd.mining.dense import DenseIndex, Similarity
from sparsekd.mining.ranking import NONE, Positions, Scores
from sparsekd.mining.selection import (
    REASONS,
    Candidate,
    Proposal,
    ceiling_of,
    percentile_limit,
    reads_scores,
    select_candidates,
)
from sparsekd.mining.shards import ROWS_PER_SHARD, write_shards
from sparsekd.recipe import BM25Miner, DenseMiner, Recipe

COUNTS = (
    "queries",
    "queries_without_positive",
    "queries_short",  # with fewer candidates than the quotas ask for
    "queries_empty",  # with none
    "positives",
    "positives_over_cap",
    "proposed",
    "kept",
    "shortfall",  # candidates the quotas ask for and nobody had
    *REASONS,
)
"""What the manifest counts; proposed = kept + every ``dropped_``."""

log = logging.getLogger(__name__)


class VectorSource(Protocol):
    """Where dense miners get their vectors."""

    def similarity(self, spec: DenseMiner) -> Similarity:
        """Return the similarity the encoder was trained for."""
        ...

    def vectors(self, spec: DenseMiner, texts: Sequence[str], role: Literal["query", "passage"]) -> NDArray[np.float32]:
        """Return float32 [n, D] in the order of ``texts``."""
        ...


@dataclass(frozen=True)
class JudgedQuery:
    """A training query: the positives that are scored, and all that are judged."""

    query_id: str
    positive_ids: list[str]
    judged_ids: list[str]


@dataclass(frozen=True)
class _Ranking:
    """One miner's answer to all queries."""

    miner: BM25Miner | DenseMiner
    name: str
    positions_QK: Positions
    scores_QK: Scores
    ceilings_Q: NDArray[np.float64]


@dataclass(frozen=True)
class _Shortfall:
    """Queries with fewer candidates than the quotas ask for; filled as rows are made."""

    wanted: int
    kept_by_query: dict[str, int]

    def write(self, path: Path) -> None:
        """Write query_id, candidates, wanted: tab-separated, in the order of the rows."""
        lines = [f"{query_id}\t{kept}\t{self.wanted}\n" for query_id, kept in self.kept_by_query.items()]
        path.write_text("query_id\tcandidates\twanted\n" + "".join(lines), encoding="utf-8", newline="\n")


def mine_candidates(
    recipe: Recipe,
    collection: Collection,
    *,
    cache: Path,
    fields: Mapping[str, Any],
    source: VectorSource,
    extra: Mapping[str, Any] | None = None,
) -> Candidates:
    """Mine candidates for every training query and publish them under the key of ``fields`` (``candidates_fields``).

    ``extra`` (command, versions) is recorded in the manifest. Raises ValueError if there are no training judgements, a
    judgement names an unknown query or passage, or nothing at all is kept.
    """
    judged, counts = judged_queries(recipe, collection)
    rankings = [
        _ranking(miner, name, judged, collection, recipe, source)
        for miner, name in zip(recipe.mining.miners, miner_names(recipe.mining.miners), strict=True)
    ]
    folder = candidates_folder(cache, fields)
    published: dict[str, Any] = dict(extra or {})
    with publish(folder, kind=KIND, fields=fields, extra=published) as temporary:
        short = _Shortfall(wanted=sum(ranking.miner.quota for ranking in rankings), kept_by_query={})
        tables = _tables(judged, rankings, collection, recipe.mining.filter.near_duplicate, counts, short)
        published["shards"] = write_shards(temporary, "candidates", tables, -(-len(judged) // ROWS_PER_SHARD))
        short.write(temporary / SHORTFALL_FILE)
        published["counts"] = dict(sorted(counts.items()))
        if counts["kept"] == 0:
            raise ValueError(
                f"[mining] no candidate kept for any of {len(judged)} queries ({_by_reason(counts)}); "
                "raise depth, lower skip or loosen [mining.filter]"
            )
    log.info("candidates %s: %s", folder.name, published["counts"])
    return Candidates.open(folder)


def judged_queries(recipe: Recipe, collection: Collection) -> tuple[list[JudgedQuery], Counter[str]]:
    """Return the training queries that have a positive (grade >= 1), in qrels order, and counts.

    Positives beyond ``max_positives`` (highest grade first, then smallest sha256(passage_id)) are counted; they are not
    scored, and never become candidates.
    """
    qrels = collection.qrels.get("train")
    if not qrels:
        raise ValueError(
            f"[collection] path = {recipe.collection.path!r}: no training judgements; expected qrels/train.tsv with grades >= 1"
        )
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    judged = []
    for query_id, grades in qrels.items():
        positives = sorted((passage_id for passage_id, grade in grades.items() if grade >= 1), key=_grade_then_hash(grades))
        unknown = [passage_id for passage_id in positives if passage_id not in collection.passages]
        if unknown or query_id not in collection.queries:
            what = f"passage {unknown[0]!r}" if unknown else f"query {query_id!r}"
            raise ValueError(f"qrels/train.tsv: query {query_id!r}: {what} is not in the collection; correct the qrels")
        if not positives:
            counts["queries_without_positive"] += 1
            continue
        scored = positives[: recipe.mining.max_positives]
        counts["positives"] += len(scored)
        counts["positives_over_cap"] += len(positives) - len(scored)
        judged.append(JudgedQuery(query_id, scored, positives))
    if not judged:
        raise ValueError(f"qrels/train.tsv: none of {len(qrels)} queries has a passage of grade >= 1; nothing to train on")
    counts["queries"] = len(judged)
    return judged, counts


def _grade_then_hash(grades: Mapping[str, int]) -> Any:
    return lambda passage_id: (-grades[passage_id], hashlib.sha256(passage_id.encode("utf-8")).digest())


def _ranking(
    miner: BM25Miner | DenseMiner,
    name: str,
    judged: Sequence[JudgedQuery],
    collection: Collection,
    recipe: Recipe,
    source: VectorSource,
) -> _Ranking:
    """Search all queries with one miner, and score their positives where its filter needs them."""
    queries = [collection.queries[query.query_id] for query in judged]
    if isinstance(miner, BM25Miner):
        bm25 = BM25Index(collection.passages, miner.k1, miner.b)
        block = bm25.search_positions(queries, miner.depth)
        ceilings = _ceilings(recipe, judged, collection, lambda row, places: bm25.pair_scores(queries[row], places))
    else:
        passages = source.vectors(miner, list(collection.passages.values()), "passage")
        similarity, device = source.similarity(miner), recipe.run.device
        dense = DenseIndex(passages, list(collection.passages), similarity=similarity, device=device)
        vectors = source.vectors(miner, queries, "query")
        block = dense.search_positions(vectors, miner.depth)
        ceilings = _ceilings(recipe, judged, collection, lambda row, places: dense.pair_scores(vectors[row], places))
    log.info("miner %s: %d queries over %d passages, depth %d", name, len(queries), len(collection.passages), miner.depth)
    return _Ranking(miner, name, *block, ceilings)


def _ceilings(
    recipe: Recipe,
    judged: Sequence[JudgedQuery],
    collection: Collection,
    pair_scores: Callable[[int, Positions], Scores],
) -> NDArray[np.float64]:
    """float64 [Q]: the score above which this miner's proposals are likely false negatives; infinity without such a filter."""
    negative_filter = recipe.mining.filter
    if negative_filter.by != "miner" or not reads_scores(negative_filter):
        return np.full(len(judged), np.inf)
    position_by_id = {passage_id: position for position, passage_id in enumerate(collection.passages)}
    scores_by_row = []
    for row, query in enumerate(judged):
        positions = np.array([position_by_id[passage_id] for passage_id in query.positive_ids], dtype=np.int32)
        scores_by_row.append(pair_scores(row, positions))
    limit = percentile_limit(np.concatenate(scores_by_row), negative_filter)
    return np.array([ceiling_of(float(scores.min()), negative_filter, limit) for scores in scores_by_row])


def _tables(
    judged: Sequence[JudgedQuery],
    rankings: Sequence[_Ranking],
    collection: Collection,
    near_duplicate: float | None,
    counts: Counter[str],
    short: _Shortfall,
) -> Iterator[pa.Table]:
    """Yield one table per shard, adding to ``counts`` and ``short`` as rows are made."""
    passage_ids = list(collection.passages)
    for start in range(0, len(judged), ROWS_PER_SHARD):
        rows = []
        for number, query in enumerate(judged[start : start + ROWS_PER_SHARD], start):
            proposals = [_proposal(ranking, number, passage_ids) for ranking in rankings]
            kept, reasons = select_candidates(
                proposals, query.judged_ids, collection.passages, near_duplicate=near_duplicate
            )
            counts.update(reasons)
            counts["shortfall"] += short.wanted - len(kept)
            counts["queries_short"] += len(kept) < short.wanted
            counts["queries_empty"] += not kept
            if len(kept) < short.wanted:
                short.kept_by_query[query.query_id] = len(kept)
            rows.append(_row(query, kept))
        yield pa.Table.from_pylist(rows, schema=SCHEMA)


def _proposal(ranking: _Ranking, number: int, passage_ids: Sequence[str]) -> Proposal:
    positions = ranking.positions_QK[number]
    found = positions != NONE
    return Proposal(
        miner=ranking.name,
        quota=ranking.miner.quota,
        skip=ranking.miner.skip,
        passage_ids=[passage_ids[position] for position in positions[found].tolist()],
        scores=ranking.scores_QK[number][found].tolist(),
        ceiling=float(ranking.ceilings_Q[number]),
    )


def _row(query: JudgedQuery, kept: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "query_id": query.query_id,
        "positive_ids": query.positive_ids,
        "passage_ids": [candidate.passage_id for candidate in kept],
        "miner": [candidate.miner for candidate in kept],
        "miner_score": [candidate.score for candidate in kept],
        "rank": [candidate.rank for candidate in kept],
    }


def _by_reason(counts: Counter[str]) -> str:
    return ", ".join(f"{reason.removeprefix('dropped_')} {counts[reason]}" for reason in REASONS)
