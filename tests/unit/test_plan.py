"""Which change of recipe, collection or model changes which of the four keys. Imports no torch.

Models here are folders with the files that identities digest; nothing loads them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsekd.artifact import IntegrityError, key_of, publish
from sparsekd.labels.building import table_fields
from sparsekd.plan import Plan
from sparsekd.recipe import Evaluation, Labels, Run, SparseMiner, Student, Training, load_recipe

KINDS = ("candidates", "tables", "students", "evaluations")
ALL = set(KINDS)
FROM_TABLE = ALL - {"candidates"}
FROM_STUDENT = {"students", "evaluations"}
EVALUATION = {"evaluations"}
NONE: set[str] = set()

RECIPE = """
[collection]
path = "collection"
[[mining.miners]]
kind = "bm25"
quota = 4
[[mining.miners]]
kind = "dense"
model = "models/miner"
quota = 4
[[teachers]]
name = "judge"
kind = "cross-encoder"
model = "models/judge"
[student]
model = "models/student"
"""
SECOND_TEACHER = '[[teachers]]\nname = "second"\nkind = "dense"\nmodel = "models/miner"\n'

FILE_TEACHER = '[[teachers]]\nname = "them"\nkind = "file"\nimported = "ensemble"\n'
LEXICAL_TEACHER = '[[teachers]]\nname = "lexical"\nkind = "bm25"\n'

# (what is set before, what is changed, the kinds of artifact whose key changes)
SETTINGS: list[tuple[list[str], str, set[str]]] = [
    ([], "collection.max_passages=10", ALL),
    ([], "collection.max_train_queries=5", ALL),
    ([], "mining.miners.bm25.quota=5", ALL),
    ([], "mining.miners.bm25.depth=50", ALL),
    ([], "mining.miners.bm25.skip=1", ALL),
    ([], "mining.miners.bm25.k1=1.2", ALL),
    ([], "mining.miners.bm25.b=0.5", ALL),
    ([], "mining.miners.dense.max_length=64", ALL),
    ([], "mining.miners.dense.query_prompt='q: '", ALL),
    ([], "mining.miners.dense.dtype=bfloat16", ALL),
    ([], "mining.miners.dense.model=models/other", ALL),
    ([], "mining.miners.dense.index=hnsw", ALL),
    ([], "mining.max_positives=1", ALL),
    ([], "mining.filter.absolute_margin=0.1", ALL),
    ([], "mining.filter.by=judge", NONE),  # without a margin nothing is filtered
    (["mining.filter.by=judge"], "mining.filter.relative_margin=0.1", FROM_TABLE),
    (["mining.filter.by=judge"], "mining.filter.percentile=95.0", FROM_TABLE),
    (["mining.filter.by=judge"], "mining.filter.min_positive=1.0", FROM_TABLE),
    ([], "mining.filter.percentile=95.0", ALL),
    ([], "mining.filter.near_duplicate=0.9", ALL),
    ([], "teachers.judge.model=models/other", FROM_TABLE),
    ([], "teachers.judge.max_length=64", FROM_TABLE),
    ([], "teachers.judge.passage_prompt='p: '", FROM_TABLE),
    ([], "teachers.judge.dtype=float16", FROM_TABLE),
    ([], "teachers.judge.gate=false", NONE),
    ([], "teachers.judge.name=referee", EVALUATION),  # metrics are listed by name
    ([], "labels.num_negatives=3", FROM_TABLE),
    ([], "labels.selection=random", FROM_TABLE),
    ([], "labels.seed=1", NONE),  # "top" draws nothing
    (["labels.selection=random"], "labels.seed=1", FROM_TABLE),
    ([], "labels.selection=stratified", FROM_TABLE),
    (["labels.selection=stratified"], "labels.seed=1", FROM_TABLE),
    (["labels.selection=stratified"], "labels.selection_teacher=judge", NONE),  # the only teacher
    ([], "labels.promote_above=3.5", FROM_TABLE),
    (["labels.promote_above=3.5"], "labels.selection_teacher=judge", NONE),
    ([], "labels.selection_teacher=judge", NONE),  # "top" reads no score
    ([], "labels.calibration.kind=zscore", FROM_TABLE),
    ([], "labels.calibration.scale=30.0", NONE),  # "raw" has no scale
    (["labels.calibration.kind=minmax"], "labels.calibration.scale=30.0", FROM_TABLE),
    (["labels.calibration.kind=affine"], "labels.calibration.mean=3.0", FROM_TABLE),
    ([], "labels.calibrations.judge.kind=zscore", FROM_TABLE),
    (["labels.calibration.kind=zscore"], "labels.calibrations.judge.kind=zscore", NONE),
    (["labels.calibration.kind=affine"], "labels.calibration.reference=judge", FROM_TABLE),
    ([], "labels.calibration.kind=rank", FROM_TABLE),
    ([], "labels.calibration.kind=percentile", FROM_TABLE),
    ([], "labels.rescale.kind=zscore", FROM_TABLE),
    ([], "labels.rescale.scale=9.0", NONE),  # "raw" has no scale
    ([], "labels.combine=sum", NONE),  # of one teacher of weight 1
    (["labels.weights={judge = 2.0}"], "labels.combine=sum", FROM_TABLE),
    ([], "labels.allow_quarantine=3", NONE),  # nothing is in quarantine
    ([], "labels.missing=renormalize", NONE),  # among one teacher nothing is shared out
    ([], "labels.weights={judge = 2.0}", NONE),  # one teacher's share is the whole
    (["training.loss=SparseMarginMSELoss"], "labels.kind=margin", FROM_TABLE),
    ([], "labels.layout=triplets", FROM_TABLE),
    (["labels.num_negatives=1"], "labels.layout=triplets", NONE),  # a row is a triplet already
    ([], "student.kind=csr", FROM_STUDENT),
    (["student.kind=csr"], "student.hidden_dim=256", FROM_STUDENT),
    (["student.kind=csr"], "student.k=32", FROM_STUDENT),
    (["student.kind=csr"], "student.k_aux=64", FROM_STUDENT),
    (["student.kind=csr"], "student.freeze_body=true", FROM_STUDENT),
    (["student.kind=csr"], "training.csr_beta=0.2", FROM_STUDENT),
    (["student.kind=csr"], "training.csr_gamma=0.5", FROM_STUDENT),
    ([], "training.csr_gamma=0.5", NONE),
    ([], "student.residual_scale=0.5", FROM_STUDENT),
    ([], "student.head_warmup_steps=5", FROM_STUDENT),
    ([], "student.expansion=passage", FROM_STUDENT),
    (["student.expansion=passage"], "student.static_weights=ones", FROM_STUDENT),
    (["student.expansion=passage"], "student.static_frozen=true", FROM_STUDENT),
    ([], "student.lora_rank=4", FROM_STUDENT),
    (["student.lora_rank=4"], "student.lora_alpha=8.0", FROM_STUDENT),
    ([], "student.regularizer=L1", FROM_STUDENT),
    ([], "student.budget={query_active_dims = 40}", FROM_STUDENT),
    ([], "training.wrapper=SpladeLoss", NONE),  # what it would have been
    ([], "training.mini_batch_size=4", NONE),
    ([], "training.scale=20.0", NONE),
    (["training.loss={SparseDistillKLDivLoss = 1, SparseMultipleNegativesRankingLoss = 1}"], "training.scale=20.0", FROM_STUDENT),
    ([], "training.triplet_margin=1.0", NONE),
    ([], "training.label_scale=2.0", FROM_STUDENT),
    ([], "training.label_scale=1.0", NONE),  # what it would have been
    ([], "training.precision=bfloat16", FROM_STUDENT),
    ([], "training.dev_queries=5", NONE),
    ([], "training.dev_depth=5", NONE),
    ([], "training.dev_steps=5", FROM_STUDENT),
    (["training.dev_steps=5"], "training.dev_queries=5", FROM_STUDENT),
    (["training.dev_steps=5"], "training.dev_depth=5", FROM_STUDENT),
    ([], "training.min_active_dims=2.0", NONE),
    ([], "training.max_active_share=0.9", NONE),
    ([], "training.collapse_patience=9", NONE),
    ([], "run.packed=false", NONE),
    ([], "run.tensorboard=true", NONE),
    ([], "student.model=models/other", FROM_STUDENT),
    ([], "student.num_layers=1", FROM_STUDENT),
    ([], "student.max_length=64", FROM_STUDENT),
    ([], "student.dropout=0.2", FROM_STUDENT),
    ([], "student.initial_active_dims=100", FROM_STUDENT),
    ([], "student.query_prompt='q: '", FROM_STUDENT),
    ([], "student.passage_prompt='p: '", FROM_STUDENT),
    ([], "student.lambda_query=0.3", FROM_STUDENT),
    ([], "student.lambda_passage=0.3", FROM_STUDENT),
    ([], "student.threshold_query=50", FROM_STUDENT),
    ([], "student.threshold_passage=50", FROM_STUDENT),
    ([], "training.loss=SparseMarginMSELoss", FROM_STUDENT),
    ([], "training.temperature=1.0", FROM_STUDENT),
    (["training.loss=SparseMarginMSELoss"], "training.temperature=1.0", NONE),  # KL's alone
    ([], "training.batch_size=8", FROM_STUDENT),
    ([], "training.epochs=2.0", FROM_STUDENT),
    (["training.max_steps=9"], "training.epochs=2.0", NONE),  # ignored beside max_steps
    ([], "training.max_steps=9", FROM_STUDENT),
    ([], "training.learning_rate=1e-3", FROM_STUDENT),
    (["student.expansion=passage"], "training.static_learning_rate=0.01", FROM_STUDENT),
    ([], "training.warmup_ratio=0.2", FROM_STUDENT),
    ([], "training.weight_decay=0.0", FROM_STUDENT),
    ([], "training.max_grad_norm=2.0", FROM_STUDENT),
    ([], "training.lambda_schedule=linear", FROM_STUDENT),
    ([], "training.lambda_warmup_ratio=0.5", FROM_STUDENT),
    ([], "training.seed=1", FROM_STUDENT),
    ([], "evaluation.split=dev", EVALUATION),
    ([], "evaluation.students=false", EVALUATION),
    ([], "evaluation.rerank_depth=50", EVALUATION),
    ([], "evaluation.k1=1.2", EVALUATION),
    ([], "evaluation.b=0.5", EVALUATION),
    ([], "run.cache=elsewhere", NONE),
    ([], "run.device=cuda", NONE),
    ([], "run.search_device=cpu", NONE),
    ([], "run.memory_gb=64", NONE),
    ([], "run.threads=2", NONE),
    ([], "run.batch_tokens=64", NONE),
    ([], "run.shard_pairs=10", NONE),
    ([], "run.shard=1/2", NONE),
    ([], "run.workers=2", NONE),
    ([], "run.runner=ray", NONE),
    (["run.runner=ray"], "run.address=auto", NONE),
    (["run.runner=ray"], "run.gpus_per_worker=0.5", NONE),
    ([], "run.shard_passages=10", NONE),
    ([], "run.fused_head=false", NONE),
    ([], "run.save_steps=5", NONE),
    ([], "run.log_level=DEBUG", NONE),
]


def save_model(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    weights = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    save_file({"weight": weights}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    module = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([module]), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "README.md").write_text("a model card", encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, sample_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe, its collection, four models."""
    shutil.copytree(sample_folder, tmp_path / "collection")
    for seed, name in enumerate(("miner", "judge", "student", "other")):
        save_model(tmp_path / "models" / name, seed)
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan_of(overrides: list[str] | None = None) -> Plan:
    return Plan(load_recipe(Path("recipe.toml"), overrides or []))


