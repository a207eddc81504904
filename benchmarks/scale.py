"""How far it goes: the bank filled to --pairs pairs of made-up keys, a finished stage 1 found again, and every stage on paper.

The bank is measured at 10^5, 10^6, … pairs, 100 passages a query, filled by appends of --append-pairs whose queries are spread
over all of them, as a teacher's length-sorted shards are; filling, and asking for 200,000 pairs of which half are known, are
processes of their own. The table of a finished stage 1 is labelled, published and opened by the code that a stage uses. Times are
CPU seconds of one thread (waiting for the disk and for other programs is not in them) unless called wall. On paper, each stage is
its work over a rate; a rate that is not measured in the same run is an option, whose default is from docs/numbers.md. Everything
lies in --folder meanwhile: 5 GB for 10^8 pairs.

    python benchmarks/scale.py
    python benchmarks/scale.py --plot docs/scale.svg
    python benchmarks/scale.py --quick
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank import ScoreBank, text_keys
from sparsekd.bank.scores import MAX_SEGMENT_PAIRS

Keys = NDArray[np.uint64]

IDENTITY = {"bench": "scale"}
PASSAGES_PER_QUERY = 100
ASKED = 200_000
NUM_NEGATIVES = 8
SMALLEST = 100_000
HELD_PASSAGES = 100_000
COLLECTIONS = {"MS MARCO": 8_841_823, "100 million": 100_000_000, "1 billion": 1_000_000_000}
PAPER_PAIRS = (10**8, 10**10)
PASSAGE_BYTES = 346  # MS MARCO's collection.tsv, 3.06 GB of 8.84 million
DENSE_WIDTH = 384
DAY = 86_400
# [run] shard_pairs and shard_passages, labels' rows per file, passages of an index's block
SHARD_PAIRS = SHARD_PASSAGES = 20_000
SHARD_ROWS, BLOCK_PASSAGES = 50_000, 65_536


def main() -> None:
    """Measure, print the tables of docs/scale.md and, last, one JSON line."""
    options = parse_arguments()
    if options.part:
        name, folder, number = options.part
        print(json.dumps(PARTS[name](Path(folder), int(number), options)))
        return
    with tempfile.TemporaryDirectory(prefix="sparsekd-bench-", dir=options.folder) as folder:
        banks = [measured_bank(Path(folder), size) for size in sizes_up_to(options.pairs)]
        found = {
            **alone("build_table", Path(folder) / "table", options.table_pairs),
            **alone("open_table", Path(folder) / "table", options.table_pairs),
        }
        held = alone("hold", Path(folder) / "collection", HELD_PASSAGES)
    figures = {"bench": "scale", "append_pairs": options.append_pairs, "bank": banks, "table": found, **held, **small_rates()}
    show_bank(banks)
    show_table(found)
    show_paper(options, figures)
    if options.plot:
        plot(banks, options.plot)
    print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a bank of 200,000 pairs, a table of 50,000")
    parser.add_argument("--pairs", type=int, default=100_000_000, help="the largest bank, at least 100,000")
    parser.add_argument("--append-pairs", type=int, default=1_000_000)
    parser.add_argument("--table-pairs", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where banks and tables lie meanwhile (default: the system's temporary folder)")
    parser.add_argument("--plot", type=Path, help="SVG of the bank's cost per pair")
    parser.add_argument("--queries", type=int, default=500_000, help="on paper")
    parser.add_argument("--candidates", type=int, default=100, help="on paper, per query")
    parser.add_argument("--cores", type=int, default=64, help="on paper, that share the work")
    parser.add_argument("--core-hour-usd", type=float, default=0.04, help="on paper; a price, not a measurement")
    parser.add_argument("--passage-tokens", type=float, default=75, help="on paper; an assumption")
    parser.add_argument("--active-dims", type=float, default=49.3, help="per passage: the quickstart's student")
    parser.add_argument("--encode-tokens-per-s", type=float, default=2263, help="of one core; both gave 4,526")
    parser.add_argument("--score-pairs-per-s", type=float, default=39, help="a MiniLM cross-encoder of 64 tokens on one core")
    parser.add_argument("--dense-products-per-s", type=float, default=5.3e7, help="queries times passages, exact, width 384")
    parser.add_argument("--search-products-per-s", type=float, default=1.1e8, help="queries times passages in a student's index")
    parser.add_argument("--segment-us", type=float, default=0.044, help="of one more segment, a pair: 16 against 1")
    parser.add_argument("--part", nargs=3, metavar=("PART", "FOLDER", "NUMBER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.append_pairs, options.table_pairs = 200_000, 20_000, 50_000
    if options.pairs < SMALLEST or options.append_pairs < 1 or options.table_pairs < PASSAGES_PER_QUERY:
        parser.error(f"expected at least {SMALLEST} pairs, 1 pair an append and {PASSAGES_PER_QUERY} pairs in the table")
    return options


def sizes_up_to(largest: int) -> list[int]:
    """Return 10^5, 10^6, … and the largest, in whole queries."""
    powers = [SMALLEST * 10**exponent for exponent in range(10)]
    return [size - size % PASSAGES_PER_QUERY for size in sorted({*(size for size in powers if size < largest), largest})]


def alone(part: str, folder: Path, number: int) -> dict[str, Any]:
    """Run a part in a fresh process, with this one's options; return its figures."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, str(folder), str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measured_bank(folder: Path, size: int) -> dict[str, Any]:
    """Fill a bank of ``size`` pairs, ask it, remove it."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        figures = {"pairs": size, **alone("fill", Path(root), size), **alone("ask", Path(root), size)}
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def fill(root: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Append every pair; µs a pair, merges included."""
    scores = ScoreBank(root).open(IDENTITY)
    num_queries, seconds, slowest = size // PASSAGES_PER_QUERY, 0.0, 0.0
    started = time.perf_counter()
    with PeakMemory() as memory:
        for start in range(0, size, options.append_pairs):
            numbers = np.arange(start, min(start + options.append_pairs, size), dtype=np.uint64)
            batch = pairs_of(numbers, num_queries)
            before = time.process_time()
            scores.append(*batch)
            spent = time.process_time() - before
            seconds, slowest = seconds + spent, max(slowest, spent)
    files = list(scores.folder.glob("*.arrow"))
    return {
        "append_us": seconds / size * 1e6,
        "slowest_append_s": slowest,
        "fill_wall_s": time.perf_counter() - started,
        "segments": len(files),
        "bytes_per_pair": sum(file.stat().st_size for file in files) / size,
        "fill_memory_mb": memory.peak_mb,
    }


