"""Searches kept by block of queries: blocks are the whole, nothing is searched twice, whoever searched it, and damage is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.artifact import IntegrityError
from sparsekd.collection.beir import Collection
from sparsekd.mining import searches as room
from sparsekd.mining.miners import judged_queries
from sparsekd.mining.question import Question
from sparsekd.mining.searches import Searches

NUM_PASSAGES, NUM_QUERIES = 300, 200  # four blocks of queries
WORDS = "cat dog garden mat market monday city week stock chase day fell".split()
MINERS = [
    {"kind": "bm25", "quota": 3, "depth": 9},
    {"kind": "dense", "quota": 3, "depth": 9, "model": "some/encoder"},
    {"kind": "sparse", "quota": 3, "depth": 9, "model": "some/student"},
    {"kind": "random", "quota": 3, "depth": 9},
]


@pytest.fixture
def collection() -> Collection:
    generator = np.random.default_rng(0)
    passages = {f"p{number}": " ".join(generator.choice(WORDS, 7)) for number in range(NUM_PASSAGES)}
    queries = {f"q{number}": " ".join(generator.choice(WORDS, 3)) for number in range(NUM_QUERIES)}
    return Collection(passages, queries, {"train": {f"q{number}": {f"p{number}": 1} for number in range(NUM_QUERIES)}}, {})


@pytest.fixture
def ask(tmp_path: Path, collection: Collection, make_recipe: Any, word_vectors: Any, fields_of: Any) -> Callable[..., Any]:
    """Return ``ask(miners, name, shard, **mining)``: searches over the cache of that name, and the texts asked of the encoder."""

    def make(miners: Sequence[Any] = MINERS, name: str = "cache", shard: str | None = None, **mining: Any) -> Any:
        recipe = make_recipe({"miners": miners, **mining}, run={} if shard is None else {"shard": shard})
        source = word_vectors()
        question = Question(recipe, collection, judged_queries(recipe, collection)[0], source)
        return Searches(question, cache=tmp_path / name, fields=fields_of(recipe, collection)), source

    return make


def found(searches: Searches) -> list[tuple[NDArray[Any], ...]]:
    return [(each.positions_QK, each.scores_QK, each.ceilings_Q) for each in searches.rankings()]


def searched(searches: Searches) -> list[tuple[NDArray[Any], ...]]:
    searches.share({})
    return found(searches)


def same(ours: Any, theirs: Any) -> bool:
    pairs = [arrays for left, right in zip(ours, theirs, strict=True) for arrays in zip(left, right, strict=True)]
    return all(np.array_equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("negative_filter", [{}, {"absolute_margin": 0.1}, {"percentile": 0.9}])
def test_blocks_of_queries_are_the_whole_to_the_bit(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, negative_filter: dict[str, float]
) -> None:
    in_blocks = searched(ask(filter=negative_filter)[0])
    assert len([*(tmp_path / "cache" / "searches").iterdir()]) == 4 * len(MINERS)
    monkeypatch.setattr(room, "_FEWEST", NUM_QUERIES)
    whole = searched(ask(name="whole", filter=negative_filter)[0])

    assert len([*(tmp_path / "whole" / "searches").iterdir()]) == len(MINERS)
    assert same(in_blocks, whole)
    assert all(np.isinf(in_blocks[3][2])), "a miner by chance has no score of a positive"
    assert bool(negative_filter) == all(np.isfinite(ceilings).all() for _, _, ceilings in in_blocks[:3])


def test_another_quota_skip_or_fallback_searches_nothing_again(ask: Any, tmp_path: Path) -> None:
    before = searched(ask()[0])
    changed = [{**miner, "quota": 1, "skip": 2} for miner in MINERS[:3]]

    searches, source = ask(changed, fallback=MINERS[3], filter={"near_duplicate": 0.9})
    after = searched(searches)

    assert source.asked == []
    assert same(before, after)


@pytest.mark.parametrize("change", [{"depth": 8}, {"k1": 0.5}])
def test_what_changes_an_answer_searches_that_miner_and_no_other(ask: Any, tmp_path: Path, change: dict[str, float]) -> None:
    searched(ask()[0])
    searches, source = ask([{**MINERS[0], **change}, *MINERS[1:]])
    searches.share({})

    assert source.asked == []  # of the two that have vectors
    assert len([*(tmp_path / "cache" / "searches").iterdir()]) == 4 * (len(MINERS) + 1)


def test_processes_that_share_the_work_find_the_whole(ask: Any) -> None:
    alone = searched(ask(name="alone")[0])
    shared = [ask(shard=f"{index}/3")[0] for index in range(3)]
    blocks = [searches._blocks for searches in shared]
    for number, searches in enumerate(shared):  # each takes only a third, then the last takes what is left
        searches._blocks = blocks[number][number::4]
        searches.share({})
        searches._blocks = blocks[number]

    assert same(searched(shared[2]), alone)


def test_a_run_that_was_stopped_goes_on_at_its_block(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = searched(ask(name="whole")[0])
    real, done = room.search_of, list[range]()

    def dying(miner: Any, question: Any) -> Any:
        search = real(miner, question)

        def one(rows: range) -> Any:
            if len(done) == 6:
                raise KeyboardInterrupt
            done.append(rows)
            return search(rows)

        return one

    monkeypatch.setattr(room, "search_of", dying)
    with pytest.raises(KeyboardInterrupt):
        ask()[0].share({})
    done.append(range(0))  # and go on
    rest = searched(ask()[0])

    assert len(done) == 1 + 4 * len(MINERS), "no block twice"
    assert same(rest, whole)


def test_a_damaged_block_is_named(ask: Any, tmp_path: Path) -> None:
    searched(ask()[0])
    path = min((tmp_path / "cache" / "searches").glob("*/scores.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(IntegrityError, match=f"{path}: checksum .* rerun"):
        searched(ask()[0])
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{path}: missing, .* rerun"):
        searched(ask()[0])
