"""What decides a trained cross-encoder, and what its name means. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekd.artifact import key_of, publish
from sparsekd.recipe import TrainTeacher
from sparsekd.teacher_training.identity import KIND, find_trained, give_name, trained_teacher_fields

MakeSection = Callable[..., TrainTeacher]


def key(section: TrainTeacher, candidates: str = "c", dev: str = "d") -> str:
    return key_of(trained_teacher_fields(section, candidates, {"qrels": dev}))


def test_name_and_place_of_the_body_enter_no_key(
    make_section: MakeSection, tiny_headless_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_headless_folder, tmp_path / "elsewhere")

    assert key(make_section(name="another", model=str(copy))) == key(make_section())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 32}, {"loss": "RankNetLoss"}, {"num_negatives": 3}, {"batch_size": 2}, {"epochs": 2.0}, {"max_steps": 9},
        {"learning_rate": 1e-4}, {"warmup_ratio": 0.0}, {"weight_decay": 0.0}, {"max_grad_norm": 2.0}, {"seed": 1},
        {"precision": "bfloat16"}, {"dev_steps": 5}, {"dev_queries": 5}, {"dev_depth": 5}, {"patience": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_every_setting_that_acts_changes_the_key(make_section: MakeSection, settings: dict[str, object]) -> None:
    assert key(make_section(**settings)) != key(make_section())


def test_epochs_change_no_key_beside_max_steps(make_section: MakeSection) -> None:
    assert key(make_section(epochs=2.0, max_steps=9)) == key(make_section(max_steps=9))


def test_other_weights_candidates_or_dev_judgements_change_the_key(
    make_section: MakeSection, tiny_masked_lm_folder: Path
) -> None:
    section = make_section()

    keys = [key(section), key(make_section(model=str(tiny_masked_lm_folder))), key(section, "other"), key(section, dev="other")]

    assert len({*keys}) == 4


def test_a_name_means_the_folder_trained_last_under_it(tmp_path: Path) -> None:
    for number in (1, 2):
        fields = {"number": number}
        with publish(tmp_path / KIND / key_of(fields), kind="teacher", fields=fields, extra={}) as folder:
            (folder / "weights").write_text(str(number), encoding="utf-8")
    first, second = key_of({"number": 1}), key_of({"number": 2})

    assert give_name(tmp_path, "own", first) is None
    assert find_trained(tmp_path, "trained:own") == tmp_path / KIND / first
    assert give_name(tmp_path, "own", second) == first
    assert find_trained(tmp_path, "trained:own") == tmp_path / KIND / second
    assert give_name(tmp_path, "own", second) is None


def test_a_name_that_was_never_trained_is_refused_with_the_command(tmp_path: Path) -> None:
    give_name(tmp_path, "other", "0" * 16)

    with pytest.raises(FileNotFoundError) as caught:
        find_trained(tmp_path, "trained:own")

    assert str(caught.value) == (
        f"[[teachers]] model = 'trained:own': no cross-encoder was trained under that name (names in {tmp_path / KIND}: other); "
        'train it first: make train-teacher RECIPE=..., with [train_teacher] name = "own" in the recipe'
    )