def ask(root: Path, size: int, _: argparse.Namespace) -> dict[str, Any]:
    """Open the bank and ask for pairs by query and in no order, every second one unknown; every answer is checked."""
    num_queries, random = size // PASSAGES_PER_QUERY, np.random.default_rng(0)
    asked = min(ASKED, size)
    queries = random.choice(num_queries, asked // PASSAGES_PER_QUERY, replace=False).astype(np.uint64)
    by_query = (queries[:, None] + np.arange(PASSAGES_PER_QUERY, dtype=np.uint64) * np.uint64(num_queries)).reshape(-1)
    orders = {"grouped": by_query, "random": random.integers(0, size, asked).astype(np.uint64)}
    figures: dict[str, Any] = {}
    with PeakMemory() as memory:
        started = time.process_time()
        scores = ScoreBank(root).open(IDENTITY)
        scores.lookup(np.zeros((1, 2), np.uint64), np.zeros((1, 2), np.uint64))  # opens and verifies every segment
        figures["open_s"] = time.process_time() - started
        for name, numbers in orders.items():
            query_keys, passage_keys, gold_sim = pairs_of(numbers, num_queries)
            passage_keys[::2] ^= np.uint64(1)
            gold_sim[::2] = np.nan
            scores.lookup(query_keys, passage_keys)  # what the page cache does not hold is no work of the bank's
            started = time.process_time()
            answer = scores.lookup(query_keys, passage_keys)
            figures[f"{name}_lookup_us"] = (time.process_time() - started) / len(numbers) * 1e6
            if not np.array_equal(answer, gold_sim, equal_nan=True):
                raise AssertionError("the bank's answers differ from what was stored")
    return {**figures, "ask_memory_mb": memory.peak_mb}


def pairs_of(numbers: Keys, num_queries: int) -> tuple[Keys, Keys, NDArray[np.float32]]:
    """Return query keys, passage keys and scores of the numbered pairs; consecutive numbers are of different queries."""
    queries, passages = numbers % np.uint64(num_queries), numbers + np.uint64(1 << 40)
    keys = [np.stack((mixed(part), mixed(part + np.uint64(1 << 50))), axis=1) for part in (queries, passages)]
    return keys[0], keys[1], (numbers % np.uint64(1 << 20)).astype(np.float32)


def mixed(numbers: Keys) -> Keys:
    """Return uint64 that look drawn, one to one: SplitMix64 of Steele, Lea and Flood 2014."""
    numbers = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def build_table(cache: Path, num_pairs: int, _: argparse.Namespace) -> dict[str, Any]:
    """Label rows of 9 passages and publish them; the fields by which they are found again are written beside them."""
    from sparsekd.labels.building import build_table as build
    from sparsekd.labels.building import table_fields
    from sparsekd.labels.rows import Rows
    from sparsekd.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "collection": {"path": "synthetic"},
            "mining": {"miners": [{"kind": "bm25", "quota": 50}]},
            "teachers": [{"name": "teacher", "kind": "cross-encoder", "model": "none"}],
            "labels": {"num_negatives": NUM_NEGATIVES},
            "student": {"model": "none"},
        }
    )
    width = 1 + NUM_NEGATIVES
    num_rows = num_pairs // width
    ids = [f"passage-{number}" for number in range(1 << 20)]
    drawn = (np.arange(num_rows)[:, None] * 7919 + np.arange(width) * 104_729) % len(ids)  # 9 different ones
    passage_ids = [[ids[place] for place in row] for row in drawn.tolist()]
    rows = Rows([f"query-{number}" for number in range(num_rows)], passage_ids, {}, 0)
    fields = table_fields(recipe, "0" * 16, {"teacher": IDENTITY})
    random = np.random.default_rng(0)
    with PeakMemory() as memory:
        started = time.process_time()
        build(
            recipe,
            rows,
            cache=cache,
            fields=fields,
            gold_sim=lambda _, query_ids, __: random.standard_normal(len(query_ids), dtype=np.float32),
        )
        seconds = time.process_time() - started
    (cache / "fields.json").write_text(json.dumps(fields), encoding="utf-8")
    return {"pairs": num_rows * width, "rows": num_rows, "build_s": seconds, "build_memory_mb": memory.peak_mb}


