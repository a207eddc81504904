"""The best student of a run is the one with the best dev nDCG@10, within the budget first; kept on disk, put back at the end."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from transformers import TrainerControl, TrainerState

from sparsekd.artifact import IntegrityError
from sparsekd.collection.beir import Collection
from sparsekd.recipe import Recipe
from sparsekd.students.building import build_student
from sparsekd.training import development
from sparsekd.training.development import DevPool, DevSelection, dev_pool, encode_sparse, measure_pool, sample_probe

STEPS = 40


@pytest.fixture
def student(make_recipe: Callable[..., Recipe]) -> SparseEncoder:
    recipe = make_recipe()
    return build_student(recipe.student, Path(recipe.student.model))


@pytest.fixture
def pool(collection: Collection) -> DevPool:
    """Every query of the collection as a dev query, with every passage in its pool: figures that differ between students."""
    judged = {query_id: grades for split in collection.qrels.values() for query_id, grades in split.items()}
    whole = Collection(collection.passages, collection.queries, {"dev": judged}, {})
    training: Any = SimpleNamespace(dev_queries=100, dev_depth=100, dev_steps=10)
    return dev_pool(training, whole, lambda texts, depth: [list(collection.passages)] * len(texts))


class Run:
    """Calls DevSelection as the trainer does, while the student's weights are set by hand."""

    def __init__(self, student: SparseEncoder, pool: DevPool, folder: Path, **budgets: float) -> None:
        self.student, self.folder = student, folder
        self.selection = DevSelection(student, pool, every=10, folder=folder / "best", **budgets)
        self.state = TrainerState(max_steps=STEPS, stateful_callbacks=[self.selection])
        self.arguments: Any = SimpleNamespace(output_dir=str(folder))

    def event(self, name: str) -> None:
        getattr(self.selection, name)(self.arguments, self.state, TrainerControl())

    def step_to(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        self.student.load_state_dict(weights)
        while self.state.global_step < step:
            self.state.global_step += 1
            self.event("on_step_end")

    def save(self) -> Path:
        """Write what the trainer writes of its state into a checkpoint."""
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        checkpoint.mkdir()
        self.state.stateful_callbacks = {"DevSelection": self.selection.state()}  # type: ignore[assignment]
        self.state.save_to_json(str(checkpoint / "trainer_state.json"))
        self.event("on_save")
        return checkpoint

    def ndcg(self) -> dict[int, float]:
        return {entry["step"]: entry["dev_nDCG@10"] for entry in self.state.log_history}


@pytest.fixture
def weights(student: SparseEncoder, pool: DevPool) -> list[dict[str, torch.Tensor]]:
    """The weights of three students, the best by dev nDCG@10 second, the worst last; all different in figures and active dims."""
    made = []
    for shift in (0.0, -0.5, -1.0, -1.5, -2.0, -3.0):
        weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        for name, tensor in weights.items():
            if name.endswith("decoder.bias") or name.endswith("predictions.bias"):
                tensor += shift
        student.load_state_dict(weights)
        made.append((measure_pool(student, pool).ndcg, weights))
    made.sort(key=lambda pair: pair[0])
    assert made[0][0] < made[2][0] < made[-1][0]
    return [made[2][1], made[-1][1], made[0][1]]


def same(weights: dict[str, torch.Tensor], student: SparseEncoder) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())


def test_the_pool_is_judged_passages_and_the_first_stages_of_the_queries_of_smallest_hash(
    make_recipe: Callable[..., Recipe], collection: Collection
) -> None:
    asked: list[tuple[list[str], int]] = []

    def first_stage(texts: Sequence[str], depth: int) -> list[list[str]]:
        asked.append((list(texts), depth))
        return [["tree-1", "bird-1", "sky-2"][:depth] for _ in texts]

    pool = dev_pool(make_recipe(dev_queries=1, dev_depth=2, dev_steps=5).training, collection, first_stage)

    (query_id,) = sorted(collection.qrels["dev"], key=lambda text_id: hashlib.sha256(text_id.encode()).digest())[:1]
    assert asked == [([collection.queries[query_id]], 2)]
    assert pool.queries == {query_id: collection.queries[query_id]}
    assert pool.pool == {query_id: sorted({"tree-1", "bird-1", *collection.qrels["dev"][query_id]})}
    assert pool.qrels == {query_id: collection.qrels["dev"][query_id]}
    assert pool.passages == {passage_id: collection.passages[passage_id] for passage_id in pool.passages}
    assert sorted(pool.passages) == pool.pool[query_id]


def test_a_collection_without_dev_judgements_is_refused(make_recipe: Callable[..., Recipe], collection: Collection) -> None:
    without = Collection(collection.passages, collection.queries, {"train": collection.qrels["train"]}, {})

    with pytest.raises(ValueError, match=r"dev_steps = 5: the collection has no dev judgements \(splits: train\); add"):
        dev_pool(make_recipe(dev_steps=5).training, without, lambda texts, depth: [])


