"""One SPLADE distillation step, MarginMSE and FLOPS, forward and backward: sentence-transformers' SpladeLoss and CachedSpladeLoss
on its own modules ("plain", "cached") against the fast step ("fast": no padding, the fused head, one forward of all passages).

All run on one student (same weights, same texts, dropout off), turn by turn in one process, so that a busy machine slows all;
ratios are taken round by round, above 1 where ours is better. Peak memory growth is taken in a fresh process per path: resident
memory on a CPU, torch's allocations on a GPU. Texts are docstrings of the Python that runs this, as long as they are or with --full
all of --tokens. Tokenising is timed on no path. Nothing is downloaded.

    python benchmarks/training_step.py --active-dims 300
    python benchmarks/training_step.py --active-dims 300 --full
    python benchmarks/training_step.py --quick
    python benchmarks/training_step.py --device cuda --pairs 20
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import logging
import random
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
RECIPE = Path(__file__).resolve().parents[1] / "pipeline" / "recipes" / "quickstart.toml"
PATHS = ("plain", "cached", "fast")
MINI_BATCH = 16  # texts embedded at once by CachedSpladeLoss
MEGABYTE = 1 << 20
AGAINST = {"plain": "", "cached": "_vs_cached"}
"""What the fast path is compared with, and how its figures' names end."""


@dataclass(frozen=True)
class Step:
    """What a step needs; every tensor is on the device."""

    model: Any
    losses: dict[str, Any]
    autocast: Any
    columns: dict[str, list[dict[str, Any]]]
    labels: Any