def open_table(cache: Path, _: int, __: argparse.Namespace) -> dict[str, Any]:
    """Find the table by its fields and open it, as a second run does: every byte and every row checked."""
    from sparsekd.artifact import find
    from sparsekd.labels.building import table_folder
    from sparsekd.labels.score_table import ScoreTable

    fields = json.loads((cache / "fields.json").read_text(encoding="utf-8"))
    started, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        hit = find(table_folder(cache, fields), fields)
        assert hit is not None, "the table that was just published is not found"
        table = ScoreTable.open(hit.folder)
    size = sum(path.stat().st_size for path in table.shard_paths)
    return {
        "hit_s": time.process_time() - cpu,
        "hit_wall_s": time.perf_counter() - started,
        "hit_memory_mb": memory.peak_mb,
        "bytes_per_pair": size / (len(table) * table.num_passages),
    }


def hold(folder: Path, num_passages: int, _: argparse.Namespace) -> dict[str, Any]:
    """Read a collection as stage 1 does, and list the pairs of 100 candidates a query: bytes of memory a passage, and a pair."""
    from sparsekd.collection import read_collection
    from sparsekd.labels.rows import filter_pairs
    from sparsekd.mining.candidates import CandidateRow

    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(num_passages):
            text = f"{number} ".ljust(PASSAGE_BYTES, "x")
            stream.write(json.dumps({"_id": f"passage-{number}", "title": "", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "which?"}) + "\n", encoding="utf-8")
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\tpassage-0\t1\n", encoding="utf-8")
    before, started = own_memory_mb(), time.process_time()
    collection = read_collection(folder)
    seconds, texts_mb = time.process_time() - started, own_memory_mb() - before
    count = len(collection.passages)

    def rows() -> Iterator[CandidateRow]:
        for number in range(num_passages // PASSAGES_PER_QUERY):
            ids = [f"passage-{place}" for place in range(PASSAGES_PER_QUERY)]  # of their own, as a file gives them
            nothing: list[Any] = [None] * len(ids)
            yield CandidateRow(f"query-{number}", ["passage-0"], ids, nothing, nothing, nothing)

    before = own_memory_mb()
    query_ids, _passage_ids = filter_pairs(rows())
    pairs_mb = own_memory_mb() - before
    return {
        "read_passages_per_s": count / seconds,
        "memory_bytes_per_passage": texts_mb * (1 << 20) / count,
        "memory_bytes_per_pair": pairs_mb * (1 << 20) / len(query_ids),
    }


PARTS: dict[str, Callable[[Path, int, argparse.Namespace], dict[str, Any]]] = {
    "fill": fill,
    "ask": ask,
    "build_table": build_table,
    "open_table": open_table,
    "hold": hold,
}


class PeakMemory:
    """Samples this process's own memory, mapped files left out: the kernel takes their pages back when it needs them."""

    peak_mb = 0.0

    def __enter__(self) -> PeakMemory:
        """Start sampling every 10 ms."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, own_memory_mb())
            if self._done.wait(0.01):
                return


def own_memory_mb() -> float:
    """Return this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def small_rates() -> dict[str, float]:
    """Return bytes digested and texts keyed a second."""
    block, texts = bytes(1 << 26), [f"{number} {'word ' * 60}" for number in range(20_000)]
    started = time.process_time()
    hashlib.sha256(block).digest()
    digested = time.process_time()
    text_keys(texts)
    keyed = time.process_time()
    return {"sha256_bytes_per_s": len(block) / (digested - started), "text_keys_per_s": len(texts) / (keyed - digested)}


def show_bank(banks: Sequence[dict[str, Any]]) -> None:
    """Print the simulated banks."""
    table(
        [
            "pairs",
            "segments",
            "append, µs",
            "look-up by query, µs",
            "in no order, µs",
            "open, s",
            "slowest append, s",
            "fill, MB",
            "ask, MB",
        ],
        [
            [
                f"{bank['pairs']:,}",
                str(bank["segments"]),
                f"{bank['append_us']:.2f}",
                f"{bank['grouped_lookup_us']:.2f}",
                f"{bank['random_lookup_us']:.2f}",
                f"{bank['open_s']:.2f}",
                f"{bank['slowest_append_s']:.1f}",
                f"{bank['fill_memory_mb']:.0f}",
                f"{bank['ask_memory_mb']:.0f}",
            ]
            for bank in banks
        ],
    )


def show_table(figures: dict[str, Any]) -> None:
    """Print what finding a finished stage 1 costs."""
    print(
        f"\nscore table of {figures['pairs']:,} pairs in {figures['rows']:,} rows, {figures['bytes_per_pair']:.1f} bytes a pair\n"
        f"made in {figures['build_s']:.1f} s and {figures['build_memory_mb']:.0f} MB\n"
        f"found and verified in {figures['hit_s']:.2f} s ({figures['hit_wall_s']:.2f} s wall) and {figures['hit_memory_mb']:.0f} MB"
    )


@dataclass(frozen=True)
class Stage:
    """Work over a rate."""

    name: str
    work: float
    unit: str
    per_s: float
    """Units a second of one core."""
    size: float = 0.0
    """Bytes it leaves on the disk."""

    @property
    def seconds(self) -> float:
        """Of one core."""
        return self.work / self.per_s


def stages(passages: int, options: argparse.Namespace, figures: dict[str, Any]) -> list[Stage]:
    """Return every stage over a collection of so many passages."""
    pairs = options.queries * (options.candidates + 1)
    tokens, products = passages * options.passage_tokens, options.queries * passages
    bank, found = figures["bank"][-1], figures["table"]
    table_pairs = options.queries * (1 + NUM_NEGATIVES)
    return [
        Stage("digest of the texts", passages * PASSAGE_BYTES, "bytes", figures["sha256_bytes_per_s"], passages * PASSAGE_BYTES),
        Stage("reading of the texts", passages, "passages", figures["read_passages_per_s"]),
        Stage("dense vectors of the passages", tokens, "tokens", options.encode_tokens_per_s, passages * (DENSE_WIDTH * 4 + 16)),
        Stage("exact dense search", products, "products", options.dense_products_per_s),
        Stage("teacher scores", pairs, "pairs", options.score_pairs_per_s),
        Stage("keys of the texts", passages + options.queries, "texts", figures["text_keys_per_s"]),
        Stage("bank, appends", pairs, "pairs", 1e6 / bank["append_us"], pairs * bank["bytes_per_pair"]),
        Stage("bank, look-ups", pairs, "pairs", 1e6 / bank["grouped_lookup_us"]),
        Stage("score table", table_pairs, "pairs", found["pairs"] / found["build_s"], table_pairs * found["bytes_per_pair"]),
        Stage("score table, found again", table_pairs, "pairs", found["pairs"] / found["hit_s"]),
        Stage("student's vectors", tokens, "tokens", options.encode_tokens_per_s, passages * options.active_dims * 8),
        Stage("exact search of all queries", products, "products", options.search_products_per_s),
    ]


def show_paper(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print every stage of each collection, the shards, and the bank beyond what was simulated."""
    pairs = options.queries * (options.candidates + 1)
    for name, passages in COLLECTIONS.items():
        print(f"\n{name}: {passages:,} passages, {options.queries:,} queries, {options.candidates} candidates each")
        rows = []
        for stage in stages(passages, options, figures):
            hours = stage.seconds / 3600
            rows.append(
                [
                    stage.name,
                    f"{stage.work:.3g} {stage.unit} / {stage.per_s:.3g}",
                    f"{stage.seconds:,.0f}",
                    duration(stage.seconds / options.cores),
                    f"{hours * options.core_hour_usd:,.2f}",
                    f"{stage.size / 1e9:,.1f}" if stage.size else "",
                ]
            )
        table(["stage", "work / rate of a core", "core seconds", f"on {options.cores} cores", "USD", "GB on disk"], rows)
        show_shards(passages, options)
        texts, ids = passages * figures["memory_bytes_per_passage"], pairs * figures["memory_bytes_per_pair"]
        print(f"memory of each process of stage 1: texts {texts / 1e9:,.1f} GB, ids of pairs {ids / 1e9:,.1f} GB")
    print()
    table(
        ["pairs", "GB", "full segments", "append, µs", "all appends, core hours", "look-up by query, µs", "open, s"],
        [paper_bank(pairs, figures["bank"], options.segment_us) for pairs in PAPER_PAIRS],
    )


def show_shards(passages: int, options: argparse.Namespace) -> None:
    """Print what stands between a crash and the last commit."""
    pairs = options.queries * (options.candidates + 1)
    encoding = SHARD_PASSAGES * options.passage_tokens / options.encode_tokens_per_s
    print(
        f"shards: {math.ceil(passages / SHARD_PASSAGES):,} of {SHARD_PASSAGES:,} passages ({duration(encoding)} each), "
        f"{math.ceil(pairs / SHARD_PAIRS):,} of {SHARD_PAIRS:,} pairs ({duration(SHARD_PAIRS / options.score_pairs_per_s)} each), "
        f"{math.ceil(options.queries / SHARD_ROWS):,} files of {SHARD_ROWS:,} rows, "
        f"{math.ceil(passages / BLOCK_PASSAGES):,} index blocks of {BLOCK_PASSAGES:,} passages"
    )


def paper_bank(pairs: int, banks: Sequence[dict[str, Any]], segment_us: float) -> list[str]:
    """Return the row of a bank of so many pairs: cost by a line through the logarithm, look-ups also by each full segment."""
    append, lookup = (fitted(banks, name, pairs) for name in ("append_us", "grouped_lookup_us"))
    num_full = pairs // MAX_SEGMENT_PAIRS
    return [
        f"{pairs:,}",
        f"{pairs * banks[-1]['bytes_per_pair'] / 1e9:,.0f}",
        str(num_full),
        f"{append:.2f}",
        f"{append * pairs / 1e6 / 3600:,.1f}",
        f"{lookup + num_full * segment_us:.2f}",
        f"{banks[-1]['open_s'] / banks[-1]['pairs'] * pairs:,.0f}",
    ]


def fitted(banks: Sequence[dict[str, Any]], name: str, pairs: int) -> float:
    """Return a figure at ``pairs`` by the least-squares line through log10; the largest measured where there is but one."""
    if len(banks) < 2:
        return float(banks[-1][name])
    slope, start = np.polyfit([math.log10(bank["pairs"]) for bank in banks], [bank[name] for bank in banks], 1)
    return float(max(slope * math.log10(pairs) + start, banks[-1][name]))


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    for limit, unit in ((DAY, "days"), (3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:,.1f} {unit}"
    return f"{seconds:.1f} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print Markdown."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def plot(banks: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the cost of a pair by the bank's size, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    names = {"append_us": "append", "grouped_lookup_us": "look-up, by query", "random_lookup_us": "look-up, in no order"}
    for name, label in names.items():
        axes.plot([bank["pairs"] for bank in banks], [bank[name] for bank in banks], marker="o", label=label)
    axes.set(xscale="log", xlabel="pairs in the bank", ylabel="CPU µs a pair", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
