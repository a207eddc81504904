"""How fast the score bank answers, and in how much memory: grouped by query and in random order, one segment and many.

Stores ``--pairs`` pairs (100 passages a query), asks as many of which half are known, each measurement in a fresh process
with a warm page cache. Time covers opening and verifying the segments; peak RSS covers the questions and the mapped bank.

    python benchmarks/bank_lookup.py --pairs 10_000_000
    python benchmarks/bank_lookup.py --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekd.bank import ScoreBank

Words = npt.NDArray[np.uint64]

PASSAGES_PER_QUERY = 100
IDENTITY = {"bench": "bank_lookup"}
SEED = 0


def main() -> None:
    """Build the banks, measure each in its own process, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000, help="pairs stored, and pairs asked")
    parser.add_argument("--quick", action="store_true", help="200,000 pairs")
    parser.add_argument("--measure", nargs=2, metavar=("BANK", "ORDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_pairs = 200_000 if arguments.quick else arguments.pairs
    if num_pairs < 16 * PASSAGES_PER_QUERY:
        parser.error(f"--pairs {num_pairs}: expected at least {16 * PASSAGES_PER_QUERY}, so that 16 segments have a query each")
    num_pairs -= num_pairs % (16 * PASSAGES_PER_QUERY)
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), num_pairs, arguments.measure[1])))
        return
    with tempfile.TemporaryDirectory(prefix="sparsekd-bench-") as folder:
        print(json.dumps(compare(Path(folder), num_pairs)))


def compare(folder: Path, num_pairs: int) -> dict[str, Any]:
    """Fill banks of 1 and 16 segments and by appends of 20,000, and ask each in both orders."""
    figures: dict[str, Any] = {"bench": "bank_lookup", "pairs": num_pairs}
    print(f"{'bank':<22} {'segments':>8} {'fill s':>7} {'order':<8} {'open s':>7} {'pairs/s':>12} {'peak RSS MB':>12}")
    for name, pairs_per_append, cap in (
        ("one segment", num_pairs, num_pairs),
        ("16 segments", num_pairs // 16, 1),  # a cap of 1 merges nothing
        ("appends of 20,000", 20_000, 1 << 24),
    ):
        started = time.perf_counter()
        fill(folder / name, num_pairs, pairs_per_append, cap)
        seconds = time.perf_counter() - started
        for order in ("grouped", "random"):
            found = run_measurement(folder / name, num_pairs, order)
            print(
                f"{name:<22} {found['segments']:>8} {seconds:>7.1f} {order:<8} {found['open_s']:>7.2f} "
                f"{found['pairs_per_s']:>12,} {found['peak_rss_mb']:>12,}"
            )
            prefix = {"one segment": "", "16 segments": "16_segments_", "appends of 20,000": "appended_"}[name]
            figures[f"{prefix}{order}_pairs_per_s"] = found["pairs_per_s"]
            figures["peak_rss_mb"] = max(figures.get("peak_rss_mb", 0), found["peak_rss_mb"])
    return figures


def fill(root: Path, num_pairs: int, pairs_per_append: int, cap: int) -> None:
    """Store the known pairs, spread over the appends as a teacher's length-sorted batches spread them: every query in each."""
    bank = ScoreBank(root) if cap > 1 else ScoreBank(root, max_segment_pairs=pairs_per_append)
    scores = bank.open(IDENTITY)
    queries, passages, gold_sim = known_pairs(num_pairs)
    order = np.random.default_rng(SEED + 1).permutation(num_pairs) if pairs_per_append < num_pairs else np.arange(num_pairs)
    for start in range(0, num_pairs, pairs_per_append):
        rows = order[start : start + pairs_per_append]
        scores.append(queries[rows // PASSAGES_PER_QUERY], passages[rows], gold_sim[rows])


def run_measurement(root: Path, num_pairs: int, order: str) -> dict[str, Any]:
    """Measure in a fresh process, so that peak RSS is the lookup's own."""
    command = [sys.executable, __file__, "--pairs", str(num_pairs), "--measure", str(root), order]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(root: Path, num_pairs: int, order: str) -> dict[str, Any]:
    """Ask ``num_pairs`` pairs, every second one known; check every answer's presence and a sample of values."""
    queries, passages, gold_sim = known_pairs(num_pairs)
    passages[::2] ^= np.uint64(1)  # these are not stored
    gold_sim[::2] = np.nan
    rows = np.arange(num_pairs, dtype=np.int32)
    if order == "random":
        np.random.default_rng(SEED + 2).shuffle(rows)
        passages, gold_sim = passages[rows], gold_sim[rows]
    query_keys = queries[rows // PASSAGES_PER_QUERY]
    del rows, queries
    started = time.perf_counter()
    scores = ScoreBank(root).open(IDENTITY)
    scores.lookup(query_keys[:1], passages[:1])  # opens and verifies every segment
    opened = time.perf_counter()
    answer = scores.lookup(query_keys, passages)
    ended = time.perf_counter()
    if not np.array_equal(answer, gold_sim, equal_nan=True):
        raise AssertionError("the bank's answers differ from what was stored")
    return {
        "segments": len(list(scores.folder.glob("*.arrow"))),
        "open_s": opened - started,
        "pairs_per_s": round(num_pairs / (ended - started)),
        "peak_rss_mb": peak_rss_mb(),
    }


def peak_rss_mb() -> int:
    """Return this program's peak; getrusage would count the parent's memory at the fork."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def known_pairs(num_pairs: int) -> tuple[Words, Words, npt.NDArray[np.float32]]:
    """Return query keys [num_pairs / 100, 2], passage keys and scores [num_pairs], the same in every process."""
    generator = np.random.default_rng(SEED)
    top = np.iinfo(np.uint64).max
    queries = generator.integers(0, top, (num_pairs // PASSAGES_PER_QUERY, 2), dtype=np.uint64, endpoint=True)
    passages = generator.integers(0, top, (num_pairs, 2), dtype=np.uint64, endpoint=True)
    return queries, passages, generator.standard_normal(num_pairs, dtype=np.float32)


if __name__ == "__main__":
    main()
