"""From a body to a cross-encoder, what is refused of it, and its forward pass by groups of near-equal length."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder

from sparsekd.recipe import TrainTeacher
from sparsekd.teacher_training import body
from sparsekd.teacher_training.body import build_cross_encoder, grouped_by_length, num_cut

MakeSection = Callable[..., TrainTeacher]
PAIRS = [
    ("what is heat", "heat is a flow of power"),
    ("who", "a"),
    ("where is the tower", "the tower is in the city by the river and the bridge is on the river near the old school"),
    ("why does it rain", "rain"),
]


def test_a_body_without_a_head_gets_one_from_the_seed_and_says_so_without_a_warning(
    make_section: MakeSection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsekd")

    models = [build_cross_encoder(make_section(seed=seed), "cpu") for seed in (3, 3, 4)]

    heads = [model[0].model.classifier.weight for model in models]
    assert models[0].num_labels == 1
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    said = [record for record in caplog.records if "drawn at random" in record.message]
    assert said[0].message.startswith("train-teacher: classifier.bias, classifier.weight drawn at random with seed 3")
    assert {record.levelname for record in caplog.records if record.name.startswith("sparsekd")} == {"INFO"}


def test_the_transformer_of_a_bi_encoder_is_a_body(make_section: MakeSection, tiny_encoder_folder: Path) -> None:
    model = build_cross_encoder(make_section(model=str(tiny_encoder_folder)), "cpu")

    assert model.predict(PAIRS).shape == (len(PAIRS),)


def test_a_cross_encoder_is_trained_on_with_its_own_head(
    make_section: MakeSection, tiny_cross_encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsekd")
    before = CrossEncoder(str(tiny_cross_encoder_folder), device="cpu", activation_fn=torch.nn.Identity())

    model = build_cross_encoder(make_section(model=str(tiny_cross_encoder_folder)), "cpu")

    assert torch.equal(torch.from_numpy(model.predict(PAIRS)), torch.from_numpy(before.predict(PAIRS)))
    assert "drawn at random" not in caplog.text


def test_groups_by_length_give_the_plain_model_s_scores_and_gradients(
    make_section: MakeSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "_GROUP_TOKENS", 20)  # several groups of one or two pairs
    model = build_cross_encoder(make_section(), "cpu").eval()
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5])

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        scores = model(model.preprocess(PAIRS))["scores"].view(-1)
        (scores * weight).sum().backward()
        return scores.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain_scores, plain_gradients = run()
    with grouped_by_length(model):
        scores, gradients = run()

    torch.testing.assert_close(scores, plain_scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-5)


def test_groups_by_length_pass_no_column_that_is_padding_to_all_of_a_group(
    make_section: MakeSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "_GROUP_TOKENS", 1)  # every pair alone
    model, seen = build_cross_encoder(make_section(), "cpu").eval(), []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0]["input_ids"].shape)))

    with grouped_by_length(model), torch.no_grad():
        lengths = model.preprocess(PAIRS)["attention_mask"].sum(1).tolist()
        model(model.preprocess(PAIRS))

    assert seen == [(1, length) for length in sorted(lengths, reverse=True)]


def test_pairs_that_lose_text_are_counted(make_section: MakeSection) -> None:
    section = make_section(max_length=12)
    columns = {"query": ["what is heat", "who"], "passages": [["heat", "heat is a flow of power"], ["a", "a " * 20]]}

    # 3 special tokens: 3 + 1, 3 + 6, 1 + 1, 1 + 20 tokens of text
    assert num_cut(build_cross_encoder(section, "cpu"), section, columns) == (1, 4)
    assert num_cut(build_cross_encoder(section, "cpu"), make_section(max_length=11), columns) == (2, 4)


def save_decoder(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    return folder


def refusal(section: TrainTeacher) -> str:
    with pytest.raises(ValueError, match=r"\[train_teacher\]") as caught:
        build_cross_encoder(section, "cpu")
    return str(caught.value)


def test_a_decoder_is_refused(make_section: MakeSection, tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "decoder")

    assert "is a gpt2 model (GPT2LMHeadModel); expected an encoder" in refusal(make_section(model=str(folder)))


def test_a_head_of_two_labels_is_refused(
    make_section: MakeSection, save_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_tiny_model("BertForSequenceClassification", tmp_path / "two", num_labels=2)

    assert "classifier.bias, classifier.weight have other shapes than with one label" in refusal(make_section(model=str(folder)))


def test_a_body_without_all_its_weights_is_refused(
    make_section: MakeSection, tiny_headless_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_headless_folder, tmp_path / "torn")
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layer.1.output.dense.weight" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert "lacks 1 weights of its body (bert.encoder.layer.1.output.dense.weight)" in refusal(make_section(model=str(folder)))


def test_more_tokens_than_positions_are_refused(make_section: MakeSection) -> None:
    section = make_section(max_length=129)

    assert refusal(section) == f"[train_teacher] max_length = 129: {section.model} has 128 positions; lower it"


def test_a_tokenizer_without_a_template_for_pairs_is_refused(
    make_section: MakeSection, tiny_headless_folder: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(tiny_headless_folder, tmp_path / "single")
    plain = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)

    assert "its tokenizer puts nothing between the texts of a pair" in refusal(make_section(model=str(folder)))