def keys(overrides: list[str] | None = None) -> dict[str, str]:
    return {kind: key_of(fields) for kind, fields in plan_of(overrides).artifacts(KINDS)}


def changed_kinds(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {kind for kind in KINDS if before[kind] != after[kind]}


@pytest.mark.parametrize(("before", "change", "expected"), SETTINGS, ids=[" then ".join([*b, c]) for b, c, _ in SETTINGS])
def test_a_setting_changes_the_keys_of_what_it_changes_and_no_other(
    place: Path, before: list[str], change: str, expected: set[str]
) -> None:
    assert changed_kinds(keys(before), keys([*before, change])) == expected


def test_every_setting_of_these_sections_is_in_the_table() -> None:
    sections = {"labels": Labels, "student": Student, "training": Training, "evaluation": Evaluation, "run": Run}

    told = {tuple(change.partition("=")[0].split(".")[:2]) for _, change, _ in SETTINGS}

    assert {(section, field) for section, model in sections.items() for field in model.model_fields} - told == set()


def append(name: str, text: str) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        with (place / name).open("a", encoding="utf-8") as stream:
            stream.write(text)

    return edit


def flip_weight(name: str) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        path = place / "models" / name / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return edit


def move(name: str) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        (place / name).rename(place / "moved")
        text = (place / "recipe.toml").read_text(encoding="utf-8")
        (place / "recipe.toml").write_text(text.replace(f'"{name}"', '"moved"'), encoding="utf-8")

    return edit


def touch_everything(place: Path) -> None:
    for path in place.rglob("*"):
        os.utime(path, (1, 1))


def add_teacher(place: Path) -> None:
    append("recipe.toml", SECOND_TEACHER)(place)


def swap_miners(place: Path) -> None:
    head, first, second = RECIPE.split("[[mining.miners]]")
    second, rest = second.split("[[teachers]]")
    swapped = f"{head}[[mining.miners]]{second}[[mining.miners]]{first}[[teachers]]{rest}"
    (place / "recipe.toml").write_text(swapped, encoding="utf-8")


EDITS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "a passage more": (append("collection/corpus.jsonl", '{"_id": "new", "text": "new"}\n'), ALL),
    "a query more": (append("collection/queries.jsonl", '{"_id": "new", "text": "new"}\n'), ALL),
    "a judgement more in train": (append("collection/qrels/train.tsv", "q05\tbread-1\t1\n"), ALL),
    "a judgement more in test": (append("collection/qrels/test.tsv", "q19\tbread-1\t1\n"), EVALUATION),
    "a judgement more in dev": (append("collection/qrels/dev.tsv", "q15\tbread-1\t1\n"), NONE),
    "one bit of the miner's weights": (flip_weight("miner"), ALL),
    "one bit of the teacher's weights": (flip_weight("judge"), FROM_TABLE),
    "one bit of the student's weights": (flip_weight("student"), FROM_STUDENT),
    "one bit of weights that no one uses": (flip_weight("other"), NONE),
    "the student's tokenizer": (append("models/student/tokenizer.json", " "), FROM_STUDENT),
    "the teacher's configuration": (append("models/judge/config.json", " "), FROM_TABLE),
    "a model card": (append("models/judge/README.md", "more words"), NONE),
    "the collection's place": (move("collection"), NONE),
    "the teacher's place": (move("models/judge"), NONE),
    "the student's place": (move("models/student"), NONE),
    "all times": (touch_everything, NONE),
    "a comment in the recipe": (append("recipe.toml", "# more words\n"), NONE),
    "a second teacher": (add_teacher, FROM_TABLE),
    "a bm25 teacher": (append("recipe.toml", LEXICAL_TEACHER), FROM_TABLE),
    "the order of the miners": (swap_miners, ALL),  # a passage proposed twice counts for the first
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_changes_the_keys_of_what_it_changes_and_no_other(place: Path, name: str) -> None:
    edit, expected = EDITS[name]
    before = keys()

    edit(place)

    assert changed_kinds(before, keys()) == expected


@pytest.mark.parametrize(
    ("name", "kinds", "named"),
    [
        ("collection/corpus.jsonl", ["candidates"], "candidates .*files.corpus.jsonl was "),
        ("collection/qrels/test.tsv", ["runs"], "runs .*bm25.qrels was "),
        ("models/judge/model.safetensors", ["candidates", "tables"], "tables .*identity.weights.model.safetensors was "),
        ("models/student/config.json", ["students"], "students .*config.json was "),
    ],
)
def test_an_input_that_changed_since_its_key_was_made_is_named(place: Path, name: str, kinds: list[str], named: str) -> None:
    plan = plan_of()
    plan.artifacts(kinds)
    plan.require_unchanged(*kinds)
    path = place / name
    path.write_bytes(path.read_bytes() + b"\n")

    with pytest.raises(ValueError, match=rf"(?s){named}.*so it is not published; what was banked stays; run the same"):
        plan.require_unchanged(*kinds)


def test_a_second_teacher_of_weight_0_is_evaluated_and_teaches_nothing(place: Path) -> None:
    before = keys()

    add_teacher(place)

    assert changed_kinds(before, keys(["labels.weights={judge = 1.0, second = 0.0}"])) == EVALUATION


def test_keys_of_models_that_teach_are_those_they_have_always_been(place: Path) -> None:
    (place / "models" / "other" / "config_sentence_transformers.json").write_text('{"model_type": "SparseEncoder"}', "utf-8")
    add_teacher(place)
    append("recipe.toml", '[[teachers]]\nname = "third"\nkind = "sparse"\nmodel = "models/other"\n')(place)
    filtered = ["mining.filter.by=judge", "mining.filter.relative_margin=0.1"]

    plan = plan_of(["labels.calibration.kind=zscore", *filtered])

    # As computed before teachers came in more than one form; a change orphans every score and table there is.
    identities = plan.teacher_identities
    assert {name: key_of(identity) for name, identity in identities.items()} == {
        "judge": "326842c21f8603b2",
        "second": "a344ca01ed81e90f",
        "third": "89c2dd73d02ce41b",
    }
    assert key_of(table_fields(plan.recipe, "candidates", identities)) == "05869fe63c896d5c"


def test_a_run_miners_file_decides_the_key_and_a_missing_one_is_named(place: Path) -> None:
    mining = ["mining.fallback={kind = 'run', quota = 2, path = 'a.run'}"]
    with pytest.raises(FileNotFoundError, match=r"a\.run: no such run file; expected TREC lines; check path of the miner of kind"):
        keys(mining)
    (place / "a.run").write_text("q00 Q0 bread-1 1 1.0 x\n", encoding="utf-8")
    before = keys(mining)

    (place / "a.run").write_text("q00 Q0 bread-1 1 2.0 x\n", encoding="utf-8")

    assert changed_kinds(before, keys(mining)) == ALL


def test_a_teacher_enters_a_students_key_by_the_table_alone(place: Path) -> None:
    before = plan_of().student_fields

    append("recipe.toml", LEXICAL_TEACHER)(place)

    after = plan_of().student_fields
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"table"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("teachers.lexical.k1=1.2", FROM_TABLE),
        ("teachers.lexical.b=0.5", FROM_TABLE),
        ("teachers.lexical.name=words", EVALUATION),
        ("evaluation.rerank_depth=50", EVALUATION),  # the cross-encoder's
        ("run.device=cuda", NONE),
    ],
)
def test_a_setting_of_a_bm25_teacher_changes_the_keys_of_what_it_changes(place: Path, change: str, expected: set[str]) -> None:
    append("recipe.toml", LEXICAL_TEACHER)(place)

    assert changed_kinds(keys(), keys([change])) == expected


