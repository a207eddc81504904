"""A teacher, a miner or an import that cannot be had: exit 2, one line that says why, and no table, by the real stage script.

All cases run in one process, for the imports; each is a call of the script's own stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# Carries the stage out for each case of argv[2] and prints exit code, stdout and stderr by name.
PROGRAM = """
import contextlib, io, json, runpy, sys
from sparsekd.stage import run_stage
make, said = runpy.run_path(sys.argv[1])["make"], {}
for name, arguments in json.loads(sys.argv[2]).items():
    if name == "faiss is missing":
        sys.modules["faiss"] = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        code = run_stage("", make, ["candidates", "tables"], arguments)
    said[name] = [code, out.getvalue(), log.getvalue()]
print(json.dumps(said))
"""
FUNCTIONS = """
def constant(pairs):
    return [1] * len(pairs)
def not_a_number(pairs):
    return [float("nan")] * len(pairs)
def infinite(pairs):
    return [float("inf")] * len(pairs)
def short(pairs):
    return [0.0] * (len(pairs) - 1)
"""
CROSS, DECODER, T5, LATE = ("cross-encoder", "causal-lm", "seq2seq-lm", "late-interaction")
# The teacher's section without its name, and what is said of it.
TEACHERS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{kind} without weights": ({"kind": kind, "model": f"{kind}-empty"}, "no *.safetensors weights among")
        for kind in ("dense", "sparse", CROSS, DECODER, T5, LATE)
    },
    **{
        f"{kind} with only pickled weights": ({"kind": kind, "model": f"{kind}-pickled"}, "is a pickle and there are no")
        for kind in ("dense", "sparse", CROSS, DECODER, T5, LATE)
    },
    "cross-encoder with a random head": (
        {"kind": CROSS, "model": "headless"},
        "lacks 2 weights (classifier.bias, classifier.weight)",
    ),
    "causal-lm with a random output layer": (
        {"kind": DECODER, "model": "headless-decoder", "max_length": 1024},
        "lacks 1 weights (lm_head.weight), which would be drawn at random",
    ),
    "causal-lm with a classification head": (
        {"kind": DECODER, "model": "classifying-decoder", "max_length": 1024},
        "names Qwen3ForSequenceClassification; expected a model ...ForCausalLM",
    ),
    "cross-encoder of two labels": ({"kind": CROSS, "model": "two-labels"}, "has 2 labels; expected a cross-encoder with one"),
    "causal-lm of a prompt without room": (
        {"kind": DECODER, "model": DECODER, "max_length": 60},
        "tokens and leave no room for a passage (query ",
    ),
    "cross-encoder of queries without room": ({"kind": CROSS, "model": CROSS, "max_length": 5}, "leave no room for a passage"),
    "cross-encoder of weights that are no number": ({"kind": CROSS, "model": "nan"}, "scores are not finite (first: pair "),
    "function of one score for all": (
        {"kind": "callable", "function": "functions:constant", "identity": {"v": "1"}},
        "pairs have the score 1 (callable, functions:constant v=1)",
    ),
    **{
        f"function that returns {name}": (
            {"kind": "callable", "function": f"functions:{name}", "identity": {"v": "1"}},
            said,
        )
        for name, said in (
            ("not_a_number", "scores are not finite (first: pair 0, "),
            ("infinite", ", inf); expected a finite float32 from functions:infinite for each"),
            ("short", "returned an array of shape ("),
        )
    },
    "function that is not there": (
        {"kind": "callable", "function": "functions:absent", "identity": {"v": "1"}},
        "functions.py has no function absent; expected module:function",
    ),
    "imported scores that lack a pair": (
        {"kind": "file", "imported": "nothing"},
        "pairs have no score among those imported as --name nothing",
    ),
}
BM25 = {"name": "it", "kind": "bm25"}
# The miner's section, beside a teacher that is right, and what is said of it.
MINERS: dict[str, tuple[dict[str, Any], str]] = {
    "a run file of an unknown passage": (
        {"kind": "run", "path": "passage.run", "quota": 3},
        "passage.run:1: found doc_id 'nowhere', expected an _id of ",
    ),
    "a run file of an unknown query": (
        {"kind": "run", "path": "query.run", "quota": 3},
        "query.run:1: found query_id 'nobody', expected an _id of ",
    ),
    "an index over too few vectors": (
        {"kind": "dense", "model": "dense", "index": "ivf-flat", "quota": 3},
        "passages are too few to train it, it needs 2,496",
    ),
    "faiss is missing": (
        {"kind": "dense", "model": "dense", "quota": 3},
        "dense search needs FAISS, but import faiss failed",
    ),
}
# Teachers, miners and what is said, by name; the last case leaves faiss missing.
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    **{name: ([{"name": "it", **section}], [{"kind": "bm25", "quota": 3}], said) for name, (section, said) in TEACHERS.items()},
    "two teachers of one name": (
        [BM25, {**BM25, "k1": 1.2}],
        [{"kind": "bm25", "quota": 3}],
        "[[teachers]] name 'it' is used twice; each teacher needs its own",
    ),
    **{name: ([BM25], [section], said) for name, (section, said) in MINERS.items()},
}


@pytest.fixture(scope="module")
def workplace(
    make_workplace: Callable[..., Any],
    save_tiny_model: Callable[..., Path],
    save_tiny_decoder: Callable[..., Path],
    tiny_encoder_folder: Path,
    tiny_splade_folder: Path,
    tiny_headless_folder: Path,
    tiny_cross_encoder_folder: Path,
    tiny_decoder_folder: Path,
    tiny_t5_folder: Path,
    tiny_multi_vector_folder: Path,
) -> Any:
    """A recipe over the sample collection, and beside it the models and files that the cases name."""
    from safetensors.numpy import load_file, save_file

    place = make_workplace()
    folders = {
        "dense": tiny_encoder_folder,
        "sparse": tiny_splade_folder,
        CROSS: tiny_cross_encoder_folder,
        DECODER: tiny_decoder_folder,
        T5: tiny_t5_folder,
        LATE: tiny_multi_vector_folder,
    }
    for kind, folder in folders.items():
        shutil.copytree(folder, place.folder / kind)
        for damage in ("empty", "pickled"):
            damaged = Path(shutil.copytree(folder, place.folder / f"{kind}-{damage}"))
            for path in sorted(damaged.rglob("model.safetensors")):
                path.unlink() if damage == "empty" else path.rename(path.with_name("pytorch_model.bin"))
    shutil.copytree(tiny_headless_folder, place.folder / "headless")
    save_tiny_model("BertForSequenceClassification", place.folder / "two-labels", num_labels=2)
    save_tiny_decoder(place.folder / "classifying-decoder", "Qwen3ForSequenceClassification", pad_token_id=0)
    headless = save_tiny_decoder(place.folder / "headless-decoder", tie_word_embeddings=False) / "model.safetensors"
    save_file({name: array for name, array in load_file(headless).items() if name != "lm_head.weight"}, headless, {"format": "pt"})
    broken = Path(shutil.copytree(tiny_cross_encoder_folder, place.folder / "nan")) / "model.safetensors"
    weights = load_file(broken)
    weights["classifier.bias"][:] = np.nan
    save_file(weights, broken, {"format": "pt"})
    (place.folder / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    (place.folder / "passage.run").write_text("q01 Q0 nowhere 1 2.5 them\n", encoding="utf-8")
    (place.folder / "query.run").write_text("nobody Q0 p01 1 2.5 them\n", encoding="utf-8")
    return place


def recipe_of(workplace: Any, teachers: list[dict[str, Any]], miners: list[dict[str, Any]]) -> str:
    """A recipe like the workplace's with these teachers and miners."""
    text = (workplace.folder / "recipe.toml").read_text(encoding="utf-8")
    head, tail = text.split("[[mining.miners]]", 1)[0], text[text.index("[labels]") :]
    return (
        head
        + "".join(table("mining.miners", each) for each in miners)
        + "".join(table("teachers", each) for each in teachers)
        + tail
    )


