"""The OpenVINO backend against torch, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from sparsekd.artifact import key_of
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.cross_encoder import CrossEncoderScorer
from sparsekd.teachers.identity import teacher_identity

Pairs = list[tuple[str, str]]


def teacher(folder: Path, **fields: Any) -> Teacher:
    return Teacher(**{"name": "c", "kind": "cross-encoder", "model": str(folder), **fields})


@pytest.fixture
def pairs(draw_texts: Callable[..., list[str]]) -> Pairs:
    return list(zip(draw_texts(60, longest=10), draw_texts(60, longest=120, seed=1), strict=True))


@pytest.fixture
def _openvino() -> None:
    pytest.importorskip("openvino", reason="extra openvino")


@pytest.mark.usefixtures("_openvino")
@pytest.mark.parametrize("batch_tokens", [16, 8192])
def test_openvino_scores_equal_torchs(tiny_cross_encoder_folder: Path, pairs: Pairs, batch_tokens: int) -> None:
    expected = CrossEncoderScorer(teacher(tiny_cross_encoder_folder), Run()).score(pairs)
    scorer = CrossEncoderScorer(teacher(tiny_cross_encoder_folder, backend="openvino"), Run(batch_tokens=batch_tokens))

    scores = scorer.score(pairs)

    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scorer.num_truncated > 0


@pytest.mark.usefixtures("_openvino")
def test_openvino_keeps_its_weights_when_torchs_are_gone(tiny_cross_encoder_folder: Path, pairs: Pairs) -> None:
    import gc

    import torch

    scorer = CrossEncoderScorer(teacher(tiny_cross_encoder_folder, backend="openvino"), Run())
    first = scorer.score(pairs[:1])
    gc.collect()
    _ = [torch.full((size,), float("nan")) for size in (32, 64, 1024, 2048, 4096, 8192) * 50]  # what freed memory would hold

    scores = scorer.score(pairs)

    assert scores[0] == pytest.approx(first[0], abs=1e-5)
    np.testing.assert_allclose(scores, CrossEncoderScorer(teacher(tiny_cross_encoder_folder), Run()).score(pairs), atol=1e-5)


@pytest.mark.usefixtures("_openvino")
def test_int8_scores_are_near_and_depend_on_no_other_pair_of_the_batch(tiny_cross_encoder_folder: Path, pairs: Pairs) -> None:
    expected = CrossEncoderScorer(teacher(tiny_cross_encoder_folder), Run()).score(pairs)
    fields = {"backend": "openvino", "quantization": "int8"}

    together, alone = (
        CrossEncoderScorer(teacher(tiny_cross_encoder_folder, **fields), Run(batch_tokens=tokens)).score(pairs)
        for tokens in (8192, 16)
    )

    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.corrcoef(together, expected)[0, 1] > 0.98
    assert abs(together - expected).max() > 1e-4


@pytest.mark.usefixtures("_openvino")
def test_bfloat16_scores_are_near_where_the_cpu_has_it_and_refused_elsewhere(tiny_cross_encoder_folder: Path, pairs: Pairs) -> None:
    from openvino import Core

    scorer = CrossEncoderScorer(teacher(tiny_cross_encoder_folder, backend="openvino", dtype="bfloat16"), Run())
    if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ValueError, match=r'dtype = "bfloat16", but this CPU computes .*; set dtype = "float32"'):
            scorer.score(pairs)
        return

    scores = scorer.score(pairs)

    expected = CrossEncoderScorer(teacher(tiny_cross_encoder_folder), Run()).score(pairs)
    assert np.corrcoef(scores, expected)[0, 1] > 0.99
    assert 1e-5 < abs(scores - expected).max()


@pytest.mark.usefixtures("_openvino")
def test_openvino_takes_models_without_token_types(tmp_path: Path, pairs: Pairs) -> None:
    import torch
    import transformers

    tokenizer = transformers.BertTokenizerFast(
        vocab={token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heat", "of"])},
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(tmp_path)
    config = transformers.DistilBertConfig(
        vocab_size=8, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64, num_labels=1, initializer_range=0.2
    )
    torch.manual_seed(0)
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)

    found, expected = (
        CrossEncoderScorer(teacher(tmp_path, backend=backend), Run()).score(pairs) for backend in ("openvino", "torch")
    )

    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("_openvino")
def test_openvino_on_a_gpu_is_refused(tiny_cross_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekd.teachers.openvino_model import OpenVINOClassifier

    with pytest.raises(ValueError, match=r'backend = "openvino" runs on the CPU, and \[run\] device = \'cuda\''):
        OpenVINOClassifier(None, teacher(tiny_cross_encoder_folder, backend="openvino"), Run(device="cuda"), has_types=True)


def test_a_missing_openvino_is_said_with_what_to_do(tiny_cross_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    scorer = CrossEncoderScorer(teacher(tiny_cross_encoder_folder, backend="openvino"), Run())

    with pytest.raises(ValueError, match=r'teacher \'c\': backend = "openvino" needs the package openvino .*; install the extra'):
        scorer.score([("a", "b")])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dense", "backend": "openvino"}, 'computes cross-encoders, and kind is "dense"'),
        ({"backend": "openvino", "dtype": "float16"}, 'takes dtype "float32" or "bfloat16"'),
        ({"backend": "openvino", "trust_remote_code": True}, "no trust_remote_code"),
        ({"quantization": "int8"}, 'needs backend = "openvino" and dtype = "float32"'),
        ({"quantization": "int8", "backend": "openvino", "dtype": "bfloat16"}, 'needs backend = "openvino" and dtype'),
    ],
)
def test_what_a_backend_does_not_compute_is_refused_by_the_recipe(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        teacher(Path("m"), **fields)


def test_backend_and_quantization_are_part_of_the_key(tiny_cross_encoder_folder: Path) -> None:
    variants: list[dict[str, str]] = [{}, {"backend": "openvino"}, {"backend": "openvino", "quantization": "int8"}]

    assert len({key_of(teacher_identity(teacher(tiny_cross_encoder_folder, **fields))) for fields in variants}) == 3


def test_torchs_identity_has_no_field_for_what_it_does_not_do(tiny_cross_encoder_folder: Path) -> None:
    fields = teacher_identity(teacher(tiny_cross_encoder_folder))

    assert fields["backend"] == "torch"
    assert {*fields} == {
        "stage",
        "kind",
        "activation",
        "weights",
        "max_length",
        "query_prompt",
        "passage_prompt",
        "dtype",
        "backend",
        "trust_remote_code",
    }
