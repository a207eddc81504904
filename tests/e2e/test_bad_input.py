"""What a recipe can ask for and a student, a table or a machine cannot give: exit 2 and the reason, by the real stage script.

All cases run in one process, for the imports; each is a call of the script's own stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sparsekd.artifact import key_of, publish, read_manifest
from sparsekd.experiment import Experiment, score_table
from sparsekd.labels.contract import KIND
from sparsekd.mining.shards import write_shards
from sparsekd.plan import Plan
from sparsekd.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to bound memory")]

# Carries the stage out for each case of argv[2] and prints exit code, stdout and stderr by name; the last may have 600 MB more.
PROGRAM = """
import contextlib, io, json, resource, runpy, sys
from pathlib import Path
from sparsekd.stage import run_stage
make, said = runpy.run_path(sys.argv[1])["make"], {}
for name, arguments in json.loads(sys.argv[2]).items():
    if name.startswith("memory"):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 600_000_000, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        code = run_stage("", make, [], arguments)
    said[name] = [code, out.getvalue(), log.getvalue()]
print(json.dumps(said))
"""
EMBEDDING = ["labels.kind=embedding", "training.loss=SparseMSELoss", "teachers.tiny.kind=sparse", "teachers.tiny.model=splade"]
# Overrides of the workplace's recipe, and what is said of them.
CASES: dict[str, tuple[list[str], str]] = {
    "labels of another kind than the loss's": (
        ["labels.kind=margin"],
        '[training] loss = "SparseDistillKLDivLoss" needs [labels] kind = "score_list", not "margin"',
    ),
    "rows of another width than the loss's": (
        ["labels.kind=none", "training.loss=SparseTripletLoss"],
        '[training] loss = "SparseTripletLoss" takes rows of one negative, these have 3',
    ),
    "a teacher of vectors with another vocabulary": (
        [*EMBEDDING, "student.model=swapped"],
        "the vocabulary of teacher 'tiny' (",
    ),
    "a student without a tokenizer": (["student.model=mute"], "no tokenizer in it (none of tokenizer.json, "),
    "a student with an untied head": (["student.model=untied"], "its output layer is not tied to its word embeddings"),
    "more layers than the student has": (["student.num_layers=3"], "[student] num_layers = 3: "),
    "a budget above the vocabulary": (
        ["student.budget.passage_active_dims=100000"],
        "[student.budget] passage_active_dims = 100000: the vocabulary has ",
    ),
    "a budget of nothing": (
        ["student.budget.query_active_dims=0"],
        "[student.budget] query_active_dims = 0: input should be greater than 0",
    ),
    "a prompt for a column that is not there": (
        ["student.positive_prompt=x"],
        "[student] positive_prompt is not a known key; ",
    ),
    "two prompts for one column": (
        [*EMBEDDING, "student.model=splade", "student.query_prompt=q"],
        "[student] query_prompt = 'q' and passage_prompt = '' beside [labels] kind = \"embedding\": queries and passages stand in ",
    ),
    "two routes for one column": (
        [*EMBEDDING, "student.model=splade", "student.expansion=passage"],
        '[student] expansion = "passage" beside [labels] kind = "embedding": queries and passages stand in one column',
    ),
    "labels on different scales in one table": (["labels.num_negatives=2"], "labels on different scales in one table"),
    "a resumption into another experiment's folder": (
        ["training.learning_rate=2e-3"],
        "checkpoint-2: belongs to experiment another, expected ",
    ),
    "memory that does not suffice": (
        ["student.model=wide", "run.fused_head=false", "run.packed=false", "training.batch_size=12"],
        "[training] batch_size = 12: a step needs about ",
    ),
}


@pytest.fixture(scope="module")
def workplace(
    make_workplace: Callable[..., Any], save_tiny_model: Callable[..., Path], tiny_masked_lm_folder: Path, tiny_splade_folder: Path
) -> Any:
    """A recipe with its table, and beside it what the cases name."""
    place = make_workplace()
    recipe = place.folder / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("initial_active_dims = 60\n", ""), encoding="utf-8")
    shutil.copytree(tiny_splade_folder, place.folder / "splade")
    for path in shutil.copytree(tiny_masked_lm_folder, place.folder / "mute").glob("tokenizer*"):
        path.unlink()
    swapped = shutil.copytree(tiny_masked_lm_folder, place.folder / "swapped") / "tokenizer.json"
    text = swapped.read_text(encoding="utf-8").replace('"cat":', '"@":').replace('"dog":', '"cat":').replace('"@":', '"dog":')
    swapped.write_text(text, encoding="utf-8")
    save_tiny_model("BertForMaskedLM", place.folder / "untied", tie_word_embeddings=False)
    save_tiny_model("BertModel", place.folder / "wide", vocab_size=30_522)
    put_on_two_scales(experiment_of(recipe, CASES["labels on different scales in one table"][0]))
    leave_a_checkpoint(experiment_of(recipe, CASES["a resumption into another experiment's folder"][0]))
    return place


def experiment_of(recipe: Path, overrides: list[str]) -> Experiment:
    return Experiment(Plan(load_recipe(recipe, overrides)))


def put_on_two_scales(experiment: Experiment) -> None:
    """Publish the table again as two shards, of which the second says another calibration."""
    folder = score_table(experiment).artifact.folder
    manifest = read_manifest(folder)
    with pa.ipc.open_stream(next(folder.glob("*.arrow"))) as reader:
        rows = reader.read_all()
    other = {**rows.schema.metadata, b"sparsekd.calibration": b'{"kind": "zscore", "scale": 1.0}'}
    shutil.rmtree(folder)
    published = {name: manifest[name] for name in ("counts", "summary", "teachers")}
    with publish(folder, kind=KIND, fields=manifest["fields"], extra=published) as temporary:
        published["shards"] = write_shards(temporary, KIND, [rows[:4], rows[4:].replace_schema_metadata(other)], 2)


def leave_a_checkpoint(experiment: Experiment) -> None:
    """Have two steps of another experiment in the folder where this one's checkpoints go."""
    from sparsekd.training.fit import train

    folder = experiment.plan.folder("students", experiment.plan.student_fields)
    training = experiment.recipe.training.model_copy(update={"max_steps": 2})
    train(
        experiment.recipe.model_copy(update={"training": training}),
        score_table(experiment),
        experiment.collection,
        work_folder=folder.with_name(f"{key_of(experiment.plan.student_fields)}.work"),
        key="another",
    )


@pytest.fixture(scope="module")
def said(workplace: Any, run_cases: Any) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each case."""
    arguments = {
        name: ["recipe.toml", *(argument for override in overrides for argument in ("--set", override))]
        for name, (overrides, _) in CASES.items()
    }
    return run_cases(PROGRAM, "train_student", arguments, workplace.folder)


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_had_exits_2_and_says_why(said: dict[str, tuple[int, str, str]], name: str) -> None:
    code, stdout, log = said[name]

    assert code == 2, log
    assert stdout == ""
    assert "Traceback" not in log
    *_, last = log.splitlines()
    assert last.startswith("error: ")
    assert CASES[name][1] in last
    assert not name.startswith("memory") or " is the largest that fits" in last
