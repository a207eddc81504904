"""Low-rank adapters: what they train, what a checkpoint keeps of them, and that a saved student has none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsekd.recipe import Student
from sparsekd.students.adapters import ADAPTERS, has_adapters, load_checkpoint, merge_adapters
from sparsekd.students.building import build_student
from sparsekd.students.fast import fast_student
from sparsekd.students.masked_lm import head_parameters

Section = Callable[..., Student]

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install 'sparsekd[lora]'")
SETTINGS: dict[str, dict[str, Any]] = {
    "splade": {},
    "passage-expansion": {"expansion": "passage", "static_weights": "ones"},
    "csr": {"kind": "csr", "hidden_dim": 128, "k": 8, "k_aux": 16},
}


@pytest.fixture
def adapted(student_section: Section, tiny_headless_folder: Path, tiny_encoder_folder: Path) -> Callable[..., tuple[Any, Any]]:
    """Return ``make(name)``: (the student without adapters, the same with adapters of rank 2)."""

    def make(name: str) -> tuple[Any, Any]:
        folder = tiny_encoder_folder if name == "csr" else tiny_headless_folder
        section = student_section(folder, **SETTINGS[name], dropout=0.0)
        return build_student(section, folder), build_student(section.model_copy(update={"lora_rank": 2}), folder)

    return make


def passages_of(model: Any, texts: list[str]) -> torch.Tensor:
    return model.encode_document(texts).to_dense()


def take_a_step(model: Any, texts: list[str]) -> None:
    """Move every trainable parameter that the passages reach, without an optimizer."""
    model.train()
    task = {"task": "document"} if hasattr(model[0], "sub_modules") else {}
    features = model.preprocess(texts, **task)
    model(features, **task)["sentence_embedding"].sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign() * 0.01)
                parameter.grad = None
    model.eval()


@needs_peft
@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_start_without_effect(adapted: Callable[..., Any], texts: list[str], name: str) -> None:
    plain, model = adapted(name)

    assert has_adapters(model)
    torch.testing.assert_close(passages_of(model, texts), passages_of(plain, texts))


@needs_peft
@pytest.mark.parametrize("name", SETTINGS)
def test_the_body_stays_while_adapters_and_head_learn(adapted: Callable[..., Any], texts: list[str], name: str) -> None:
    plain, model = adapted(name)
    body = next(module for module in plain.modules() if type(module).__name__ == "Transformer").model
    head = {id(parameter) for parameter in head_parameters(body)}
    in_body = {id(parameter) for parameter in body.parameters()} - head
    fixed = {title for title, parameter in plain.named_parameters() if id(parameter) in in_body}

    trainable = {title for title, parameter in model.named_parameters() if parameter.requires_grad}

    assert {title.replace(".base_layer", "") for title in trainable} & fixed == set()
    assert sum("lora_" in title for title in trainable) == 8  # 2 layers, query and value, A and B
    assert {title for title in trainable if "lora_" not in title} == {title for title, _ in plain.named_parameters()} - fixed


@needs_peft
@pytest.mark.parametrize("name", SETTINGS)
def test_merging_keeps_the_vectors_and_leaves_plain_weights(adapted: Callable[..., Any], texts: list[str], name: str) -> None:
    plain, model = adapted(name)
    take_a_step(model, texts)
    take_a_step(model, texts)  # B is zero before the first, so only the second moves A
    trained = passages_of(model, texts)

    merge_adapters(model)

    assert not has_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(passages_of(model, texts), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, passages_of(plain, texts), atol=1e-3)


@needs_peft
@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_is_plain_and_holds_what_training_goes_on_from(
    tmp_path: Path, adapted: Callable[..., Any], texts: list[str], name: str
) -> None:
    from sentence_transformers import SparseEncoder

    _, model = adapted(name)
    take_a_step(model, texts)
    take_a_step(model, texts)
    model.save_pretrained(str(tmp_path / "checkpoint"), create_model_card=False)
    fresh = adapted(name)[1]

    load_checkpoint(fresh, tmp_path / "checkpoint")

    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in fresh.state_dict().items())
    plain = SparseEncoder(str(tmp_path / "checkpoint"), device="cpu")
    torch.testing.assert_close(passages_of(plain, texts), passages_of(model, texts), rtol=1e-4, atol=1e-5)
    assert has_adapters(model)  # saving changes nothing


@needs_peft
def test_adapters_learn_and_are_saved_while_the_fast_forward_pass_lasts(
    tmp_path: Path, adapted: Callable[..., Any], texts: list[str]
) -> None:
    _, model = adapted("splade")
    _, slow = adapted("splade")

    with fast_student(model, packed=True, fused=True):
        take_a_step(model, texts)
        model.save_pretrained(str(tmp_path / "checkpoint"), create_model_card=False)

    take_a_step(slow, texts)
    load_checkpoint(slow, tmp_path / "checkpoint")
    torch.testing.assert_close(passages_of(slow, texts), passages_of(model, texts))
    assert {name for name, parameter in model.named_parameters() if "lora_B" in name and bool(parameter.any())}


@needs_peft
def test_a_merged_student_saves_no_adapters(tmp_path: Path, adapted: Callable[..., Any], texts: list[str]) -> None:
    _, model = adapted("splade")
    take_a_step(model, texts)

    merge_adapters(model)
    model.save_pretrained(str(tmp_path / "student"), create_model_card=False)

    assert not [path for path in (tmp_path / "student").rglob("*") if "adapter" in path.name]
    assert not [key for key in load_file(tmp_path / "student" / "model.safetensors") if "lora" in key or "base_layer" in key]


@needs_peft
def test_checkpoints_with_and_without_adapters_are_not_taken_for_each_other(tmp_path: Path, adapted: Callable[..., Any]) -> None:
    plain, model = adapted("splade")
    for name, student in (("plain", plain), ("adapted", model)):
        student.save_pretrained(str(tmp_path / name), create_model_card=False)

    with pytest.raises(ValueError, match=rf"has no {ADAPTERS}, the student expects them; train from the start"):
        load_checkpoint(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=rf"has {ADAPTERS}, the student expects none; train from the start"):
        load_checkpoint(plain, tmp_path / "adapted")


@needs_peft
def test_an_architecture_without_known_projections_is_refused(
    tmp_path: Path, student_section: Section, tiny_headless_folder: Path
) -> None:
    import shutil

    from transformers import ConvBertConfig, ConvBertForMaskedLM

    config = ConvBertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, embedding_size=32
    )
    ConvBertForMaskedLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_headless_folder / name, tmp_path)

    with pytest.raises(ValueError, match="no attention projections known for a model of type 'convbert'; expected one of"):
        build_student(student_section(tmp_path, lora_rank=2), tmp_path)


def test_a_plain_student_resumes_by_the_same_function(tmp_path: Path, student_section: Section, tiny_headless_folder: Path) -> None:
    section = student_section(tiny_headless_folder, expansion="passage", static_weights="ones")
    model, fresh = (build_student(section, tiny_headless_folder) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(str(tmp_path), create_model_card=False)

    load_checkpoint(fresh, tmp_path)

    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in fresh.state_dict().items())
    assert not has_adapters(model)
    merge_adapters(model)  # nothing to do


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_adapters_without_peft_are_refused_before_anything_is_loaded(tmp_path: Path, student_section: Section) -> None:
    with pytest.raises(ValueError, match=r"lora_rank = 4: needs the package peft, .* pip install 'sparsekd\[lora\]'"):
        build_student(student_section(tmp_path / "nothing", lora_rank=4), tmp_path / "nothing")
