"""Runs the miners over the training queries and publishes what policy keeps.

Each miner answers all queries (``searches``); then policy goes through the queries, shard by shard.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsekd.artifact import publish
from sparsekd.collection.beir import Collection
from sparsekd.mining.candidates import KIND, SCHEMA, SHORTFALL_FILE, Candidates, candidates_folder
from sparsekd.mining.question import JudgedQuery, Question, Ranking, VectorSource
from sparsekd.mining.ranking import NONE
from sparsekd.mining.searches import Searches
from sparsekd.mining.selection import REASONS, Candidate, Proposal, select_candidates
from sparsekd.mining.shards import ROWS_PER_SHARD, write_shards
from sparsekd.recipe import DenseMiner, Miner, Mining, Recipe, SparseMiner

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
    "filled_by_fallback",  # of the kept ones
    *REASONS,
)
"""What the manifest counts; proposed = kept + every ``dropped_``."""

log = logging.getLogger(__name__)


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
    check_inputs: Callable[[], None] = lambda: None,
) -> Candidates:
    """Mine candidates for every training query and publish them under the key of ``fields`` (``candidates_fields``).

    ``extra`` (command, versions) is recorded in the manifest; ``check_inputs`` is called before publishing, and may refuse. Raises
    ValueError if there are no training judgements, a judgement names an unknown query or passage, or nothing at all is kept.
    """
    started = time.monotonic()
    judged, counts = judged_queries(recipe, collection)
    searches = Searches(Question(recipe, collection, judged, source), cache=cache, fields=fields)
    searches.share(extra or {}, check_inputs)
    rankings = searches.rankings()
    folder = candidates_folder(cache, fields)
    published: dict[str, Any] = dict(extra or {})
    with publish(folder, kind=KIND, fields=fields, extra=published) as temporary:
        published["miners"] = {ranking.name: ranking.facts for ranking in rankings if ranking.facts}
        short = _Shortfall(wanted=sum(miner.quota for miner in recipe.mining.miners), kept_by_query={})
        tables = _tables(judged, rankings, collection, recipe.mining, counts, short)
        published["shards"] = write_shards(temporary, "candidates", tables, -(-len(judged) // ROWS_PER_SHARD))
        short.write(temporary / SHORTFALL_FILE)
        published["counts"] = dict(sorted(counts.items()))
        published["wall_seconds"] = time.monotonic() - started
        if counts["kept"] == 0:
            raise ValueError(
                f"[mining] no candidate kept for any of {len(judged)} queries ({_by_reason(counts)}); "
                "raise depth, lower skip or loosen [mining.filter]"
            )
        check_inputs()
    log.info("candidates %s: %s", folder.name, published["counts"])
    return Candidates.open(folder)


def share_searches(
    recipe: Recipe,
    collection: Collection,
    *,
    cache: Path,
    fields: Mapping[str, Any],
    source: VectorSource,
    extra: Mapping[str, Any],
    check_inputs: Callable[[], None],
) -> None:
    """Do what of ``mine_candidates`` several processes can share: the miners' vectors and searches, left in the cache."""
    judged, _ = judged_queries(recipe, collection)
    question = Question(recipe, collection, judged, source)
    _bank_vectors(question)
    Searches(question, cache=cache, fields=fields).share(extra, check_inputs)


def _bank_vectors(question: Question) -> None:
    """Have all vectors that dense and sparse miners will ask for banked, the same shards as when they ask; keeps none."""
    recipe, source, passages = question.recipe, question.source, list(question.collection.passages.values())
    size = recipe.run.shard_passages
    parts = [passages[start : start + size] for start in range(0, len(passages), size)]
    for miner in recipe.mining.asked:
        if isinstance(miner, DenseMiner):
            source.vectors(miner, question.queries, "query")
            for part in parts:
                source.vectors(miner, part, "passage")
        elif isinstance(miner, SparseMiner):
            source.sparse_vectors(miner, question.queries, "query")
            for part in parts:
                source.sparse_vectors(miner, part, "passage")


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


def _tables(
    judged: Sequence[JudgedQuery],
    rankings: Sequence[Ranking],
    collection: Collection,
    mining: Mining,
    counts: Counter[str],
    short: _Shortfall,
) -> Iterator[pa.Table]:
    """Yield one table per shard, adding to ``counts`` and ``short`` as rows are made."""
    passage_ids, fallback = list(collection.passages), mining.fallback
    for start in range(0, len(judged), ROWS_PER_SHARD):
        rows = []
        for number, query in enumerate(judged[start : start + ROWS_PER_SHARD], start):
            proposals = [_proposal(ranking, number, passage_ids, fallback) for ranking in rankings]
            kept, reasons = select_candidates(
                proposals, query.judged_ids, collection.passages, near_duplicate=mining.filter.near_duplicate
            )
            counts.update(reasons)
            counts["shortfall"] += short.wanted - len(kept)
            counts["queries_short"] += len(kept) < short.wanted
            counts["queries_empty"] += not kept
            if len(kept) < short.wanted:
                short.kept_by_query[query.query_id] = len(kept)
            rows.append(_row(query, kept))
        yield pa.Table.from_pylist(rows, schema=SCHEMA)


def _proposal(ranking: Ranking, number: int, passage_ids: Sequence[str], fallback: Miner | None) -> Proposal:
    positions = ranking.positions_QK[number]
    found = positions != NONE
    return Proposal(
        miner=ranking.name,
        quota=ranking.miner.quota,
        skip=ranking.miner.skip,
        passage_ids=[passage_ids[position] for position in positions[found].tolist()],
        scores=ranking.scores_QK[number][found].tolist(),
        ceiling=float(ranking.ceilings_Q[number]),
        is_fallback=ranking.miner is fallback,
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