def test_a_bm25_teachers_scores_are_of_the_passages_that_are_kept_in_any_order(place: Path) -> None:
    append("recipe.toml", LEXICAL_TEACHER)(place)
    whole, part = (plan_of(overrides).teacher_identities["lexical"] for overrides in ([], ["collection.max_passages=10"]))
    corpus = place / "collection" / "corpus.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)

    corpus.write_text("".join(reversed(lines)), encoding="utf-8")
    reordered = plan_of().teacher_identities["lexical"]
    corpus.write_text("".join(lines).replace("yeast", "sugar", 1), encoding="utf-8")
    edited = plan_of().teacher_identities["lexical"]

    assert reordered == whole
    assert len({identity["passages"] for identity in (whole, part, edited)}) == 3


def test_a_bm25_teacher_is_ranked_with_the_baseline_where_k1_and_b_are_the_same(place: Path) -> None:
    append("recipe.toml", LEXICAL_TEACHER)(place)
    same, other = (plan_of(overrides).system_fields() for overrides in ([], ["evaluation.k1=1.2"]))

    assert list(same) == ["bm25", "teacher:judge", "teacher:lexical", "student:untrained", "student"]
    assert same["teacher:lexical"] == same["bm25"]
    assert other["teacher:lexical"] == same["teacher:lexical"]
    assert other["bm25"] != other["teacher:lexical"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("teachers.them.imported=other", FROM_TABLE),
        ("teachers.them.fields={revision = '2'}", FROM_TABLE),
        ("teachers.them.name=those", NONE),  # it is not measured, so no metric is listed under its name
    ],
)
def test_what_imported_scores_are_changes_the_keys_of_what_they_teach(place: Path, change: str, expected: set[str]) -> None:
    append("recipe.toml", FILE_TEACHER)(place)

    assert changed_kinds(keys(), keys([change])) == expected