def test_ndcg_is_the_formula_over_the_order_of_dot_products(student: SparseEncoder, pool: DevPool) -> None:
    query_vectors = student.encode_query(list(pool.queries.values()), convert_to_sparse_tensor=False)
    passage_vectors = student.encode_document(list(pool.passages.values()), convert_to_sparse_tensor=False)
    scores = (query_vectors.double() @ passage_vectors.double().T).tolist()
    total = 0.0
    for row, query_id in enumerate(pool.queries):
        ranked = sorted(zip(pool.passages, scores[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
        grades = [pool.qrels[query_id].get(passage_id, 0) for passage_id, _ in ranked]
        gain = sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades[:10]))
        total += gain / sum(grade / math.log2(rank + 2) for rank, grade in enumerate(sorted(grades, reverse=True)[:10]))

    figures = measure_pool(student, pool)

    assert 0.0 < figures.ndcg < 1.0
    assert figures.ndcg == pytest.approx(total / len(pool.queries))
    assert figures.query_active_dims == pytest.approx(float((query_vectors > 0).sum()) / len(query_vectors))
    assert figures.passage_active_dims == pytest.approx(float((passage_vectors > 0).sum()) / len(passage_vectors))


def test_encoding_gives_the_librarys_vectors_and_leaves_mode_and_random_numbers_alone(
    student: SparseEncoder, collection: Collection
) -> None:
    texts = [*collection.passages.values()] * 3  # more than one chunk
    student.train()
    before = torch.get_rng_state()

    vectors = encode_sparse(student, texts, "passage")

    assert student.training
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(vectors.to_dense(), student.encode_document(texts, convert_to_sparse_tensor=False).cpu())


def test_the_probe_is_the_mean_of_a_sample_by_hash(
    student: SparseEncoder, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(development, "_PROBED_QUERIES", 3)
    monkeypatch.setattr(development, "_PROBED_PASSAGES", 3)
    monkeypatch.setattr(development, "_PROBED_OFTEN", 2)
    probe = sample_probe(student, collection)

    query_dims, passage_dims = probe.both()
    few_query_dims = probe.few_queries()

    train = {query_id: collection.queries[query_id] for query_id in collection.qrels["train"]}
    for texts, count, found in ((train, 3, query_dims), (train, 2, few_query_dims), (collection.passages, 3, passage_dims)):
        ids = sorted(texts, key=lambda text_id: hashlib.sha256(text_id.encode()).digest())[:count]
        vectors = student.encode([texts[text_id] for text_id in ids], convert_to_sparse_tensor=False)
        assert found == pytest.approx(float((vectors > 0).sum()) / count)


def test_the_best_student_is_back_at_the_end_and_every_measurement_in_the_log(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run = Run(student, pool, tmp_path)
    run.event("on_train_begin")
    for number, each in enumerate(weights, start=1):
        run.step_to(10 * number, each)
    run.step_to(STEPS, weights[0])

    run.event("on_train_end")

    figures = run.ndcg()
    assert list(figures) == [10, 20, 30, 40]
    assert max(figures.values()) == figures[20] == run.selection.best["nDCG@10"]
    assert run.selection.best_step == 20
    assert same(weights[1], student)


def test_the_last_step_is_measured_and_equals_leave_the_earlier_one(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run = Run(student, pool, tmp_path)
    run.selection.every = 35
    run.event("on_train_begin")

    run.step_to(STEPS, weights[0])

    assert list(run.ndcg()) == [35, 40]
    assert run.selection.best_step == 35


def test_a_student_within_the_budget_is_preferred_to_a_better_one_outside(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    student.load_state_dict(weights[2])
    budget = measure_pool(student, pool).passage_active_dims
    run = Run(student, pool, tmp_path, passage_budget=budget * 1.05)
    run.event("on_train_begin")
    for number, each in enumerate([weights[0], weights[2], weights[1]], start=1):
        run.step_to(10 * number, each)
    run.step_to(STEPS, weights[0])

    run.event("on_train_end")

    assert run.selection.best_step == 20
    assert run.selection.best["is_within_budget"]
    assert same(weights[2], student)


def test_a_resumed_run_keeps_what_was_best_before_it_was_stopped(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    first = Run(student, pool, tmp_path)
    first.event("on_train_begin")
    first.step_to(10, weights[1])
    first.step_to(25, weights[0])
    checkpoint = first.save()

    run = Run(student, pool, tmp_path)
    run.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    run.event("on_train_begin")
    run.step_to(STEPS, weights[2])
    run.event("on_train_end")

    assert run.selection.best_step == 10
    assert list(run.ndcg()) == [10, 20, 30, 40]
    assert same(weights[1], student)


def test_weights_stay_on_disk_as_long_as_a_checkpoint_names_them(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run = Run(student, pool, tmp_path)
    run.event("on_train_begin")
    run.step_to(10, weights[2])
    first = run.save()
    run.step_to(20, weights[0])
    run.step_to(30, weights[1])
    run.save()
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["best-10.safetensors", "best-30.safetensors"]

    (first / "trainer_state.json").unlink()  # as when the trainer rotates it away
    run.event("on_save")

    assert [path.name for path in (tmp_path / "best").iterdir()] == ["best-30.safetensors"]


@pytest.mark.parametrize(("damage", "what"), [("cut", "has changed"), ("gone", "is missing")])
def test_damaged_best_weights_are_refused(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path, damage: str, what: str
) -> None:
    run = Run(student, pool, tmp_path)
    run.event("on_train_begin")
    run.step_to(10, weights[1])
    run.step_to(STEPS, weights[0])
    kept = tmp_path / "best" / "best-10.safetensors"
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-1])
    else:
        kept.unlink()

    with pytest.raises(IntegrityError, match=f"best-10.safetensors: {what}; these are the best weights; remove"):
        run.event("on_train_end")


def test_a_run_stopped_before_its_end_keeps_the_weights_it_trains_on(
    student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run = Run(student, pool, tmp_path)
    run.event("on_train_begin")
    run.step_to(10, weights[1])
    run.step_to(20, weights[0])

    run.event("on_train_end")

    assert same(weights[0], student)


def test_the_state_is_json(student: SparseEncoder, pool: DevPool, weights: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    run = Run(student, pool, tmp_path)
    run.event("on_train_begin")
    run.step_to(10, weights[1])

    assert json.loads(json.dumps(run.selection.state())) == run.selection.state()
