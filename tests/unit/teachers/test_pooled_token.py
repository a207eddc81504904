"""Classifiers without padding, their last layer for the pooled token only, against the models as transformers runs them."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.cross_encoder import CrossEncoderScorer

SHORTENED = ["Bert", "DistilBert", "Roberta", "XLMRoberta", "Camembert", "Electra"]
TEXTS = [17, 17, 9, 9, 9, 4, 1]


def tiny_transformer(architecture: str, **overrides: Any) -> Any:
    """Return what sentence-transformers' Transformer is to ``pack``: a model, and where its positions start."""
    import torch
    import transformers
    from sentence_transformers.base.modules import Transformer

    class Around:
        def __init__(self, model: Any) -> None:
            self.model = model

        _infer_flatten_position_offset = Transformer._infer_flatten_position_offset

    if architecture == "DistilBert":
        sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
        sizes |= {"embedding_size": 32} if architecture == "Electra" else {}
    config = getattr(transformers, architecture + "Config")(
        **sizes, vocab_size=90, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, num_labels=1, **overrides
    )
    torch.manual_seed(0)
    return Around(getattr(transformers, architecture + "ForSequenceClassification")(config).eval())


def random_texts(model: Any) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, model.config.vocab_size, (length,), generator=generator) for length in TEXTS]


def one_by_one(model: Any, texts: list[Any]) -> Any:
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=text.unsqueeze(0)).logits for text in texts])


@pytest.mark.parametrize("architecture", SHORTENED)
def test_logits_of_a_shortened_last_layer_equal_the_whole_models(architecture: str) -> None:
    import torch

    from sparsekd.teachers.pooled_token import pack, packed_logits, position_offset

    transformer = tiny_transformer(architecture)
    texts = random_texts(transformer.model)
    expected = one_by_one(transformer.model, texts)

    reason = pack(transformer)

    assert reason is None
    with torch.inference_mode():
        found = packed_logits(transformer.model, torch.cat(texts), None, TEXTS, position_offset(transformer))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert float(expected.std()) > 1e-2


@pytest.mark.parametrize("architecture", SHORTENED)
def test_the_last_feed_forward_sees_one_token_of_each_text(architecture: str) -> None:
    import torch

    from sparsekd.teachers.pooled_token import pack, packed_logits, position_offset

    transformer = tiny_transformer(architecture)
    assert pack(transformer) is None
    seen: list[int] = []
    for module in transformer.model.modules():
        if isinstance(module, torch.nn.Linear) and module.in_features == 32 and module.out_features == 64:
            module.register_forward_pre_hook(lambda _, states: seen.append(states[0].numel() // 32))

    texts = random_texts(transformer.model)
    packed_logits(transformer.model, torch.cat(texts), None, TEXTS, position_offset(transformer))

    assert seen == [sum(TEXTS), sum(TEXTS), len(TEXTS)]


@pytest.mark.parametrize("architecture", SHORTENED)
def test_a_shortened_last_layer_takes_texts_of_one_length_as_they_are(architecture: str) -> None:
    import torch

    from sparsekd.teachers.pooled_token import shorten_last_layer

    model = tiny_transformer(architecture).model
    texts = torch.randint(3, 90, (5, 11), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(input_ids=texts).logits

        assert shorten_last_layer(model)
        np.testing.assert_allclose(model(input_ids=texts).logits, expected, atol=1e-5)


def test_a_gpus_attention_from_first_tokens_equals_the_cpus() -> None:
    import torch

    from sparsekd.teachers.pooled_token import _attend_padded, _attend_runs

    generator = torch.Generator().manual_seed(3)
    query = torch.randn(len(TEXTS), 4, 1, 8, generator=generator)
    key, value = torch.randn(2, sum(TEXTS), 4, 8, generator=generator)
    cu_seq_lens = torch.tensor([0, *itertools.accumulate(TEXTS)], dtype=torch.int32)

    padded = _attend_padded(query, key, value, cu_seq_lens, max(TEXTS), 0.3)

    np.testing.assert_allclose(padded, _attend_runs(query, key, value, TEXTS, 0.3), atol=1e-6)


def test_another_architecture_is_packed_with_its_whole_last_layer() -> None:
    import torch

    from sparsekd.teachers.pooled_token import pack, packed_logits, shorten_last_layer

    transformer = tiny_transformer("ModernBert", classifier_pooling="cls", local_attention=8)
    texts = random_texts(transformer.model)
    expected = one_by_one(transformer.model, texts)

    assert pack(transformer) is None
    with torch.inference_mode():
        np.testing.assert_allclose(packed_logits(transformer.model, torch.cat(texts), None, TEXTS, 0), expected, atol=1e-5)
    assert not shorten_last_layer(transformer.model)


def test_a_head_over_the_mean_of_all_tokens_stays_padded() -> None:
    from sparsekd.teachers.pooled_token import pack

    assert pack(tiny_transformer("ModernBert", classifier_pooling="mean")) == (
        "ModernBertForSequenceClassification: its head pools the mean of all tokens, not the first"
    )


def test_a_model_that_packing_would_change_stays_as_it_was() -> None:
    from sparsekd.teachers.pooled_token import pack

    transformer = tiny_transformer("Bert")
    transformer._infer_flatten_position_offset = lambda: 1  # wrong for BERT
    texts = random_texts(transformer.model)
    before = one_by_one(transformer.model, texts)

    reason = pack(transformer)

    assert reason is not None
    assert "logits without padding differ by" in reason
    np.testing.assert_array_equal(one_by_one(transformer.model, texts), before)


def test_scores_with_and_without_padding_are_equal(
    tiny_cross_encoder_folder: Path, draw_texts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sparsekd")
    pairs = list(zip(draw_texts(40, longest=10), draw_texts(40, longest=90, seed=1), strict=True))
    teacher = Teacher(name="c", kind="cross-encoder", model=str(tiny_cross_encoder_folder))

    packed, padded = (CrossEncoderScorer(teacher, Run(packed=packed)).score(pairs) for packed in (True, False))

    np.testing.assert_allclose(packed, padded, atol=1e-5)
    assert [record.getMessage() for record in caplog.records if "padding" in record.getMessage()] == [
        "teacher c: with padding: [run] packed = false"
    ]