def test_a_teacher_of_imported_scores_is_no_measured_system(place: Path) -> None:
    append("recipe.toml", FILE_TEACHER)(place)

    assert list(plan_of().system_fields()) == ["bm25", "teacher:judge", "student:untrained", "student"]


def test_the_order_of_two_teachers_changes_no_candidates(place: Path) -> None:
    add_teacher(place)
    before = keys()
    head, teacher = RECIPE.split("[[teachers]]")[0], RECIPE.split("[[teachers]]")[1].split("[student]")[0]
    swapped = f"{head}{SECOND_TEACHER}[[teachers]]{teacher}[student]{RECIPE.split('[student]')[1]}"
    (place / "recipe.toml").write_text(swapped, encoding="utf-8")

    assert "candidates" not in changed_kinds(before, keys())


def test_a_depth_of_reranking_changes_no_dense_teachers_evaluation(place: Path) -> None:
    dense = ["teachers.judge.kind=dense"]

    assert keys(dense) == keys([*dense, "evaluation.rerank_depth=50"])


def test_only_the_student_is_measured_again_after_training_changes(place: Path) -> None:
    before, after = (plan_of(overrides).system_fields() for overrides in ([], ["training.seed=1"]))

    assert list(before) == ["bm25", "teacher:judge", "student:untrained", "student"]
    assert [name for name in before if key_of(before[name]) != key_of(after[name])] == ["student"]


