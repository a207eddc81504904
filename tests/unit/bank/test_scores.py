from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest

from sparsekd.bank import ScoreBank, scores, text_keys
from sparsekd.bank.scores import MAX_SEGMENT_PAIRS


def test_scores_come_back_bit_for_bit(sample: Any) -> None:
    gold_sim = np.array([0.0, -0.0, 1e-45, -3.4028235e38, 0.1], dtype=np.float32)
    query_keys, passage_keys, _ = sample.pairs(np.arange(5))

    sample.open().append(query_keys, passage_keys, gold_sim)

    assert sample.open().lookup(query_keys, passage_keys).tobytes() == gold_sim.tobytes()


def test_pair_is_a_pair_and_not_its_parts(sample: Any) -> None:
    keys = text_keys(["q1", "q2", "p1", "p2"])
    bank = sample.open()
    bank.append(keys[[0, 1]], keys[[2, 3]], np.array([1, 2], dtype=np.float32))

    found = bank.lookup(keys[[0, 1, 0, 1, 2, 3]], keys[[2, 3, 3, 2, 0, 1]])

    np.testing.assert_array_equal(found, np.array([1, 2, np.nan, np.nan, np.nan, np.nan], dtype=np.float32))


def test_looking_up_creates_nothing(sample: Any) -> None:
    found = sample.answers(sample.open(), np.arange(10))

    assert np.isnan(found).all()
    assert sample.open().num_pairs == 0
    assert not sample.root.exists()


def test_appending_nothing_stores_nothing(sample: Any) -> None:
    sample.open().append(*sample.pairs([]))

    assert not sample.root.exists()


