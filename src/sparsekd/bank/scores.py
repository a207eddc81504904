"""The score bank: for every (teacher identity, query text, passage text) one raw float32 gold_sim.

A segment holds one row per query and its passages sorted by key, 20 bytes a pair, memory-mapped: a question costs one search
among the queries and one inside the query's passages. Questions may come in any order; by query is fastest. Scores are
stored as the teacher gave them, no activation, no calibration; NaN is the answer for "not banked" and is never stored.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from sparsekd.bank.search import Positions, are_ascending, find_keys, find_keys_within
from sparsekd.bank.segment import columns_of, to_arrow, to_numpy
from sparsekd.bank.store import Layout, SegmentStore
from sparsekd.bank.text_key import Words, check_keys

GoldSim = npt.NDArray[np.float32]

KIND = "scores"
MAX_SEGMENT_PAIRS = 1 << 28
"""5.4 GB, which a merge rewrites at most. A look-up asks every segment, and above this size their number grows with the pairs."""
_BYTES_PER_PAIR = 20
_PAIRS_PER_BLOCK = 1 << 19  # fastest of 2^16..2^21 for random questions; about 60 MB of working memory
_PAIRS_PER_MERGE_STEP = 1 << 20
_PAIRS_IN_MEMORY = 1 << 24  # merges into more are made in files: 335 MB
_PASSAGE = pa.struct([("p0", pa.uint64()), ("p1", pa.uint64()), ("gold_sim", pa.float32())])
_COLUMNS = {"q0": pa.uint64(), "q1": pa.uint64(), "passages": pa.list_(_PASSAGE)}


class ScoreBank:
    """All teachers' scores under one folder."""

    def __init__(self, root: Path, *, max_segment_pairs: int = MAX_SEGMENT_PAIRS) -> None:
        """Use ``root`` = ``<cache>/bank``; nothing is created before the first append."""
        self._root = root
        self._max_segment_pairs = max_segment_pairs

    def open(self, identity: Mapping[str, Any], *, reference: str = "") -> TeacherScores:
        """Return the scores of the teacher with this identity; IntegrityError if its folder is damaged.

        ``reference``, how people call the model, is for ``sparsekd bank ls`` and decides nothing.
        """
        layout = Layout(KIND, self._max_segment_pairs * _BYTES_PER_PAIR, num_pairs_of, merge_segments, find_fault)
        return TeacherScores(SegmentStore(self._root, layout, identity, reference), self._max_segment_pairs)


class TeacherScores:
    """One teacher's scores."""

    def __init__(self, store: SegmentStore, max_segment_pairs: int) -> None:
        self._store = store
        self._max_segment_pairs = max_segment_pairs

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        return self._store.folder

    @property
    def num_pairs(self) -> int:
        """Stored pairs now; pairs that racing writers stored twice count twice until compaction."""
        return self._store.manifest().num_rows

    @property
    def content(self) -> list[str]:
        """Names of the segments, which are digests of their bytes: other scores have others, compacted ones too."""
        return sorted(entry.name for entry in self._store.manifest().segments)

    def lookup(self, query_keys: Words, passage_keys: Words) -> GoldSim:
        """Return gold_sim float32 [n] of the pairs (query_keys[i], passage_keys[i]), NaN where it is not banked.

        Keys are uint64 [n, 2] from ``text_keys``. Raises IntegrityError naming the file if any segment is damaged.
        """
        _check_pairs(query_keys, passage_keys)
        segments = [_Segment(batch) for batch in self._store.batches()]
        gold_sim = np.full(len(query_keys), np.nan, dtype=np.float32)
        for start in range(0, len(query_keys) if segments else 0, _PAIRS_PER_BLOCK):
            block = slice(start, start + _PAIRS_PER_BLOCK)
            gold_sim[block] = _lookup_block(segments, query_keys[block], passage_keys[block])
        return gold_sim

    def append(
        self, query_keys: Words, passage_keys: Words, gold_sim: GoldSim, *, describe: Callable[[int], str] | None = None
    ) -> None:
        """Store scores for good, all or none (above 2^28 pairs: segment by segment); on return they are on disk.

        Raises ValueError, naming count and first rows by ``describe(row)``, if a score is NaN or infinite or a pair occurs
        twice. A pair stored earlier keeps its first score.
        """
        _check_pairs(query_keys, passage_keys)
        if gold_sim.dtype != np.float32 or gold_sim.shape != (len(query_keys),):
            raise ValueError(f"gold_sim: expected float32 [{len(query_keys)}], found {gold_sim.dtype} {list(gold_sim.shape)}")
        describe = describe or "row {}".format
        _refuse(np.flatnonzero(~np.isfinite(gold_sim)), gold_sim, describe, "NaN or infinite, which no teacher may give")
        first, second, rank = _distinct(query_keys[:, 0], query_keys[:, 1])
        order = _pair_order(rank, passage_keys[:, 0], passage_keys[:, 1])
        rank, p0, p1 = rank[order], passage_keys[order, 0], passage_keys[order, 1]
        twice = order[1:][_is_repeated(rank, p0, p1)]
        _refuse(twice, gold_sim, describe, "scored twice in one append; ask each pair once")
        for start in range(0, len(order), self._max_segment_pairs):
            part = slice(start, start + self._max_segment_pairs)
            sizes = np.bincount(rank[part], minlength=len(first))
            self._store.publish(_batch(first, second, sizes, p0[part], p1[part], gold_sim[order[part]]))
            self._store.compact()