def test_calibration_of_the_bias_ties_the_untrained_student_to_the_passages(place: Path) -> None:
    calibrated = ["student.initial_active_dims=100"]
    before = plan_of(calibrated).untrained_fields, plan_of().untrained_fields

    append("collection/corpus.jsonl", '{"_id": "new", "text": "new"}\n')(place)

    assert plan_of(calibrated).untrained_fields != before[0]
    assert plan_of().untrained_fields == before[1]


def test_no_key_is_made_of_a_name_or_a_path(place: Path) -> None:
    (place / "collection").rename(place / "a-marked-collection")
    (place / "models" / "judge").rename(place / "models" / "a-marked-teacher")
    marked = ["collection.path=a-marked-collection", "teachers.judge.model=models/a-marked-teacher", "run.cache=a-marked-cache"]

    for kind, fields in plan_of(marked).artifacts(KINDS):
        assert "a-marked" not in repr(fields), kind
        assert str(place) not in repr(fields), kind


def test_a_damaged_artifact_is_named_not_made_again(place: Path) -> None:
    plan = plan_of()
    fields = plan.candidates_fields
    folder = plan.folder("candidates", fields)
    with publish(folder, kind="candidates", fields=fields, extra={}) as temporary:
        (temporary / "shard").write_bytes(b"12345")
    assert plan.hit("candidates", fields) is not None

    (folder / "shard").write_bytes(b"1234")

    with pytest.raises(IntegrityError, match="shard: 4 bytes, its manifest says 5"):
        plan.hit("candidates", fields)


