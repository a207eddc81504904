"""Resume: from the newest whole checkpoint of the same experiment, with the weights of a run that was never stopped."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe
from sparsekd.training.checkpoints import SEAL, newest_whole_checkpoint, seal
from sparsekd.training.fit import TrainedStudent, train

# Every file the trainer writes into a checkpoint of this student, and the seal; the first test keeps the list complete.
FILES = [
    "1_SpladePooling/config.json", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json",
    "optimizer.pt", "rng_state.pth", "scheduler.pt", "sentence_bert_config.json", SEAL, "tokenizer.json", "tokenizer_config.json",
    "trainer_state.json",
]  # fmt: skip
FIELDS = {"table": "abc", "training": {"learning_rate": 1e-3, "seed": 1}, "regularizer": {"lambda_query": 0.1}}


@pytest.fixture(scope="module")
def fit(
    make_recipe: Callable[..., Recipe],
    make_table_in: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], TrainedStudent]:
    """Return ``fit(work)``: 6 steps with dropout in that work folder, a checkpoint every 2."""
    recipe = make_recipe(student={"dropout": 0.1}, max_steps=6, run={"save_steps": 2})
    table = make_table_in(tmp_path_factory.mktemp("cache"), recipe)
    return lambda work: train(recipe, table, collection, work_folder=work, key="key")


@pytest.fixture(scope="module")
def kept(fit: Callable[[Path], TrainedStudent], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainedStudent]:
    """A work folder as a run that was never stopped leaves it, and its student."""
    work = tmp_path_factory.mktemp("kept") / "work"
    return work, fit(work)


@pytest.fixture
def uninterrupted(kept: tuple[Path, TrainedStudent]) -> TrainedStudent:
    """The student of a run that was never stopped."""
    return kept[1]


@pytest.fixture
def work(kept: tuple[Path, TrainedStudent], tmp_path: Path) -> Path:
    """A copy of the work folder that it left, for a test to damage and to go on in."""
    return shutil.copytree(kept[0], tmp_path / "work")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A work folder with two sealed checkpoints of one file each."""
    for step in (4, 6):
        checkpoint = tmp_path / "written" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes([step] * 100))
        seal(checkpoint, "key", FIELDS)
    return tmp_path / "written"


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def equal_weights(left: TrainedStudent, right: TrainedStudent) -> bool:
    pairs = zip(left.model.state_dict().values(), right.model.state_dict().values(), strict=True)
    return all(torch.equal(tensor, counterpart) for tensor, counterpart in pairs)


