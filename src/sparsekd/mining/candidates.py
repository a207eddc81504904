"""The candidates artifact: its key, its columns, and the reader that verifies it.

One row per training query with a positive, queries in qrels order; a query for which nothing was kept has empty lists, so
that it is counted where labels are made. Importing this costs no search library and no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsekd.artifact import Artifact, IntegrityError, key_of
from sparsekd.mining.approximate import INDEX_VERSION
from sparsekd.mining.selection import filter_fields
from sparsekd.mining.shards import open_shards, read_shard
from sparsekd.recipe import DenseMiner, EncoderSpec, Miner, NegativeFilter, Recipe, RunMiner

SHORTFALL_FILE = "shortfall.tsv"
"""Lists the queries with fewer candidates than the quotas ask for, beside the shards: query_id, how many, how many are asked."""
CANDIDATES_VERSION = 1
"""Raised when the same fields would give other candidates."""
KIND = "candidates"
COLLECTION_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")
"""The collection's files that can change candidates."""
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("positive_ids", pa.list_(pa.string())),
        ("passage_ids", pa.list_(pa.string())),
        ("miner", pa.list_(pa.string())),
        ("miner_score", pa.list_(pa.float32())),
        ("rank", pa.list_(pa.int32())),
    ],
    metadata={"sparsekd.version": str(CANDIDATES_VERSION)},
)


@dataclass(frozen=True)
class CandidateRow:
    """One query: its positives and, aligned, each candidate with its miner, that miner's score and rank (1 = best)."""

    query_id: str
    positive_ids: list[str]
    passage_ids: list[str]
    miner: list[str]
    miner_score: list[float]
    rank: list[int]


class Candidates:
    """A verified candidates artifact."""

    def __init__(self, artifact: Artifact, shards: Sequence[Path]) -> None:
        self.artifact = artifact
        self._shards = list(shards)

    @classmethod
    def open(cls, folder: Path) -> Candidates:
        """Verify and open a published folder; IntegrityError names what is damaged or foreign."""
        artifact, shards = open_shards(folder, KIND)
        for path in shards:
            found = read_shard(path, artifact).schema
            if not found.equals(SCHEMA, check_metadata=True):
                raise IntegrityError(f"{path}: columns are {found.names}, expected {SCHEMA.names}; remove {folder} and rerun")
        return cls(artifact, shards)

    @property
    def key(self) -> str:
        """The key the candidates were mined under."""
        return self.artifact.key

    @property
    def counts(self) -> dict[str, int]:
        """Queries, proposals kept and dropped by reason, and shortfalls."""
        return dict(self.artifact.manifest["counts"])

    def kept_by_miner(self) -> dict[str, int]:
        """Return candidates by the miner that brought them, in the order of first appearance."""
        kept: Counter[str] = Counter()
        for path in self._shards:
            kept.update(pa.chunked_array(read_shard(path, self.artifact).column("miner")).combine_chunks().flatten().to_pylist())
        return dict(kept)

    def __len__(self) -> int:
        return sum(self.artifact.manifest["shards"].values())

    def __iter__(self) -> Iterator[CandidateRow]:
        for path in self._shards:
            for batch in read_shard(path, self.artifact).to_batches(max_chunksize=1024):
                yield from (CandidateRow(**row) for row in batch.to_pylist())


def candidates_folder(cache: Path, fields: Mapping[str, Any]) -> Path:
    """Return where the candidates made from ``fields`` are, or will be."""
    return cache / KIND / key_of(fields)


def candidates_fields(
    recipe: Recipe, collection_digest: Mapping[str, str], miner_identities: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return everything that can change the candidates, for ``artifact.key_of``.

    ``collection_digest`` digests ``COLLECTION_FILES``; ``miner_identities`` are those of the miners that have one
    (``has_identity``), in the order asked, and stand for model references and paths, which may move. The filter enters where the
    miners' own scores decide, and where texts do.
    """
    missing = [name for name in COLLECTION_FILES if name not in collection_digest]
    if missing:
        raise ValueError(f"candidates key: no digest of {missing[0]}; expected those of {', '.join(COLLECTION_FILES)}")
    mining, num_asked = recipe.mining, sum(has_identity(miner) for miner in recipe.mining.asked)
    if num_asked != len(miner_identities):
        raise ValueError(f"candidates key: {len(miner_identities)} identities for {num_asked} miners that have one")
    identities = iter(miner_identities)
    asked = [_miner_fields(miner, next(identities) if has_identity(miner) else None) for miner in mining.asked]
    near_duplicate = mining.filter.near_duplicate
    return {
        "stage": KIND,
        "version": CANDIDATES_VERSION,
        "files": {name: collection_digest[name] for name in COLLECTION_FILES},
        "max_passages": recipe.collection.max_passages,
        "max_train_queries": recipe.collection.max_train_queries,
        "max_positives": mining.max_positives,
        "miners": asked[: len(mining.miners)],
        "filter": _filter_fields(mining.filter),
        **({} if near_duplicate is None else {"near_duplicate": near_duplicate}),
        **({} if mining.fallback is None else {"fallback": asked[-1]}),
    }


def has_identity(miner: Miner) -> bool:
    """Whether a miner reads a model or a file, whose bytes its settings do not tell."""
    return isinstance(miner, EncoderSpec | RunMiner)


def miner_names(miners: Iterable[Miner]) -> list[str]:
    """Return what the miner column calls each miner: its kind, numbered from the second of a kind on.

    Names depend on the order within a kind only: bm25, dense, dense-2.
    """
    names: list[str] = []
    for miner in miners:
        number = sum(name.partition("-")[0] == miner.kind for name in names) + 1
        names.append(miner.kind if number == 1 else f"{miner.kind}-{number}")
    return names


def _miner_fields(miner: Miner, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(miner, RunMiner):
        return {**miner.model_dump(exclude={"path"}), "file": dict(identity or {})}
    if identity is None:
        return miner.model_dump()
    fields = miner.model_dump(exclude={*EncoderSpec.model_fields, "index"})
    if isinstance(miner, DenseMiner) and miner.index != "flat":
        fields["index"] = {"kind": miner.index, "version": INDEX_VERSION}
    return {**fields, "encoder": dict(identity)}


def _filter_fields(negative_filter: NegativeFilter) -> dict[str, Any] | None:
    if negative_filter.by != "miner" or not negative_filter.reads_scores:
        return None
    return filter_fields(negative_filter)