def test_the_whole_plan_imports_no_torch(place: Path) -> None:
    append("recipe.toml", LEXICAL_TEACHER)(place)
    program = (
        "import sys; from pathlib import Path; from sparsekd.plan import Plan; from sparsekd.recipe import load_recipe;"
        f"Plan(load_recipe(Path('recipe.toml'), [])).artifacts({KINDS}); print('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "False\n"


def rounds_keys(plan: Plan, kinds: tuple[str, ...] = KINDS) -> dict[str, str]:
    return {kind: key_of(fields) for kind, fields in plan.artifacts(kinds)}


def test_round_1_of_several_has_the_keys_of_a_recipe_of_one(place: Path) -> None:
    alone = plan_of()
    first, second, third = plan_of(["mining.rounds=3", "mining.student_miner.quota=5"]).rounds

    assert rounds_keys(first) == rounds_keys(alone)
    assert rounds_keys(second) == rounds_keys(plan_of(["mining.rounds=2", "mining.student_miner.quota=5"]))
    assert len({rounds_keys(each)["students"] for each in (first, second, third)}) == 3


def test_each_round_asks_the_students_of_all_rounds_before(place: Path) -> None:
    first, second, third = plan_of(["mining.rounds=3", "student.query_prompt='q: '"]).rounds

    asked = third.mined_recipe.mining.miners
    students = [str(each.folder("students", each.student_fields)) for each in (first, second)]
    assert [miner.model for miner in asked[2:] if isinstance(miner, SparseMiner)] == students
    assert [miner.query_prompt for miner in asked[2:] if isinstance(miner, SparseMiner)] == ["q: ", "q: "]
    assert [miner.kind for miner in asked] == ["bm25", "dense", "sparse", "sparse"]
    encoders = [miner["encoder"] for miner in third.candidates_fields["miners"][2:]]
    assert encoders == [{"student": Path(folder).name} for folder in students]


@pytest.mark.parametrize("change", ["training.learning_rate=1e-3", "student.lambda_query=0.3", "labels.num_negatives=3"])
def test_what_changes_the_student_of_round_1_mines_again(place: Path, change: str) -> None:
    rounds = "mining.rounds=2"

    assert rounds_keys(plan_of(), ("candidates",)) == rounds_keys(plan_of([change]), ("candidates",))
    assert rounds_keys(plan_of([rounds]), ("candidates",)) != rounds_keys(plan_of([rounds, change]), ("candidates",))


def test_the_student_miners_settings_leave_round_1_alone(place: Path) -> None:
    before, after = plan_of(["mining.rounds=2"]), plan_of(["mining.rounds=2", "mining.student_miner.skip=3"])

    assert rounds_keys(before.rounds[0]) == rounds_keys(after.rounds[0])
    assert set(rounds_keys(before).values()).isdisjoint(rounds_keys(after).values())


def test_a_cache_elsewhere_changes_no_key_of_a_later_round(place: Path) -> None:
    assert rounds_keys(plan_of(["mining.rounds=2"])) == rounds_keys(plan_of(["mining.rounds=2", "run.cache=elsewhere"]))