def num_pairs_of(batch: pa.RecordBatch) -> int:
    """Return the number of pairs in a segment."""
    return len(batch.column("passages").values)


def find_fault(batch: pa.RecordBatch) -> str | None:
    """Say what is wrong with a segment that some other program wrote; None for one of ours."""
    if columns_of(batch) != _COLUMNS:
        return f"columns {columns_of(batch)}"
    segment = _Segment(batch)
    starts = range(0, len(segment.gold_sim), _PAIRS_PER_MERGE_STEP)
    if not all(np.isfinite(segment.gold_sim[start : start + _PAIRS_PER_MERGE_STEP]).all() for start in starts):
        return "a score that is not finite"
    if not are_ascending(segment.first, segment.second):
        return "queries out of order"
    if (np.diff(segment.offsets) <= 0).any():
        return "a query without passages"
    is_sorted = all(segment.has_ascending_passages(start, start + _PAIRS_PER_MERGE_STEP) for start in starts)
    return None if is_sorted else "passages out of order"


def merge_segments(batches: Sequence[pa.RecordBatch], folder: Path) -> pa.RecordBatch:
    """Join segments into one; of a pair in several, the first one's score stays.

    Works through the key space in steps of about a million pairs: memory is 24 bytes a query, some 100 MB, and of up to 2^24 pairs
    the result, 20 bytes a pair; a larger one is made in unnamed files in ``folder``. OSError if they do not fit on the disk.
    """
    segments = [_Segment(batch) for batch in batches]
    total = sum(len(segment.gold_sim) for segment in segments)
    steps = 1 + total // _PAIRS_PER_MERGE_STEP
    p0, p1, gold_sim = (_scratch(total, dtype, folder) for dtype in (np.uint64, np.uint64, np.float32))
    queries, end = [], 0
    for step in range(steps):
        *query, step_p0, step_p1, step_gold_sim = _merge_step([_cut(segment, step, steps) for segment in segments])
        queries.append(query)
        place = slice(end, end := end + len(step_p0))
        p0[place], p1[place], gold_sim[place] = step_p0, step_p1, step_gold_sim
    first, second, sizes = (np.concatenate(column) for column in zip(*queries, strict=True))
    return _batch(first, second, sizes, p0[:end], p1[:end], gold_sim[:end])