class Opens:
    """Pickles as a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_call_something_is_not_run_when_a_run_is_resumed(
    fit: Callable[[Path], TrainedStudent], work: Path, tmp_path: Path
) -> None:
    newest = max(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    middle = work / "checkpoint-4"
    shutil.rmtree(newest)
    found = json.loads((middle / SEAL).read_text(encoding="utf-8"))
    torch.save(Opens(tmp_path / "made-by-a-pickle"), middle / "optimizer.pt")
    (middle / SEAL).unlink()
    seal(middle, found["key"], found["fields"])  # forged: the seal is no signature

    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        fit(work)

    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_that_this_run_did_not_write_makes_a_checkpoint_torn(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    foreign = written / "checkpoint-6" / "optimizer.pt"
    if kind == "file":
        foreign.write_bytes(b"x")
    else:
        (written / "checkpoint-6" / "model.safetensors").rename(tmp_path / "elsewhere")
        (foreign := written / "checkpoint-6" / "model.safetensors").symlink_to(tmp_path / "elsewhere")

    assert newest_whole_checkpoint(written, "key", FIELDS) == written / "checkpoint-4"

    assert f"checkpoint-6: torn ({foreign.name} is not of this run)" in caplog.text


def test_a_checkpoint_that_is_a_link_is_refused_and_nothing_is_removed(written: Path, tmp_path: Path) -> None:
    (written / "checkpoint-6").rename(tmp_path / "elsewhere")
    (written / "checkpoint-6").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ValueError, match=r"checkpoint-6: a symbolic link, expected a folder of this run; remove it and rerun"):
        newest_whole_checkpoint(written, "key", FIELDS)

    assert (tmp_path / "elsewhere" / SEAL).is_file()


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before_whichever_file_is_torn(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = work / "checkpoint-6"
    found = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    assert found == sorted(FILES)
    sealed = json.loads((newest / SEAL).read_text(encoding="utf-8"))
    key, fields = sealed["key"], sealed["fields"]

    for name in FILES:
        for damage in (cut, flip, empty, remove):
            shutil.rmtree(tmp_path / "torn", ignore_errors=True)
            shutil.copytree(work, tmp_path / "torn")
            damage(tmp_path / "torn" / "checkpoint-6" / name)
            caplog.clear()

            checkpoint = newest_whole_checkpoint(tmp_path / "torn", key, fields)

            assert checkpoint == tmp_path / "torn" / "checkpoint-4", (name, damage.__name__)
            assert "checkpoint-6: torn (" in caplog.text
            assert "falling back to the checkpoint before it" in caplog.text
            assert name == SEAL or f"{name} " in caplog.text
            assert not (tmp_path / "torn" / "checkpoint-6").exists()


@pytest.mark.parametrize("stopped_after", ["checkpoint-4", "checkpoint-6"])
def test_a_resumed_run_has_the_weights_and_the_log_of_one_that_was_never_stopped(
    fit: Callable[[Path], TrainedStudent], uninterrupted: TrainedStudent, work: Path, stopped_after: str
) -> None:
    for checkpoint in work.glob("checkpoint-*"):
        if checkpoint.name > stopped_after:
            shutil.rmtree(checkpoint)

    resumed = fit(work)

    assert resumed.resumed_from_step == int(stopped_after[-1])
    assert resumed.num_steps == uninterrupted.num_steps == 6
    assert equal_weights(resumed, uninterrupted)
    logs = [[(entry["step"], entry["loss"]) for entry in run.log_history if "loss" in entry] for run in (resumed, uninterrupted)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]] == [1, 6]
    # An entry is the mean over the steps since the last one, of which a resumed trainer has seen only its own.
    assert logs[0][0] == logs[1][0]


def test_a_run_resumed_from_before_a_torn_checkpoint_has_the_same_weights(
    fit: Callable[[Path], TrainedStudent], uninterrupted: TrainedStudent, work: Path
) -> None:
    cut(work / "checkpoint-6" / "optimizer.pt")

    resumed = fit(work)

    assert resumed.resumed_from_step == 4
    assert equal_weights(resumed, uninterrupted)


def test_a_run_starts_anew_where_every_checkpoint_is_torn(
    fit: Callable[[Path], TrainedStudent], uninterrupted: TrainedStudent, work: Path
) -> None:
    for checkpoint in work.glob("checkpoint-*"):
        (checkpoint / SEAL).unlink()

    again = fit(work)

    assert again.resumed_from_step == 0
    assert equal_weights(again, uninterrupted)


def test_a_checkpoint_of_another_experiment_is_refused_and_kept(written: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint-6: belongs to experiment key, expected other; remove .*written and rerun"):
        newest_whole_checkpoint(written, "other", FIELDS)
    assert (written / "checkpoint-6" / SEAL).is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"table": "def"}, "table was 'abc', is 'def'"),
        ({"training": {"learning_rate": 1e-3, "seed": 2}}, "training.seed was 1, is 2"),
        ({"regularizer": {"lambda_query": 0.2}}, "regularizer.lambda_query was 0.1, is 0.2"),
        ({"student": 1}, r"student was '\(absent\)', is 1"),
        ({"table": 1, "training": 1, "regularizer": 1, "student": 1}, "regularizer was .*student was .*table was .* and 1 more;"),
    ],
)
def test_what_differs_is_named(written: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint-6: belongs to experiment key, expected key2: {message}"):
        newest_whole_checkpoint(written, "key2", {**FIELDS, **changed})


def test_other_fields_under_the_same_key_are_refused_too(written: Path) -> None:
    with pytest.raises(ValueError, match="belongs to experiment key, expected key: table was 'abc', is 'def'"):
        newest_whole_checkpoint(written, "key", {**FIELDS, "table": "def"})


@pytest.fixture(scope="module")
def two_steps(
    make_recipe: Callable[..., Recipe],
    make_table_in: Callable[..., ScoreTable],
    collection: Collection,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Recipe, ScoreTable, Path]:
    """A run of two steps: its recipe, its table, and its work folder, which refusals leave as it is."""
    recipe = make_recipe(max_steps=2, run={"save_steps": 1})
    folder = tmp_path_factory.mktemp("two-steps")
    table, work = make_table_in(folder / "cache", recipe), folder / "work"
    train(recipe, table, collection, work_folder=work, key="key")
    return recipe, table, work


@pytest.mark.parametrize(
    ("section", "setting", "named"),
    [
        ("training", {"learning_rate": 2e-3}, r"training\.learning_rate was 0\.001, is 0\.002"),
        ("training", {"loss": "SparseMarginMSELoss"}, r"training\.loss\."),
        ("student", {"lambda_passage": 0.5}, r"regularizer\.lambda_passage was 0\.08, is 0\.5"),
        ("student", {"max_length": 16}, r"student\.max_length was 32, is 16"),
    ],
)
def test_a_run_of_another_experiment_is_refused_with_the_name_of_what_differs(
    two_steps: tuple[Recipe, ScoreTable, Path], collection: Collection, section: str, setting: dict[str, Any], named: str
) -> None:
    recipe, table, work = two_steps
    document = recipe.model_dump(mode="json")
    other = Recipe.model_validate({**document, section: {**document[section], **setting}})

    with pytest.raises(ValueError, match=rf"checkpoint-2: belongs to experiment key, expected key: {named}"):
        train(other, table, collection, work_folder=work, key="key")


def test_a_table_of_other_labels_is_refused_with_the_name_of_what_differs(
    make_recipe: Callable[..., Recipe], make_table: Callable[..., ScoreTable], collection: Collection, tmp_path: Path
) -> None:
    recipe, other = (make_recipe(max_steps=2, loss="SparseMarginMSELoss", labels={"num_negatives": n}) for n in (2, 3))
    train(recipe, make_table(recipe), collection, work_folder=tmp_path / "work", key="key")

    with pytest.raises(ValueError, match=r"belongs to experiment key, expected key: .*table_fields\.num_negatives was 2, is 3"):
        train(other, make_table(other), collection, work_folder=tmp_path / "work", key="key")


def test_the_newest_is_the_one_of_the_highest_step_not_of_the_highest_name(written: Path) -> None:
    (written / "checkpoint-6").rename(written / "checkpoint-10")

    assert newest_whole_checkpoint(written, "key", FIELDS) == written / "checkpoint-10"


def test_a_checkpoint_without_a_seal_was_never_finished(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    (written / "checkpoint-6" / SEAL).unlink()

    assert newest_whole_checkpoint(written, "key", FIELDS) == written / "checkpoint-4"
    assert "checkpoint-6: torn (it was never finished)" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"files": 3}', '{"key": "key"}', '{"seal": "x", "files": 3}', "\udcff"])
def test_an_unreadable_seal_is_a_torn_checkpoint(written: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    (written / "checkpoint-6" / SEAL).write_text(content, encoding="utf-8", errors="surrogateescape")

    assert newest_whole_checkpoint(written, "key", FIELDS) == written / "checkpoint-4"
    assert f"torn ({SEAL} is unreadable)" in caplog.text


def test_a_seal_that_says_other_fields_than_it_was_written_with_is_a_torn_checkpoint(
    written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written / "checkpoint-6" / SEAL
    path.write_text(path.read_text(encoding="utf-8").replace('"table": "abc"', '"table": "abd"'), encoding="utf-8")

    assert newest_whole_checkpoint(written, "key", FIELDS) == written / "checkpoint-4"
    assert f"torn ({SEAL} has changed)" in caplog.text


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "nothing", "key", FIELDS) is None


def test_a_seal_lists_every_file_but_itself(written: Path) -> None:
    (written / "checkpoint-4" / "deep").mkdir()
    (written / "checkpoint-4" / "deep" / "file").write_bytes(b"x")

    seal(written / "checkpoint-4", "key", FIELDS)

    files = json.loads((written / "checkpoint-4" / SEAL).read_text(encoding="utf-8"))["files"]
    assert sorted(files) == ["deep/file", "model.safetensors"]