@pytest.mark.parametrize("block", [1, 7, 1 << 19])
def test_answers_do_not_depend_on_the_order_of_the_questions(sample: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_PAIRS_PER_BLOCK", block)
    bank = sample.fill()
    grouped = np.arange(-50, 350)
    shuffled = np.random.default_rng(0).permutation(grouped)
    by_passage = np.argsort(grouped % 97)
    expected = np.where((grouped >= 0) & (grouped < 300), grouped + 0.5, np.nan).astype(np.float32)

    np.testing.assert_array_equal(sample.answers(bank, grouped), expected)
    np.testing.assert_array_equal(sample.answers(bank, shuffled), expected[shuffled + 50])
    np.testing.assert_array_equal(sample.answers(bank, grouped[by_passage]), expected[by_passage])
    np.testing.assert_array_equal(sample.answers(bank, np.repeat(shuffled, 2)), np.repeat(expected[shuffled + 50], 2))


@pytest.mark.parametrize("in_memory", [1 << 24, 32])
@pytest.mark.parametrize("seed", range(4))
def test_bank_agrees_with_a_dictionary_over_many_overlapping_appends(
    sample: Any, seed: int, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_PAIRS_PER_MERGE_STEP", 64)  # several steps per merge
    monkeypatch.setattr(scores, "_PAIRS_IN_MEMORY", in_memory)
    generator = np.random.default_rng(seed)
    bank, known = sample.open(), {}
    for _ in range(25):
        numbers = generator.choice(600, generator.integers(1, 90), replace=False)
        query_keys, passage_keys, _ = sample.pairs(numbers)
        gold_sim = generator.standard_normal(len(numbers), dtype=np.float32)
        bank.append(query_keys, passage_keys, gold_sim)
        known = {**dict(zip(numbers.tolist(), gold_sim.tolist(), strict=True)), **known}  # the first score stays

    found = sample.answers(sample.open(), np.arange(600))

    np.testing.assert_array_equal(found, np.array([known.get(number, np.nan) for number in range(600)], dtype=np.float32))


@pytest.mark.parametrize("num_appends", [1, 2, 5])
def test_keys_that_agree_in_all_but_their_last_bits_are_kept_apart(sample: Any, num_appends: int) -> None:
    words = np.array([0, 1, 2**24 - 1, 2**24, 2**63, 2**64 - 2, 2**64 - 1], dtype=np.uint64)
    keys = np.stack(np.meshgrid(words, words), axis=-1).reshape(-1, 2)
    query, passage = np.divmod(np.random.default_rng(0).permutation(len(keys) ** 2), len(keys))
    stored = np.arange(len(query)) % 3 > 0
    gold_sim = np.where(stored, np.arange(len(query)), np.nan).astype(np.float32)
    bank = sample.open()

    for part in np.array_split(np.flatnonzero(stored), num_appends):
        bank.append(keys[query[part]], keys[passage[part]], gold_sim[part])

    np.testing.assert_array_equal(bank.lookup(keys[query], keys[passage]), gold_sim)


def test_sorting_is_right_beyond_the_queries_that_fit_the_fast_sort() -> None:
    rank = np.array([2**24 + 1, 1, 0, 2**24, 1], dtype=np.int64)
    p0, p1 = np.array([0, 9, 5, 1, 9], dtype=np.uint64), np.array([0, 2, 0, 0, 1], dtype=np.uint64)

    assert scores._pair_order(rank, p0, p1).tolist() == [2, 4, 1, 3, 0]


def test_more_pairs_than_a_segment_holds_go_into_several(sample: Any) -> None:
    bank = sample.fill()

    assert len(sample.segments(bank)) == 3
    assert bank.num_pairs == 300
    assert MAX_SEGMENT_PAIRS < 2**31, "Arrow's list offsets are 32 bits"


def test_a_merge_that_does_not_fit_on_the_disk_is_put_off_and_nothing_is_left(
    sample: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scores, "_PAIRS_IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    bank = sample.open()
    for start in (0, 50):
        bank.append(*sample.pairs(np.arange(start, start + 50)))

    assert len(sample.segments(bank)) == 2
    assert sample.answers(sample.open(), np.arange(100)).tolist() == (np.arange(100) + 0.5).tolist()
    assert "stored, but its segments could not be merged" in caplog.text
    assert {path.suffix for path in bank.folder.iterdir() if not path.name.startswith(".")} == {".arrow", ".json"}


def test_passages_out_of_order_are_found_wherever_a_check_begins(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_PAIRS_PER_MERGE_STEP", 7)  # 300 pairs, 20 a query: steps begin everywhere in a query
    bank = sample.open()
    bank.append(*sample.pairs(np.arange(300)))
    (batch,) = bank._store.batches()
    segment = scores._Segment(batch)
    assert scores.find_fault(batch) is None

    for pair in range(300):
        p0 = segment.p0.copy()
        p0[pair] = 0 if pair % 20 else np.iinfo(np.uint64).max
        sizes = np.diff(segment.offsets).astype(np.int64)
        changed = scores._batch(segment.first, segment.second, sizes, p0, segment.p1, segment.gold_sim)
        assert scores.find_fault(changed) == "passages out of order", pair


def test_what_one_process_appends_another_sees_without_opening_again(sample: Any) -> None:
    reader, writer = sample.open(), sample.open()
    assert np.isnan(sample.answers(reader, [0])).all()

    writer.append(*sample.pairs([0, 1]))

    assert sample.answers(reader, [0, 1]).tolist() == [0.5, 1.5]
    assert reader.num_pairs == 2


def test_scores_that_are_not_finite_are_refused_with_count_and_first_ids(sample: Any) -> None:
    query_keys, passage_keys, gold_sim = sample.pairs(np.arange(20))
    gold_sim[[3, 7, 8, 9, 10, 11, 12]] = [np.nan, np.inf, -np.inf, np.nan, np.nan, np.nan, np.nan]

    with pytest.raises(
        ValueError,
        match=r"^7 of 20 scores are NaN or infinite.*nothing was stored \(first: q3/p3: nan; q7/p7: inf; q8/p8: -inf; ",
    ):
        sample.open().append(query_keys, passage_keys, gold_sim, describe="q{0}/p{0}".format)

    assert sample.open().num_pairs == 0


def test_pair_scored_twice_in_one_append_is_refused(sample: Any) -> None:
    query_keys, passage_keys, gold_sim = sample.pairs([4, 5, 6, 5])

    with pytest.raises(ValueError, match=r"^1 of 4 scores are scored twice in one append.*row 3: 5.5"):
        sample.open().append(query_keys, passage_keys, gold_sim)

    assert sample.open().num_pairs == 0


def test_malformed_questions_are_refused(sample: Any) -> None:
    query_keys, passage_keys, gold_sim = sample.pairs(np.arange(4))
    bank = ScoreBank(sample.root).open(sample.identity)

    with pytest.raises(ValueError, match=r"query_keys: expected uint64 \[n, 2\] as text_keys returns, found int64 \[4, 2\]"):
        bank.lookup(query_keys.astype(np.int64), passage_keys)
    with pytest.raises(ValueError, match=r"passage_keys: expected uint64 \[n, 2\].*found uint64 \[4\]"):
        bank.lookup(query_keys, passage_keys[:, 0])
    with pytest.raises(ValueError, match="4 query_keys but 3 passage_keys"):
        bank.lookup(query_keys, passage_keys[:3])
    with pytest.raises(ValueError, match=r"gold_sim: expected float32 \[4\], found float64 \[4\]"):
        bank.append(query_keys, passage_keys, gold_sim.astype(np.float64))