def table(place: str, section: dict[str, Any]) -> str:
    """A TOML table of a list; JSON writes strings and numbers alike."""
    lines = [f"[[{place}]]\n"]
    for key, value in section.items():
        shown = ", ".join(f"{name} = {json.dumps(each)}" for name, each in value.items()) if isinstance(value, dict) else ""
        lines.append(f"{key} = {{ {shown} }}\n" if shown else f"{key} = {json.dumps(value)}\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def said(workplace: Any, run_cases: Any) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each case."""
    arguments = {}
    for number, (name, (teachers, miners, _)) in enumerate(CASES.items()):
        (workplace.folder / f"{number}.toml").write_text(recipe_of(workplace, teachers, miners), encoding="utf-8")
        arguments[name] = [f"{number}.toml"]
    return run_cases(PROGRAM, "teacher_scores", arguments, workplace.folder)


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_had_exits_2_says_why_and_publishes_nothing(
    said: dict[str, tuple[int, str, str]], workplace: Any, name: str
) -> None:
    code, stdout, log = said[name]

    assert code == 2, log
    assert stdout == ""
    assert "Traceback" not in log
    *_, last = log.splitlines()
    assert last.startswith("error: ")
    assert CASES[name][2] in last
    assert not (workplace.cache / "tables").exists()
