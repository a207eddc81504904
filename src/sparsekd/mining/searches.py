"""What miners find, kept in the cache by block of queries: found there, or searched by whichever process is free.

A block is one miner's answer to some of the queries: an artifact ``searches/KEY`` with ``positions.npy``, ``scores.npy`` and, where
a filter asks, ``positives.npy``. It is keyed by what decides it, so another quota, skip or filter searches nothing again, and a
killed run goes on at the block it was at. One index at a time is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekd.artifact import Artifact, IntegrityError, find, key_of, publish, verify
from sparsekd.bank.sharing import Items, Part, Positions, SharedShards
from sparsekd.mining.candidates import miner_names
from sparsekd.mining.question import Answer, Question, Ranking, Search
from sparsekd.mining.rankings import is_divisible, search_of
from sparsekd.recipe import DenseMiner, Miner, SparseMiner

KIND = "searches"
SEARCHES_VERSION = 1
"""Raised when the same fields would give another answer."""
_BLOCKS, _FEWEST, _MOST = 16, 64, 16_384
"""Blocks that a miner's queries are divided into; the queries of one at least, for what it costs to publish, and at most.

Where an index is made of ``[run] shard_passages`` at a time, each block makes it anew, which costs as much as searching some 700
queries (50,000 passages of width 384, 2 cores), so blocks are as large as they may be.
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Block:
    """Queries, by row, that one miner answers in one go."""

    number: int
    """The miner's, in the order asked."""
    miner: Miner
    name: str
    rows: range
    fields: dict[str, Any]


class Searches:
    """All blocks of a recipe's miners over one collection."""

    def __init__(self, question: Question, *, cache: Path, fields: Mapping[str, Any]) -> None:
        """``fields`` are those of the candidates (``candidates_fields``)."""
        self._question = question
        self._cache = cache
        self._blocks = list(_blocks(question, fields))
        self._opened: tuple[int, Search] | None = None

    def share(self, extra: Mapping[str, Any], check_inputs: Callable[[], None] = lambda: None) -> None:
        """Search what nobody has searched, together with other processes of the same run; return when all blocks are published.

        ``extra`` is recorded in manifests; ``check_inputs`` is called before each is written, and may refuse. Raises what miners
        refuse, and QuarantineError for a block that ends its processes.
        """
        keys = np.array([[int(key_of(block.fields), 16)] for block in self._blocks], dtype=np.uint64)
        order = np.arange(len(keys))
        items = Items(keys, order, ~self._known(order), self._known, self._describe)
        part = Part(*self._question.recipe.run.part)
        with SharedShards(self._cache / "bank" / KIND / "queries", items, size=1, part=part) as shards:
            for free in shards.passes():
                for found in free:
                    for position in found.tolist():
                        self._search(self._blocks[position], extra, check_inputs)
                    shards.committed()
            self._opened = None
            shards.refuse_quarantined("mining", order)

    def rankings(self) -> list[Ranking]:
        """Return each miner's answer to all queries, verified; IntegrityError names what is damaged."""
        answers: dict[int, list[Answer]] = {}
        for block in self._blocks:
            answers.setdefault(block.number, []).append(_opened(self._found(block), block))
        names = {block.number: block for block in self._blocks}
        return [_joined(names[number], parts, self._question) for number, parts in answers.items()]

    def _known(self, positions: Positions) -> npt.NDArray[np.bool_]:
        return np.array([self._found(self._blocks[position]) is not None for position in positions.tolist()], dtype=np.bool_)

    def _found(self, block: _Block) -> Artifact | None:
        return find(self._folder(block), block.fields)

    def _folder(self, block: _Block) -> Path:
        return self._cache / KIND / key_of(block.fields)

    def _describe(self, position: int) -> str:
        block = self._blocks[position]
        return f"queries {block.rows.start + 1:,} to {block.rows.stop:,} of miner {block.name}"

    def _search(self, block: _Block, extra: Mapping[str, Any], check_inputs: Callable[[], None]) -> None:
        if self._opened is None or self._opened[0] != block.number:
            self._opened = None  # before the next index is built
            self._opened = block.number, search_of(block.miner, self._question)
        answer = self._opened[1](block.rows)
        with publish(self._folder(block), kind=KIND, fields=block.fields, extra={**extra, "facts": answer.facts}) as folder:
            np.save(folder / "positions.npy", answer.positions_QK)
            np.save(folder / "scores.npy", answer.scores_QK)
            if answer.positive_scores is not None:
                np.save(folder / "positives.npy", answer.positive_scores)
            check_inputs()


def _blocks(question: Question, fields: Mapping[str, Any]) -> Iterator[_Block]:
    asked = question.recipe.mining.asked
    miner_fields = [*fields["miners"], *([fields["fallback"]] if "fallback" in fields else [])]
    shared = {name: fields[name] for name in ("files", "max_passages", "max_train_queries", "max_positives")}
    for number, (miner, name) in enumerate(zip(asked, miner_names(asked), strict=True)):
        decides = {field: value for field, value in miner_fields[number].items() if field not in ("quota", "skip")}
        for rows in _divided(len(question.judged), _fewest(miner, question)):
            block_fields = {
                "stage": KIND,
                "version": SEARCHES_VERSION,
                **shared,
                "miner": decides,
                "scores_positives": question.filters_by_miner,
                "queries": [rows.start, rows.stop],
            }
            yield _Block(number, miner, name, rows, block_fields)


def _fewest(miner: Miner, question: Question) -> int:
    """Return how many queries a block has at least."""
    if not is_divisible(miner):
        return len(question.judged)
    is_streamed = len(question.collection.passages) > question.recipe.run.shard_passages
    return _MOST if is_streamed and isinstance(miner, DenseMiner | SparseMiner) else _FEWEST


def _divided(num_queries: int, fewest: int) -> Sequence[range]:
    """Rows of each block: the same for every process, whatever their number."""
    size = max(fewest, min(_MOST, -(-num_queries // _BLOCKS)))
    return [range(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


def _opened(artifact: Artifact | None, block: _Block) -> Answer:
    if artifact is None:
        raise IntegrityError(f"{KIND} {key_of(block.fields)}: gone since it was searched; run the same command again")
    verify(artifact)
    arrays = {name: np.load(artifact.folder / name, mmap_mode="r", allow_pickle=False) for name in artifact.manifest["files"]}
    return Answer(arrays["positions.npy"], arrays["scores.npy"], arrays.get("positives.npy"), artifact.manifest["facts"])


def _joined(block: _Block, answers: Sequence[Answer], question: Question) -> Ranking:
    positives = [answer.positive_scores for answer in answers if answer.positive_scores is not None]
    facts = answers[0].facts
    told = "".join(f", {key} {value}" for key, value in facts.items())
    num_queries, num_passages = len(question.judged), len(question.collection.passages)
    _log.info("miner %s: %d queries over %d passages, depth %d%s", block.name, num_queries, num_passages, block.miner.depth, told)
    return Ranking(
        block.miner,
        block.name,
        np.concatenate([answer.positions_QK for answer in answers]),
        np.concatenate([answer.scores_QK for answer in answers]),
        question.ceilings(np.concatenate(positives) if positives else None),
        facts,
    )
