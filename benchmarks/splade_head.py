"""The SPLADE head alone, forward and backward: sentence-transformers' own (logits, relu, log1p, maximum) against the fused one.

Both take the same hidden states, embeddings and bias, turn by turn in one process, so that a busy machine slows both; ratios are
taken pair by pair, above 1 where ours is better: at about 1 % of the terms active ("sparse") and with every term active ("dense").
The library's head takes texts padded to 128 tokens, ours without padding; texts are as long as docstrings of the Python that runs
this, cut at 128 tokens, or with --full all 128. Peak memory growth, gradients included, is taken in a fresh process per head:
resident memory on a CPU, torch's allocations on a GPU.

Hidden states are random. Inputs are multiples of 1/16 and 1/128, whose products float32 adds without rounding in any order: tokens
that tie do so in both heads, and their gradients can be compared to the last digits.

    python benchmarks/splade_head.py
    python benchmarks/splade_head.py --full
    python benchmarks/splade_head.py --quick
    python benchmarks/splade_head.py --device cuda --autocast bfloat16 --vocabulary 250002 --pairs 20
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training_step import MEGABYTE, ResidentMemory, docstrings

HEADS = ("eager", "fused")
SHARES = {"sparse": 0.01, "dense": 1.0}
Head = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Shape:
    """What is multiplied; ``lengths`` says how many of its ``tokens`` each text fills."""

    lengths: tuple[int, ...]
    tokens: int = 128
    width: int = 384
    vocabulary: int = 30_522


@dataclass(frozen=True)
class Inputs:
    """Padded hidden states and which of them are tokens, embeddings, bias and the gradient from above, on one device."""

    shape: Shape
    hidden: Any
    mask: Any
    embeddings: Any
    bias: Any
    upstream: Any


def main() -> None:
    """Compare the heads; print a table and, last, one JSON line."""
    options = parse_arguments()
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    lengths = (options.tokens,) * options.texts if options.full else real_lengths(options.texts, options.tokens)
    shape = Shape(lengths, options.tokens, options.width, options.vocabulary)
    if options.measure:
        name, share = options.measure.split(":")
        print(json.dumps({"memory_mb": memory_growth_mb(draw(shape, SHARES[share], options.device), name, options.autocast)}))
        return
    size = f"{options.texts} texts of {options.tokens} tokens, {sum(lengths)} not padding, x {options.width} x {options.vocabulary}"
    print(f"{size} terms, {options.device}, autocast {options.autocast}")
    figures: dict[str, Any] = {"bench": "splade_head", "full": options.full, "tokens": sum(lengths)}
    details: dict[str, Any] = {}
    differences = []
    for name, share in SHARES.items():
        found = compare(draw(shape, share, options.device), options.pairs, options.autocast)
        memory = {head: measured_alone(f"{head}:{name}") for head in HEADS}
        figures |= {f"ratio_{name}": found["ratio"], f"ratio_memory_{name}": memory["eager"] / memory["fused"]}
        details[name] = {**found, "memory_mb": memory}
        differences.append(found["max_grad_diff"])
        speed = f"{found['ratio']:.2f} times the speed ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
        growth = f"peak memory growth {memory['eager']:.0f} MB and {memory['fused']:.0f} MB"
        print(
            f"{name}, {found['active_share']:.1%} active: {speed}, {growth}, gradients within {found['max_grad_diff']:.2g}",
            flush=True,
        )
    print(json.dumps({**figures, "max_grad_diff": max(differences), **details}))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 texts, 2 pairs; memory ratios are lower than at 64 texts")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="longest text")
    parser.add_argument("--full", action="store_true", help="every text fills its tokens")
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--vocabulary", type=int, default=Shape.vocabulary)
    parser.add_argument("--pairs", type=int, default=3, help="times each head is measured, in turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="default: float32")
    parser.add_argument("--threads", type=int, help="compute threads (default: torch's; 1 gives steadier ratios beside other work)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.texts, options.pairs = 16, 2
    if min(options.texts, options.tokens, options.width, options.vocabulary, options.pairs) < 1:
        parser.error("expected at least 1 text, token, dimension, term and pair")
    return options


def real_lengths(count: int, longest: int) -> tuple[int, ...]:
    """Return the lengths of ``count`` docstrings: a token per mark, word or 6 letters of one (near WordPiece's), and 2 more."""
    texts = docstrings(count)[:count]
    pieces = [sum(-(-len(word) // 6) for word in re.findall(r"\w+|[^\w\s]", text)) for text in texts]
    return tuple(min(number + 2, longest) for number in pieces)


def draw(shape: Shape, share: float, device: str) -> Inputs:
    """Return random inputs of which about ``share`` of the terms is active, equally many of every vocabulary and width."""
    import torch

    generator = torch.Generator().manual_seed(0)
    texts = len(shape.lengths)
    hidden = (torch.randn(texts, shape.tokens, shape.width, generator=generator) * 16).round_() / 16
    embeddings = (torch.randn(shape.vocabulary, shape.width, generator=generator) * 0.05 * 128).round_() / 128
    upstream = torch.randn(texts, shape.vocabulary, generator=generator) / texts
    mask = torch.arange(shape.tokens) < torch.tensor(shape.lengths).unsqueeze(1)
    maxima = (
        torch.cat([(hidden[text, mask[text]] @ embeddings[:8192].T).amax(dim=0) for text in range(min(texts, 16))]).sort().values
    )
    # With every term active the shift clears the smallest maximum of the sample by 1.
    shift = 1.0 - float(maxima[0]) if share == 1.0 else -float(maxima[int((1 - share) * (len(maxima) - 1))])
    bias = torch.full((shape.vocabulary,), shift)
    return Inputs(shape, *(tensor.to(device) for tensor in (hidden, mask, embeddings, bias, upstream)))


def head_of(name: str, inputs: Inputs) -> tuple[Head, Any]:
    """Return the head of that name and the hidden states that it takes."""
    import torch
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    from sparsekd.students.fused_head import splade_max

    pooling, mask = SpladePooling().train(), inputs.mask.long()

    def eager(hidden: Any, embeddings: Any, bias: Any) -> Any:
        logits = torch.nn.functional.linear(hidden, embeddings, bias)
        return pooling({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"]

    def fused(hidden: Any, embeddings: Any, bias: Any) -> Any:
        return splade_max(hidden, embeddings, bias, inputs.shape.lengths)

    return (eager, inputs.hidden) if name == "eager" else (fused, inputs.hidden[inputs.mask])


def step(head: tuple[Head, Any], inputs: Inputs, autocast: str | None) -> list[Any]:
    """Return the vectors and the gradients of hidden states, embeddings and bias."""
    import torch

    compute, hidden = head
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, inputs.embeddings, inputs.bias)]
    dtype = getattr(torch, autocast) if autocast else None
    with torch.autocast(hidden.device.type, dtype, enabled=dtype is not None):
        vectors = compute(*leaves)
    vectors.backward(inputs.upstream.to(vectors.dtype))
    return [vectors.detach(), *(leaf.grad for leaf in leaves)]


def timed(head: tuple[Head, Any], inputs: Inputs, autocast: str | None) -> float:
    """Return the seconds of one step."""
    synchronize(inputs)
    started = time.perf_counter()
    step(head, inputs, autocast)
    synchronize(inputs)
    return time.perf_counter() - started


def synchronize(inputs: Inputs) -> None:
    """Wait for the device."""
    if inputs.hidden.is_cuda:
        import torch

        torch.cuda.synchronize()


def compare(inputs: Inputs, num_pairs: int, autocast: str | None) -> dict[str, Any]:
    """Time both heads in turn; compare their results on the first, untimed, round."""
    heads = {name: head_of(name, inputs) for name in HEADS}
    expected, found = (step(head, inputs, autocast) for head in heads.values())
    expected[1] = expected[1][inputs.mask]
    differences = [float((a.float() - b.float()).abs().max()) for a, b in zip(expected, found, strict=True)]
    largest = max(float(gradient.abs().max()) for gradient in expected[1:])
    active_share = float((found[0] > 0).float().mean())
    del expected, found
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    for _ in range(num_pairs):
        for name, head in heads.items():
            seconds[name].append(timed(head, inputs, autocast))
    ratios = [eager / fused for eager, fused in zip(seconds["eager"], seconds["fused"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "active_share": active_share,
        "max_vector_diff": differences[0],
        "max_grad_diff": max(differences[1:]),
        "max_grad": largest,
    }


def measured_alone(what: str) -> float:
    """Return the peak memory growth of one head at one share in a fresh process, MB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["memory_mb"])


def memory_growth_mb(inputs: Inputs, name: str, autocast: str | None) -> float:
    """Return how far one step raises memory above what its inputs hold."""
    small = draw(Shape((3, 4), 4, 16, 64), 1.0, inputs.hidden.device.type)
    step(head_of(name, small), small, autocast)  # libraries are loaded on first use
    head = head_of(name, inputs)
    if inputs.hidden.is_cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(head, inputs, autocast)
        return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
    with ResidentMemory() as memory:
        step(head, inputs, autocast)
    return (memory.peak - memory.before) / MEGABYTE


if __name__ == "__main__":
    main()