class _Segment:
    """A segment's columns as arrays over the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        passages = batch.column("passages")
        self.first: Words = to_numpy(batch.column("q0"))
        self.second: Words = to_numpy(batch.column("q1"))
        self.offsets: npt.NDArray[np.int32] = to_numpy(passages.offsets)
        self.p0: Words = to_numpy(passages.values.field("p0"))
        self.p1: Words = to_numpy(passages.values.field("p1"))
        self.gold_sim: GoldSim = to_numpy(passages.values.field("gold_sim"))

    def find_passages(self, query: Positions, p0: Words, p1: Words) -> Positions:
        """Return where each pair of a known query stands, -1 where it does not."""
        start, stop = self.offsets[query].astype(np.int64), self.offsets[query + 1].astype(np.int64)
        return find_keys_within(self.p0, self.p1, start, stop, p0, p1)

    def has_ascending_passages(self, first: int, last: int) -> bool:
        """Say whether pairs first..last, as far as there are any, stand in the order of their passages within each query."""
        p0, p1 = self.p0[first : last + 1], self.p1[first : last + 1]
        is_sorted = (p0[:-1] < p0[1:]) | ((p0[:-1] == p0[1:]) & (p1[:-1] < p1[1:]))
        low, high = np.searchsorted(self.offsets, [first + 1, first + len(p0)])
        is_sorted[self.offsets[low:high] - 1 - first] = True  # from one query's last passage to the next one's first
        return bool(is_sorted.all())


def _lookup_block(segments: Sequence[_Segment], query_keys: Words, passage_keys: Words) -> GoldSim:
    """Look a block of pairs up; questions in no order are sorted first, which pays at once (cache misses)."""
    starts = _run_starts(query_keys)
    if len(starts) * 2 <= len(query_keys) or len(query_keys) < 2:
        return _lookup_runs(segments, query_keys, passage_keys, starts)
    order = np.argsort(query_keys[:, 0])
    query_keys, gold_sim = query_keys[order], np.empty(len(order), dtype=np.float32)
    gold_sim[order] = _lookup_runs(segments, query_keys, passage_keys[order], _run_starts(query_keys))
    return gold_sim


def _lookup_runs(segments: Sequence[_Segment], query_keys: Words, passage_keys: Words, starts: Positions) -> GoldSim:
    """Look pairs up, each run of one query searched once; only what a segment does not have goes on to the next."""
    gold_sim = np.full(len(query_keys), np.nan, dtype=np.float32)
    run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(query_keys)))
    q0, q1 = query_keys[starts, 0], query_keys[starts, 1]
    p0, p1 = np.ascontiguousarray(passage_keys[:, 0]), np.ascontiguousarray(passage_keys[:, 1])
    pending = np.arange(len(query_keys))
    for segment in segments:
        query = find_keys(segment.first, segment.second, q0, q1)[run[pending]]
        rows = pending[query >= 0]
        position = segment.find_passages(query[query >= 0], p0[rows], p1[rows])
        hit = position >= 0
        gold_sim[rows[hit]] = segment.gold_sim[position[hit]]
        pending = pending[np.isnan(gold_sim[pending])]
        if not pending.size:
            break
    return gold_sim


def _run_starts(keys: Words) -> Positions:
    """Return the rows where another key begins than the row before had."""
    begins = np.ones(len(keys), dtype=np.bool_)
    begins[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return np.flatnonzero(begins)


def _cut(segment: _Segment, step: int, steps: int) -> tuple[npt.NDArray[Any], ...]:
    """Return the part of a segment whose queries fall into one of ``steps`` equal parts of the key space."""
    bounds = [np.uint64(min((number << 64) // steps, (1 << 64) - 1)) for number in (step, step + 1)]
    low, high = (int(place) for place in np.searchsorted(segment.first, bounds))
    if step + 1 == steps:
        high = len(segment.first)
    pairs = slice(int(segment.offsets[low]), int(segment.offsets[high]))
    sizes = np.diff(segment.offsets[low : high + 1])
    columns = (segment.p0[pairs], segment.p1[pairs], segment.gold_sim[pairs])
    return segment.first[low:high], segment.second[low:high], sizes, *columns


def _scratch(length: int, dtype: type[Any], folder: Path) -> npt.NDArray[Any]:
    """Return an array to fill; a large one lies in a file that ends with it, so that the kernel may write it out."""
    if length <= _PAIRS_IN_MEMORY:
        return np.empty(length, dtype)
    with tempfile.TemporaryFile(dir=folder) as stream:
        # Space is taken now: on a disk that fills up later, the write to a mapped page would be the process's end.
        os.posix_fallocate(stream.fileno(), 0, length * np.dtype(dtype).itemsize)
        return np.memmap(stream, dtype, shape=(length,))


def _merge_step(cuts: Sequence[tuple[npt.NDArray[Any], ...]]) -> tuple[npt.NDArray[Any], ...]:
    """Return distinct queries (two words and number of pairs) and the pairs of all cuts in order, first of equal ones only."""
    first, second, sizes, p0, p1, gold_sim = (np.concatenate(column) for column in zip(*cuts, strict=True))
    first, second, rank = _distinct(first, second)
    rank = np.repeat(rank, sizes)
    order = _pair_order(rank, p0, p1)
    repeated = np.zeros(len(order), dtype=np.bool_)
    repeated[1:] = _is_repeated(rank[order], p0[order], p1[order])
    order = order[~repeated]
    return first, second, np.bincount(rank[order], minlength=len(first)), p0[order], p1[order], gold_sim[order]


def _distinct(q0: Words, q1: Words) -> tuple[Words, Words, Positions]:
    """Return the sorted distinct query keys (two words) and the place of each row's key among them.

    One sort by the first word, a third of the time of a sort by both, is right unless two keys share it (once in 2^64 for digests).
    """
    order = np.argsort(q0, kind="stable")
    before, after = order[:-1], order[1:]
    if ((q0[before] == q0[after]) & (q1[before] != q1[after])).any():
        order = np.lexsort((q1, q0))
    starts = _run_starts(np.stack((q0[order], q1[order]), axis=1))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(order)))
    return q0[order[starts]], q1[order[starts]], rank


def _pair_order(rank: Positions, p0: Words, p1: Words) -> Positions:
    """Return the stable order by (rank, p0, p1).

    One sort by 40 + 24 bits of (rank, p0), which on the sorted runs of a merge is a merge, is five times faster than a sort
    by three keys and right unless two passages of one query share their first 24 bits in the wrong order; then the slow one.
    """
    order = np.argsort((rank.astype(np.uint64) << np.uint64(40)) | (p0 >> np.uint64(24)), kind="stable")
    before, after = order[:-1], order[1:]
    is_wrong = (p0[before] == p0[after]) & (p1[before] > p1[after])
    is_wrong = (rank[before] == rank[after]) & ((p0[before] > p0[after]) | is_wrong)
    is_wrong |= rank[before] > rank[after]  # beyond 2^24 queries, which do not fit into 24 bits
    return np.lexsort((p1, p0, rank)) if is_wrong.any() else order


def _is_repeated(rank: Positions, p0: Words, p1: Words) -> npt.NDArray[np.bool_]:
    """Return, for sorted pairs, whether each but the first equals the one before it."""
    repeated: npt.NDArray[np.bool_] = (rank[1:] == rank[:-1]) & (p0[1:] == p0[:-1]) & (p1[1:] == p1[:-1])
    return repeated


def _batch(first: Words, second: Words, sizes: Positions, p0: Words, p1: Words, gold_sim: GoldSim) -> pa.RecordBatch:
    """Return sorted pairs, ``sizes`` of them for each query, as a record batch with one row per query that has any."""
    used = sizes > 0
    offsets = np.concatenate(([0], np.cumsum(sizes[used]))).astype(np.int32)
    values = pa.StructArray.from_arrays([to_arrow(p0), to_arrow(p1), to_arrow(gold_sim)], fields=list(_PASSAGE))
    passages = pa.ListArray.from_arrays(to_arrow(offsets), values)
    return pa.RecordBatch.from_arrays([to_arrow(first[used]), to_arrow(second[used]), passages], names=["q0", "q1", "passages"])


def _check_pairs(query_keys: Words, passage_keys: Words) -> None:
    check_keys("query_keys", query_keys)
    check_keys("passage_keys", passage_keys)
    if len(query_keys) != len(passage_keys):
        raise ValueError(f"{len(query_keys)} query_keys but {len(passage_keys)} passage_keys; expected one of each per pair")


def _refuse(rows: Positions, gold_sim: GoldSim, describe: Callable[[int], str], why: str) -> None:
    """Raise ValueError with count and first five rows if there are any."""
    if rows.size:
        first = "; ".join(f"{describe(int(row))}: {gold_sim[row]}" for row in np.sort(rows)[:5])
        raise ValueError(f"{rows.size} of {len(gold_sim)} scores are {why}; nothing was stored (first: {first})")
