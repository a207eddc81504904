"""The plan in words: what is there, what differs, what it costs. Imports no torch and makes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsekd.artifact import key_of, publish
from sparsekd.bank.scores import ScoreBank
from sparsekd.bank.text_key import text_keys
from sparsekd.collection.beir import read_collection
from sparsekd.dry_run import describe_plan
from sparsekd.experiment import Experiment, candidates
from sparsekd.labels.rows import filter_pairs
from sparsekd.plan import Plan
from sparsekd.recipe import load_recipe

KINDS = ("candidates", "tables", "students", "evaluations")
RECIPE = """
[collection]
path = "collection"
[[mining.miners]]
kind = "bm25"
quota = 4
[[teachers]]
name = "judge"
kind = "cross-encoder"
model = "model"
[student]
model = "model"
[run]
cache = "cache"
"""


@pytest.fixture
def plan_of(tmp_path: Path, sample_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Return ``plan_of(*overrides)`` in a working directory with a collection and a model that is digested, never loaded."""
    shutil.copytree(sample_folder, tmp_path / "collection")
    (tmp_path / "model").mkdir()
    save_file({"weight": np.zeros(4, dtype=np.float32)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: Plan(load_recipe(Path("recipe.toml"), overrides), overrides)


def make(plan: Plan, *kinds: str) -> None:
    """Publish placeholders of these kinds under the plan's keys."""
    for kind, fields in plan.artifacts(kinds):
        with publish(plan.folder(kind, fields), kind=kind, fields=fields, extra={}):
            pass


def line_of(text: str, start: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_everything_is_a_miss_before_the_first_run_and_nothing_is_made(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_of()

    text = describe_plan(plan, KINDS)

    for kind, fields in plan.artifacts(KINDS):
        assert line_of(text, kind).split() == [kind, key_of(fields), "miss"]
        assert f"no {kind} made yet" in text
    assert text.endswith("order of work: candidates -> tables -> students -> evaluations")
    assert not (tmp_path / "cache").exists()


def test_everything_is_a_hit_where_all_is_made(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    make(plan, *KINDS)

    text = describe_plan(plan, KINDS)

    assert all(line_of(text, kind).endswith("hit") for kind in KINDS)
    assert text.endswith("order of work: nothing to do")
    assert "teacher judge" not in text


@pytest.mark.parametrize(
    ("override", "kind", "said"),
    [
        ("mining.miners.bm25.k1=1.2", "candidates", "miners.0.k1: 0.9 -> 1.2"),
        ("labels.num_negatives=3", "tables", "num_negatives: 4 -> 3"),
        ("teachers.judge.max_length=64", "tables", "teachers.0.identity.max_length: None -> 64"),
        ("training.seed=7", "students", "training.seed: 42 -> 7"),
        ("student.lambda_query=0.5", "students", "regularizer.lambda_query: 0.1 -> 0.5"),
        ("student.num_layers=1", "students", "student.num_layers: None -> 1"),
    ],
)
def test_a_miss_names_the_field_that_differs_from_the_nearest(
    plan_of: Callable[..., Plan], override: str, kind: str, said: str
) -> None:
    before = plan_of()
    make(before, *KINDS)
    [(_, fields)] = before.artifacts([kind])

    text = describe_plan(plan_of(override), KINDS)

    assert f"differs from {key_of(fields)} in {said}" in text
    assert kind in line_of(text, "order of work")


def test_a_change_of_training_leaves_stage_1_alone(plan_of: Callable[..., Plan]) -> None:
    make(plan_of(), *KINDS)

    text = describe_plan(plan_of("training.seed=7"), KINDS)

    assert text.endswith("order of work: students -> evaluations")
    assert "teacher judge" not in text


def test_a_long_list_of_differences_is_cut_and_counted(plan_of: Callable[..., Plan]) -> None:
    make(plan_of(), "students")
    changes = [f"training.{name}" for name in ("seed=1", "epochs=2.0", "batch_size=3", "weight_decay=0.0", "temperature=1.0")]
    changes += ["training.warmup_ratio=0.5", "student.lambda_query=1.0", "student.dropout=0.5"]

    text = describe_plan(plan_of(*changes), ["students"])

    assert text.count("differs from") == 6
    assert "and 2 more fields" in text


def test_pairs_are_estimated_from_the_quotas_before_candidates_are_mined(plan_of: Callable[..., Plan]) -> None:
    text = describe_plan(plan_of(), ["candidates", "tables"])

    # 14 training queries with 15 positives, 4 candidates each.
    assert "teacher judge: pairs wanted 71, already banked unknown until mined (0 in the teacher's bank)" in text
    assert "to score at most 71, disk about 0.0 MB" in text


def test_a_bm25_teachers_pairs_are_told_like_any_others(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    with (tmp_path / "recipe.toml").open("a", encoding="utf-8") as stream:
        stream.write('[[teachers]]\nname = "lexical"\nkind = "bm25"\n')

    text = describe_plan(plan_of(), ["candidates", "tables"])

    assert "teacher lexical: pairs wanted 71, already banked unknown until mined (0 in the teacher's bank)" in text


def test_imported_scores_that_are_not_there_are_told_beforehand(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    with (tmp_path / "recipe.toml").open("a", encoding="utf-8") as stream:
        stream.write('[[teachers]]\nname = "them"\nkind = "file"\nimported = "ensemble"\n')
    plan = plan_of()

    before = describe_plan(plan, ["candidates", "tables"])
    query_ids, passage_ids = filter_pairs(candidates(Experiment(plan)))
    collection = plan.collection
    queries = text_keys([collection.queries[query_id] for query_id in query_ids])
    passages = text_keys([collection.passages[passage_id] for passage_id in passage_ids])
    scores = ScoreBank(Path("cache") / "bank").open(plan.teacher_identities["them"])
    scores.append(queries[1:], passages[1:], np.zeros(len(queries) - 1, dtype=np.float32))
    short = describe_plan(plan, ["candidates", "tables"])
    scores.append(queries[:1], passages[:1], np.zeros(1, dtype=np.float32))
    whole = describe_plan(plan, ["candidates", "tables"])

    wanted = len(query_ids)
    assert "teacher them: pairs wanted 71, already banked unknown until mined (0 in the teacher's bank), at most 71 not" in before
    assert f"teacher them: pairs wanted {wanted}, already banked {wanted - 1}, at most 1 not imported, each an error" in short
    assert f"teacher them: pairs wanted {wanted}, already banked {wanted}, all imported" in whole


def test_pairs_wanted_and_banked_are_exact_once_candidates_are_mined(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    query_ids, passage_ids = filter_pairs(candidates(Experiment(plan)))
    collection = read_collection(Path("collection"))
    queries = text_keys([collection.queries[query_id] for query_id in query_ids[:10]])
    passages = text_keys([collection.passages[passage_id] for passage_id in passage_ids[:10]])
    scores = ScoreBank(Path("cache") / "bank").open(plan.teacher_identities["judge"])
    scores.append(queries, passages, np.arange(10, dtype=np.float32))

    text = describe_plan(plan, ["candidates", "tables"])

    wanted = len(query_ids)
    assert f"teacher judge: pairs wanted {wanted}, already banked 10, to score at most {wanted - 10}," in text
    assert text.endswith("order of work: tables")


def test_an_approximate_index_is_stated_with_its_parameters_before_it_is_built(plan_of: Callable[..., Plan]) -> None:
    Path("model/modules.json").write_text("[]", encoding="utf-8")
    miner = "mining.fallback={kind = 'dense', quota = 3, depth = 50, model = 'model', index = 'hnsw'}"

    text = describe_plan(plan_of(miner), ("candidates",))

    number = len(read_collection(Path("collection")).passages)
    expected = f"miner dense: index hnsw over {number} passages, links 32, build_effort 200, search_effort 228, window 114"
    assert line_of(text, "miner dense") == expected


def test_an_index_that_cannot_be_trained_is_refused_by_the_plan(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("mining.fallback={kind = 'dense', quota = 3, model = 'model', index = 'ivf-flat'}")
    Path("model/modules.json").write_text("[]", encoding="utf-8")

    with pytest.raises(ValueError, match=r"passages are too few to train it, it needs 2,496 .*use index = \"flat\""):
        describe_plan(plan, ("candidates",))


def test_a_plan_of_two_rounds_shows_both_and_what_each_costs(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("mining.rounds=2", "mining.student_miner.quota=3")

    lines = describe_plan(plan, ["candidates", "tables"]).splitlines()

    first, second = lines.index("round 1 of 2"), lines.index("round 2 of 2")
    keys = {(each.recipe.mining.rounds, kind): key_of(fields) for each in plan.rounds for kind, fields in each.artifacts(KINDS)}
    assert [line.split()[:2] for line in lines[first:second] if line.endswith("miss")] == [
        [kind, keys[1, kind]] for kind in ("candidates", "tables", "students")
    ]
    assert [line.split()[:2] for line in lines[second:] if line.endswith("miss")] == [
        [kind, keys[2, kind]] for kind in ("candidates", "tables")
    ]
    # 14 training queries with 15 positives: 4 candidates each, then 3 more.
    of_first, of_second = (lines[lines.index(f"pairs of round {number}") + 1] for number in (1, 2))
    assert "pairs wanted 71, " in of_first
    assert "to score at most 71," in of_first
    assert "pairs wanted 113, " in of_second
    assert "to score at most 42," in of_second
    steps = ["candidates of round 1", "tables of round 1", "students of round 1", "candidates of round 2", "tables of round 2"]
    assert lines[-1] == "order of work: " + " -> ".join(steps)


def test_what_round_2_has_made_needs_nothing_of_round_1(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("mining.rounds=2")
    make(plan, "candidates")

    text = describe_plan(plan, ["candidates", "tables", "students"])

    assert text.endswith("order of work: tables of round 2 -> students of round 2")


def test_after_round_1_the_order_of_work_goes_on_with_round_2(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("mining.rounds=2")
    make(plan.rounds[0], "candidates", "tables", "students")

    text = describe_plan(plan, ["candidates", "tables"])

    assert text.endswith("order of work: candidates of round 2 -> tables of round 2")


TOGETHER = """
[collection]
path = "collection"
[[mining.miners]]
kind = "bm25"
quota = 4
[[mining.miners]]
kind = "dense"
model = "dense"
quota = 2
[[mining.miners]]
kind = "run"
path = "theirs.run"
quota = 2
[[mining.miners]]
kind = "sparse"
model = "sparse"
quota = 2
[mining.fallback]
kind = "random"
quota = 3
[mining.filter]
by = "lexical"
relative_margin = 0.05
percentile = 95
min_positive = 0.1
near_duplicate = 0.9
[[teachers]]
name = "judge"
kind = "cross-encoder"
model = "model"
[[teachers]]
name = "dense"
kind = "dense"
model = "dense"
[[teachers]]
name = "sparse"
kind = "sparse"
model = "sparse"
[[teachers]]
name = "lexical"
kind = "bm25"
[[teachers]]
name = "them"
kind = "file"
imported = "ensemble"
[labels]
selection = "stratified"
selection_teacher = "lexical"
promote_above = 20.0
combine = "sum"
missing = "renormalize"
weights = { judge = 1.0, dense = 0.5, sparse = 0.5, lexical = 0.0, them = 2.0 }
calibrations = { them = { kind = "affine", reference = "lexical" }, judge = { kind = "percentile" } }
[labels.calibration]
kind = "minmax"
[labels.rescale]
kind = "zscore"
scale = 10.0
[student]
model = "model"
[run]
cache = "cache"
"""


def test_a_recipe_that_asks_for_everything_is_planned_without_making_anything(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TOGETHER, encoding="utf-8")
    for kind, name in (("SentenceTransformer", "dense"), ("SparseEncoder", "sparse")):
        folder = Path(shutil.copytree(tmp_path / "model", tmp_path / name))
        (folder / "modules.json").write_text("[]", encoding="utf-8")
        (folder / "config_sentence_transformers.json").write_text(f'{{"model_type": "{kind}"}}', encoding="utf-8")
    collection = read_collection(tmp_path / "collection")
    (tmp_path / "theirs.run").write_text(f"{next(iter(collection.qrels['train']))} Q0 bread-1 1 2.5 them\n", encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())

    text = describe_plan(plan_of(), KINDS)

    judged = collection.qrels["train"].values()
    wanted = sum(grade >= 1 for grades in judged for grade in grades.values()) + len(judged) * 10
    for name in ("judge", "dense", "sparse", "lexical"):
        assert f"teacher {name}: pairs wanted {wanted}, " in text
    assert line_of(text, "teacher them:").endswith(f"at most {wanted} not imported, left to the other teachers")
    assert text.splitlines()[-1] == "order of work: candidates -> tables -> students -> evaluations"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert line_of(describe_plan(plan_of("labels.missing=require"), KINDS), "teacher them:").endswith("each an error")
