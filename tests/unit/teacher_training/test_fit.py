"""A tiny cross-encoder, trained whole: what is kept, what stops it, what goes on after a signal."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsekd.artifact import IntegrityError, read_manifest
from sparsekd.dry_run import describe_plan
from sparsekd.experiment import Experiment, candidates, score_table, trained_teacher
from sparsekd.gate import ndcg
from sparsekd.plan import Plan
from sparsekd.recipe import Recipe
from sparsekd.training.stopping import StoppedError
from sparsekd.training.trainer import NonFiniteError

MakeOwn = Callable[..., Experiment]


def scores(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu").predict(pairs)


def measured(folder: Path) -> dict[int, float]:
    """Dev nDCG@10 by step, as the log has it."""
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["eval_ndcg@10"] for entry in log if "eval_ndcg@10" in entry}


def test_the_result_is_a_plain_cross_encoder_with_a_card_found_again_and_by_name(make_own: MakeOwn) -> None:
    experiment = make_own()

    made = trained_teacher(experiment)

    counts, mined = read_manifest(made.folder)["counts"], list(candidates(experiment))
    assert counts["rows"] == sum(len(row.positive_ids) for row in mined if len(row.passage_ids) >= 2) > 0
    assert counts["rows_dropped"] == sum(len(row.positive_ids) for row in mined if len(row.passage_ids) < 2)
    assert counts["pairs"] == 3 * counts["rows"]
    assert counts["steps"] == 4
    assert counts["best_step"] == max(measured(made.folder), key=measured(made.folder).__getitem__)
    assert scores(made.folder, [("what is heat", "heat is power")]).shape == (1,)
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert "# Cross-encoder own" in card
    assert "LambdaLoss" in card
    assert str(experiment.recipe.train_teacher and experiment.recipe.train_teacher.model) not in card  # a path of this machine
    assert trained_teacher(make_own()).key == made.key
    assert Path(make_own().teacher("own").reference) == made.folder
    assert not list(made.folder.parent.glob("*.work"))


@pytest.mark.parametrize("loss", ["LambdaLoss", "ListNetLoss", "RankNetLoss"])
def test_each_loss_learns_the_rows(make_own: MakeOwn, loss: str) -> None:
    made = trained_teacher(make_own(loss=loss, max_steps=30, dev_steps=30, warmup_ratio=0.0))

    log = json.loads((made.folder / "training.json").read_text(encoding="utf-8"))
    values = [entry["loss"] for entry in log if "loss" in entry]
    assert values[-1] < values[0] - 0.05


def test_the_dev_figure_is_that_of_the_published_weights(make_own: MakeOwn) -> None:
    experiment = make_own()
    made, collection = trained_teacher(experiment), experiment.collection
    judged = collection.qrels["dev"]

    found = experiment.bm25_passages([collection.queries[query_id] for query_id in judged], 10)
    figures = []
    for (query_id, grades), passage_ids in zip(judged.items(), found, strict=True):
        logits = scores(made.folder, [(collection.queries[query_id], collection.passages[each]) for each in passage_ids])
        order = [passage_ids[place] for place in np.argsort(-logits, kind="stable")]
        figures.append(ndcg(order, grades))

    assert read_manifest(made.folder)["dev_nDCG@10"]["reranked"] == pytest.approx(np.mean(figures), abs=1e-6)
    assert max(measured(made.folder).values()) == pytest.approx(np.mean(figures), abs=1e-6)


def test_the_last_step_is_measured_too(make_own: MakeOwn) -> None:
    made = trained_teacher(make_own(max_steps=3, dev_steps=2))

    assert [*measured(made.folder)] == [2, 3]


def test_training_stops_when_patience_runs_out(make_own: MakeOwn) -> None:
    # A rate of nearly nothing changes no order, so nothing after the first measurement is better.
    made = trained_teacher(make_own(learning_rate=1e-12, max_steps=12, dev_steps=2, patience=2))

    assert [*measured(made.folder)] == [2, 4, 6]
    assert read_manifest(made.folder)["counts"]["best_step"] == 2


def test_training_that_a_signal_ended_goes_on_to_the_same_weights(make_own: MakeOwn, tmp_path: Path) -> None:
    pairs = [("what is heat", "heat is power"), ("who", "a king of norman france")]
    uninterrupted = trained_teacher(make_own())
    expected, kept = scores(uninterrupted.folder, pairs), measured(uninterrupted.folder)
    shutil.rmtree(uninterrupted.folder)
    handler = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("sparsekd.teacher_training.fit")

    def end(record: logging.LogRecord) -> bool:
        if "step 2 of 4: dev" in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    logger.addFilter(end)
    try:
        logger.setLevel(logging.INFO)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 3 of 4"):
            trained_teacher(make_own())
    finally:
        logger.removeFilter(end)
        logger.setLevel(logging.NOTSET)
    made = trained_teacher(make_own())

    assert signal.getsignal(signal.SIGTERM) == handler
    assert read_manifest(made.folder)["counts"]["resumed_from_step"] == 3
    assert measured(made.folder) == kept
    np.testing.assert_array_equal(scores(made.folder, pairs), expected)


def test_a_loss_that_is_not_finite_stops_training_and_publishes_nothing(make_own: MakeOwn) -> None:
    experiment = make_own(learning_rate=1e38, warmup_ratio=0.0, weight_decay=0.0)

    with pytest.raises(NonFiniteError, match=r"step \d: gradient norm is nan; first query of the batch: .* Lower"):
        trained_teacher(experiment)

    assert not list(experiment.plan.cache.glob("teachers/*/manifest.json"))
    assert not list(experiment.plan.cache.glob("teachers/names/*"))


def test_candidates_are_those_of_stage_1(make_own: MakeOwn) -> None:
    mined = candidates(make_own())

    made = trained_teacher(make_own())

    assert read_manifest(made.folder)["fields"]["candidates"] == mined.key
    assert [path.name for path in (make_own().plan.cache / "candidates").iterdir() if path.is_dir()] == [mined.key]


def test_a_teacher_by_name_scores_under_the_fingerprint_of_its_weights(make_own: MakeOwn) -> None:
    made = trained_teacher(make_own())
    by_name = make_own()

    table = score_table(by_name)

    document = by_name.recipe.model_dump(mode="json", exclude={"train_teacher"})
    document["teachers"] = [{"name": "own", "kind": "cross-encoder", "model": str(made.folder)}]
    by_path = Experiment(Plan(Recipe.model_validate_json(json.dumps(document))))
    assert by_path.plan.teacher_identities == by_name.plan.teacher_identities
    assert score_table(by_path).key == table.key
    assert table.counts["pairs_scored"] == table.counts["pairs"] > 0


def test_a_teacher_that_was_not_trained_stops_every_plan_that_needs_it(make_own: MakeOwn) -> None:
    with pytest.raises(FileNotFoundError, match=r"'trained:own': no cross-encoder was trained .* make train-teacher"):
        make_own().plan.table_fields  # noqa: B018


def test_a_name_trained_from_other_settings_is_used_with_a_warning(make_own: MakeOwn, caplog: pytest.LogCaptureFixture) -> None:
    made = trained_teacher(make_own())
    caplog.clear()

    assert make_own(seed=7).teacher("own").reference == str(made.folder)
    assert "was trained with other settings, this recipe would train" in caplog.text


def test_a_recipe_means_its_own_teacher_whatever_its_name_was_given_to_since(
    make_own: MakeOwn, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained_teacher(make_own())
    last = trained_teacher(make_own(max_steps=2))
    caplog.clear()

    assert make_own().teacher("own").reference == str(first.folder)
    assert make_own(max_steps=2).teacher("own").reference == str(last.folder)
    assert not caplog.records


def test_weights_changed_after_training_are_refused_as_damage(make_own: MakeOwn) -> None:
    made = trained_teacher(make_own())
    (made.folder / "model.safetensors").write_bytes(b"cut")

    with pytest.raises(IntegrityError, match="3 bytes, its manifest says"):
        trained_teacher(make_own())
    with pytest.raises(IntegrityError, match="3 bytes, its manifest says"):
        make_own().teacher("own")


def test_a_dry_run_says_whether_the_teacher_is_there(make_own: MakeOwn) -> None:
    kinds = ["candidates", "teachers"]
    before = describe_plan(make_own().plan, kinds)

    made = trained_teacher(make_own())

    assert before.endswith("order of work: candidates -> teachers")
    assert f"teachers     {made.key}  miss" in before
    after = describe_plan(make_own().plan, kinds)
    assert f"teachers     {made.key}  hit" in after
    assert after.endswith("order of work: nothing to do")


def test_several_processes_are_refused(make_own: MakeOwn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ValueError, match=r"\[train_teacher\] trains in one process, and a launcher started several"):
        trained_teacher(make_own())


def test_a_dev_split_that_sampling_left_empty_is_refused_before_the_body_is_loaded(make_own: MakeOwn) -> None:
    experiment = make_own({"max_passages": 12})

    with pytest.raises(ValueError, match=r"no dev query has judgements \(splits with judgements: train, test\)"):
        trained_teacher(experiment)

    assert not list(experiment.plan.cache.glob("teachers/*.work"))


def test_a_collection_without_a_train_split_is_refused_by_the_missing_file(
    make_own: MakeOwn, sample_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sample_folder, tmp_path / "collection")
    (folder / "qrels" / "train.tsv").unlink()

    with pytest.raises(FileNotFoundError, match=r"qrels/train.tsv: no such file; expected it in the collection"):
        trained_teacher(make_own({"path": str(folder)}))


def test_a_recipe_without_the_section_is_refused(make_own: MakeOwn) -> None:
    recipe = make_own().recipe.model_copy(update={"train_teacher": None})

    with pytest.raises(ValueError, match=r"the recipe has no \[train_teacher\]"):
        trained_teacher(Experiment(Plan(recipe)))