def main() -> None:
    """Compare the two paths; print a table and, last, one JSON line."""
    options = parse_arguments()
    if options.measure:
        print(json.dumps({"memory_mb": memory_growth_mb(prepare(options), options.measure)}))
        return
    step = prepare(options)
    tokens = sum(int(column["attention_mask"].sum()) for column in step.columns["plain"])
    size = f"{options.queries} queries x {options.passages} passages up to {options.tokens} tokens"
    print(f"{size}, {tokens} in all, on {options.device}")
    figures: dict[str, Any] = {"bench": "training_step", "device": options.device, "autocast": options.autocast, "tokens": tokens}
    figures |= compare(step, options.pairs)
    memory = {path: measured_alone(path) for path in PATHS}
    figures |= {f"ratio_memory{name}": memory[path] / memory["fast"] for path, name in AGAINST.items()} | {"memory_mb": memory}
    print("peak memory growth: " + ", ".join(f"{path} {megabytes:.0f} MB" for path, megabytes in memory.items()))
    print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 queries x 4 passages up to 64 tokens, 2 pairs")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--passages", type=int, default=8, help="passages of each query")
    parser.add_argument("--tokens", type=int, default=128, help="longest text")
    parser.add_argument("--full", action="store_true", help="every passage is --tokens long")
    parser.add_argument("--pairs", type=int, default=3, help="times each path is measured, in turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="precision of the forward passes (default: float32)")
    parser.add_argument("--model", help="starting weights, as in a recipe's [student] model (default: the quickstart's)")
    parser.add_argument("--active-dims", type=int, help="active dims per passage (default: the quickstart's initial_active_dims)")
    parser.add_argument("--threads", type=int, help="compute threads (default: torch's; 1 gives steadier ratios beside other work)")
    parser.add_argument("--measure", choices=PATHS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.queries, options.passages, options.tokens, options.pairs = 4, 4, 64, 2
    if min(options.queries, options.pairs) < 1 or options.passages < 2 or options.tokens < 4:
        parser.error("expected at least 1 query, 1 pair, 2 passages and 4 tokens")
    return options


def docstrings(at_least: int, *, shortest_words: int = 20) -> list[str]:
    """Return ``at_least`` or more docstrings of the standard library with that many words, in an order drawn from a fixed seed."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(SEED).shuffle(paths)
    texts: dict[str, None] = {}
    for path in paths:
        texts |= dict.fromkeys(text for text in _docstrings_of(path) if len(text.split()) >= shortest_words)
        if len(texts) >= 4 * at_least:  # more than asked, so that one module does not fill a small benchmark
            break
    if len(texts) < at_least:
        raise ValueError(f"{sysconfig.get_path('stdlib')}: {len(texts)} docstrings; expected {at_least}; ask for fewer texts")
    shuffled = list(texts)
    random.Random(SEED).shuffle(shuffled)
    return shuffled


def _docstrings_of(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield " ".join(text.split())


def prepare(options: argparse.Namespace) -> Step:
    """Build the recipe's untrained student, its loss, and one tokenised batch."""
    import torch
    from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SparseMarginMSELoss, SpladeLoss
    from sentence_transformers.util import batch_to_device

    from sparsekd.model_reference import resolve
    from sparsekd.recipe import load_recipe
    from sparsekd.students.building import build_student
    from sparsekd.students.calibration import calibrate_bias
    from sparsekd.students.masked_lm import has_masked_lm_head
    from sparsekd.training.losses import build_loss

    logging.getLogger("transformers").setLevel(logging.ERROR)  # a table of the weights that the head starts without
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recipe = load_recipe(RECIPE)
    changes = {"dropout": 0.0, "max_length": options.tokens, "model": options.model, "initial_active_dims": options.active_dims}
    student = recipe.student.model_copy(update={name: value for name, value in changes.items() if value is not None})
    recipe = recipe.model_copy(update={"student": student})
    folder = resolve(student.model).path
    texts = docstrings(options.queries * (options.passages + 1))
    model = build_student(student, folder)
    if student.initial_active_dims is not None and not has_masked_lm_head(folder):
        calibrate_bias(model, texts[options.queries :][: options.queries * options.passages], student.initial_active_dims)
    model = model.to(options.device).train()
    queries = [text.partition(". ")[0] for text in texts[: options.queries]]
    if options.full:
        texts = [" ".join([text] * options.tokens) for text in texts]  # cut at --tokens
    columns = [queries]
    for number in range(1, options.passages + 1):
        columns.append(texts[number * options.queries : (number + 1) * options.queries])
    features = {}
    for path in PATHS:
        with forward(model, path):
            features[path] = [batch_to_device(model.preprocess(column), model.device) for column in columns]
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randn(options.queries, options.passages, generator=generator).to(options.device)
    weights = {"document_regularizer_weight": student.lambda_passage, "query_regularizer_weight": student.lambda_query}
    losses = {
        "plain": SpladeLoss(model, SparseMarginMSELoss(model), **weights),
        "cached": CachedSpladeLoss(model, SparseMarginMSELoss(model), **weights, mini_batch_size=MINI_BATCH),
        "fast": build_loss(model, recipe).to(options.device),
    }
    autocast = getattr(torch, options.autocast) if options.autocast else None
    return Step(model, losses, autocast, features, labels)


@contextlib.contextmanager
def forward(model: Any, path: str) -> Iterator[None]:
    """Let the student use the path's modules while the context lasts."""
    from sparsekd.students.fast import fast_student
    from sparsekd.students.recomputation import recomputed

    if path != "fast":
        yield
        return
    with fast_student(model, packed=True, fused=True), recomputed(model):
        yield


def run(step: Step, path: str) -> float:
    """Take one step without an update; return its seconds."""
    import torch

    step.model.zero_grad(set_to_none=True)
    synchronize(step)
    started = time.perf_counter()
    with torch.autocast(step.model.device.type, step.autocast, enabled=step.autocast is not None):
        # The backward pass too: CachedSpladeLoss repeats its forward passes in it.
        sum(step.losses[path]([dict(column) for column in step.columns[path]], step.labels).values()).backward()
    synchronize(step)
    return time.perf_counter() - started


def synchronize(step: Step) -> None:
    """Wait for the device."""
    if step.model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def compare(step: Step, num_rounds: int) -> dict[str, Any]:
    """Time all paths in turn; compare their gradients on the first, untimed, round."""
    gradients = {}
    for path in PATHS:
        with forward(step.model, path):
            run(step, path)
        gradients[path] = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
    if gradients["plain"].keys() != gradients["fast"].keys():
        raise AssertionError("the plain and the fast path give gradients to different parameters")
    largest = max(float(gradient.abs().max()) for gradient in gradients["plain"].values())
    difference = max(float((gradients["fast"][name] - value).abs().max()) for name, value in gradients["plain"].items())
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    print(f"{'round':>5}" + "".join(f"{path + ' s':>10}" for path in PATHS))
    for number in range(num_rounds):
        for path in PATHS:
            with forward(step.model, path):
                seconds[path].append(run(step, path))
        print(f"{number + 1:>5}" + "".join(f"{seconds[path][-1]:>10.3f}" for path in PATHS), flush=True)
    figures: dict[str, Any] = {}
    for path, name in AGAINST.items():
        ratios = [other / ours for other, ours in zip(seconds[path], seconds["fast"], strict=True)]
        figures |= {f"ratio_rows{name}": statistics.median(ratios), f"range_rows{name}": [min(ratios), max(ratios)]}
        print(f"rows against {path}: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")
    print(f"largest gradient difference {difference:.2g} where the largest gradient is {largest:.2g}")
    regularizers = {"query": step.losses["fast"].query_regularizer, "passage": step.losses["fast"].document_regularizer}
    return {
        **figures,
        "seconds": {path: statistics.median(values) for path, values in seconds.items()},
        **{f"{side}_active_dims": regularizer.active_dims for side, regularizer in regularizers.items()},
        "max_grad": largest,
        "max_grad_diff": difference,
    }


def measured_alone(path: str) -> float:
    """Return the peak memory growth of one path in a fresh process, MB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["memory_mb"])


def memory_growth_mb(step: Step, path: str) -> float:
    """Return how far one step raises memory above what the student and the batch hold."""
    with forward(step.model, path):
        if step.model.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(step, path)
            return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
        with ResidentMemory() as memory:
            run(step, path)
    return (memory.peak - memory.before) / MEGABYTE


class ResidentMemory:
    """Samples this process's resident memory; getrusage would report the peak of loading the model."""

    def __enter__(self) -> ResidentMemory:
        """Start sampling every 2 ms; the arithmetic runs without the interpreter's lock."""
        import psutil

        self._process, self._done = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)


if __name__ == "__main__":
    main()
