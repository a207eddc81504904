"""Encoding passages with a SPLADE student: SparseEncoder.encode_document against encode_csr; its body with and without padding.

All run on one student (same weights, same texts), turn by turn in one process, so that a busy machine slows all; ratios are taken
round by round, above 1 where ours is better, against the library at its default batch size and at the best of several. Peak memory
growth is taken in a fresh process per path, the library at its default. Texts are docstrings of the Python that runs this. Nothing
is downloaded.

    python benchmarks/encoding.py --passages 512
    python benchmarks/encoding.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import training_step

BATCH_SIZES = (1, 4, 16, 32)
"""Of the library."""
DEFAULT_SIZE = 32
"""The library's default."""
PATHS = ("library", "ours")
SHORTEST, LONGEST = 50, 180  # tokens, so that the mean is about 100


def main() -> None:
    """Compare the paths; print a table and, last, one JSON line."""
    options = parse_arguments()
    model, texts, tokens = prepare(options)
    if options.measure:
        encode = {"library": library(model, texts, DEFAULT_SIZE), "ours": ours(model, texts)}[options.measure]
        with training_step.ResidentMemory() as memory:
            encode()
        print(json.dumps({"memory_mb": (memory.peak - memory.before) / training_step.MEGABYTE}))
        return
    print(f"{len(texts)} passages, {tokens} tokens, {tokens / len(texts):.0f} on average, on {options.device}")
    paths = {f"library {size}": library(model, texts, size) for size in BATCH_SIZES} | {"ours": ours(model, texts)}
    first = timed(paths)
    for name, value in first.items():
        print(f"{name:>12} {value:7.2f} s {tokens / value:7.0f} tokens/s")
    best, default = min((name for name in paths if name != "ours"), key=lambda name: first[name]), f"library {DEFAULT_SIZE}"
    rounds = [timed({name: paths[name] for name in (default, best, "ours")}) for _ in range(options.pairs)]
    figures: dict[str, Any] = {"bench": "encoding", "device": options.device, "passages": len(texts), "tokens": tokens}
    for key, name in (("default", default), ("best", best)):
        ratios = [seconds[name] / seconds["ours"] for seconds in rounds]
        print(f"ours against {name}: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")
        figures |= {f"ratio_{key}": statistics.median(ratios), f"ratio_{key}_min": min(ratios), f"ratio_{key}_max": max(ratios)}
    figures |= {
        "best_batch_size": int(best.split()[1]),
        "tokens_per_second": {name: tokens / statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]},
        "max_difference": largest_difference(model, texts),
    }
    figures |= {"share_of_peak": share_of_peak(model, figures["tokens_per_second"]["ours"])}
    figures |= {"share_of_products": share_of_products(ours(model, texts))}
    print(f"ours spends {figures['share_of_products']:.0%} of its time in matrix products")
    print(f"ours multiplies at {figures['share_of_peak']:.0%} of what matrix products of its shapes reach alone")
    figures |= {f"ratio_body_{name}": ratio for name, ratio in body_ratios(model, texts, options.pairs).items()}
    figures["memory_mb"] = {path: measured_alone(path, model) for path in PATHS}
    print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 passages, 3 pairs")
    parser.add_argument("--passages", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5, help="times each path is measured, in turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--active-dims", type=int, default=200, help="active dims per passage")
    parser.add_argument("--threads", type=int, help="compute threads (default: torch's)")
    parser.add_argument("--measure", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--bias", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.passages, options.pairs = 64, 3
    if options.passages < 1 or options.pairs < 1:
        parser.error("expected at least 1 passage and 1 pair")
    return options


def prepare(options: argparse.Namespace) -> tuple[Any, list[str], int]:
    """Build the quickstart recipe's untrained student; return it, passages and their tokens."""
    import torch

    from sparsekd.model_reference import resolve
    from sparsekd.recipe import load_recipe
    from sparsekd.students.building import build_student
    from sparsekd.students.calibration import calibrate_bias
    from sparsekd.students.fast import decoder_of

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    student = load_recipe(training_step.RECIPE).student.model_copy(update={"max_length": 256})
    model = build_student(student, resolve(student.model).path).to(options.device).eval()
    texts = training_step.docstrings(4 * options.passages, shortest_words=30)
    lengths = [len(ids) for ids in model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    kept = [(text, length) for text, length in zip(texts, lengths, strict=True) if SHORTEST <= length <= LONGEST]
    if len(kept) < options.passages:
        raise ValueError(f"{len(kept)} docstrings of {SHORTEST} to {LONGEST} tokens; expected {options.passages}; ask for fewer")
    passages = [text for text, _ in kept[: options.passages]]
    if options.bias is None:
        calibrate_bias(model, passages[:64], options.active_dims)
    else:  # where memory is measured: calibration would leave the process more than it needs
        decoder_of(model).bias.data.copy_(torch.load(options.bias))
    return model, passages, sum(length for _, length in kept[: options.passages])


def library(model: Any, texts: list[str], batch_size: int) -> Callable[[], Any]:
    """Return what encodes by sentence-transformers' own method, in its cheapest form: sparse tensors, moved to the CPU."""
    return lambda: model.encode_document(texts, batch_size=batch_size, show_progress_bar=False, save_to_cpu=True)


def ours(model: Any, texts: list[str]) -> Callable[[], Any]:
    """Return what encodes by ``encode_csr`` with a recipe's own settings."""
    from sparsekd.evaluation.student import encode_csr
    from sparsekd.recipe import Run

    return lambda: encode_csr(model, texts, role="passage", batch_tokens=Run().batch_tokens, fused=True, packed=True)


def timed(paths: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Run each once, in turn; return seconds by name."""
    seconds = {}
    for name, path in paths.items():
        started = time.perf_counter()
        path()
        seconds[name] = time.perf_counter() - started
    return seconds


def largest_difference(model: Any, texts: list[str]) -> float:
    """Compare both paths' vectors of some passages."""
    few = texts[:16]
    return float(abs(ours(model, few)().toarray() - library(model, few, 4)().to_dense().numpy()).max())


def share_of_peak(model: Any, tokens_per_second: float) -> float:
    """Return the rate of the linear layers' multiplications while encoding, over that of bare products of the same shapes.

    What is left, attention, norms, the maximum over tokens and tokenising, is all that any other code with the same products could
    save.
    """
    import torch

    config = model[0].model.config
    width, wide, terms = config.hidden_size, config.intermediate_size, config.vocab_size
    # (inputs, outputs) of each product of a token: four of attention, two of the feed-forward, of each layer; the two of the head.
    shapes = config.num_hidden_layers * [(width, width)] * 4 + config.num_hidden_layers * [(width, wide), (wide, width)]
    shapes += [(width, width), (width, terms)]
    tokens, device = 1024, model.device
    operands = {
        (rows, columns): [torch.ones(size, device=device) for size in ((tokens, rows), (rows, columns), (tokens, columns))]
        for rows, columns in set(shapes)
    }
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for shape in shapes:
            left, right, product = operands[shape]
            torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / tokens)
    return tokens_per_second * min(seconds)


def share_of_products(encode: Callable[[], Any]) -> float:
    """Return the share of matrix products in what operators take of ``encode``'s time, by torch's profiler."""
    import torch

    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        encode()
    spent = {event.key: event.self_cpu_time_total + event.self_device_time_total for event in profile.key_averages()}
    return sum(spent.get(name, 0) for name in ("aten::mm", "aten::addmm", "aten::bmm")) / sum(spent.values())


def body_ratios(model: Any, texts: list[str], num_pairs: int) -> dict[str, float]:
    """Return padded / packed time of the body alone on 32 passages in the order given: forward, and forward and backward."""
    import torch

    from sparsekd.packed_body import packed

    body, few = model[0].model.base_model, texts[:32]

    def step(backward: bool) -> float:
        features = {name: value for name, value in model.preprocess(few).items() if name != "modality"}
        features = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in features.items()}
        body.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            hidden = body(**features).last_hidden_state
            if backward:
                hidden.square().sum().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def with_padding(_: Any) -> Iterator[None]:
        yield

    ratios: dict[str, list[float]] = {"forward": [], "step": []}
    for _ in range(num_pairs + 1):
        for name, values in ratios.items():
            pair = []
            for context in (with_padding, packed):
                with context(model):
                    pair.append(step(name == "step"))
            values.append(pair[0] / pair[1])
    return {name: statistics.median(values[1:]) for name, values in ratios.items()}


def measured_alone(path: str, model: Any) -> float:
    """Return the peak memory growth of one path in a fresh process, MB."""
    import torch

    from sparsekd.students.fast import decoder_of

    with tempfile.TemporaryDirectory() as folder:
        bias = Path(folder) / "bias.pt"
        torch.save(decoder_of(model).bias.detach(), bias)
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", path, "--bias", str(bias)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["memory_mb"])


if __name__ == "__main__":
    main()
