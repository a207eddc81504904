"""Untrained SPLADE students: from which checkpoints they can be made, and how they start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekd.recipe import Student
from sparsekd.students.building import build_student
from sparsekd.students.calibration import calibrate_bias
from sparsekd.students.fast import decoder_of
from sparsekd.students.masked_lm import has_masked_lm_head

Section = Callable[..., Student]
Save = Callable[..., Path]


def embed(model: Any, texts: list[str]) -> torch.Tensor:
    with torch.inference_mode():
        vectors: torch.Tensor = model(model.preprocess(texts))["sentence_embedding"]
    return vectors


def edit_config(folder: Path, copy: Path, **changes: Any) -> Path:
    """Copy a model with keys of its config.json changed."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return copy


def edit_weights(folder: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model with its weights edited in place."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def save_variant(class_name: str, config: Any, tokenizer_from: Path, folder: Path) -> Path:
    """Save a random model of another architecture with a tiny model's tokenizer."""
    import transformers

    torch.manual_seed(0)
    getattr(transformers, class_name)(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder)
    return folder


def tiny_distilbert(vocab_size: int) -> Any:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=vocab_size, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=128, initializer_range=0.2
    )


def tiny_roberta(vocab_size: int) -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=130, type_vocab_size=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip


def test_a_masked_lm_keeps_its_own_head(student_section: Section, tiny_masked_lm_folder: Path, texts: list[str]) -> None:
    from transformers import AutoModelForMaskedLM

    model = build_student(student_section(tiny_masked_lm_folder), tiny_masked_lm_folder)

    own = AutoModelForMaskedLM.from_pretrained(tiny_masked_lm_folder).eval()
    features = model.preprocess(texts)
    with torch.inference_mode():
        logits = own(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).logits
    logits = logits.masked_fill(~features["attention_mask"].bool().unsqueeze(-1), -torch.inf)
    torch.testing.assert_close(embed(model, texts), torch.log1p(torch.relu(logits.amax(dim=1))), rtol=1e-5, atol=1e-6)


def assert_starts_as_identity(model: Any, body: Any, texts: list[str]) -> None:
    """Vectors are log1p(relu(max_t LayerNorm(h_t) . E)), h the body's last hidden states, E its word embeddings."""
    features = model.preprocess(texts)
    with torch.inference_mode():
        hidden = body(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).last_hidden_state.double()
    passed = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, keepdim=True, correction=0)
    embeddings = body.get_input_embeddings().weight.double()
    logits = (passed @ embeddings.T).masked_fill(~features["attention_mask"].bool().unsqueeze(-1), -torch.inf)
    expected = torch.log1p(torch.relu(logits.amax(dim=1)))
    torch.testing.assert_close(embed(model, texts).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixture", ["tiny_headless_folder", "tiny_encoder_folder"])
def test_an_encoder_without_a_head_starts_as_the_identity(
    request: pytest.FixtureRequest, student_section: Section, texts: list[str], fixture: str
) -> None:
    from transformers import AutoModel

    folder: Path = request.getfixturevalue(fixture)

    model = build_student(student_section(folder), folder)

    assert decoder_of(model).weight is model[0].model.get_input_embeddings().weight
    assert_starts_as_identity(model, AutoModel.from_pretrained(folder).eval(), texts)


@pytest.mark.parametrize(("class_name", "config"), [("DistilBertModel", tiny_distilbert), ("RobertaModel", tiny_roberta)])
def test_other_architectures_start_as_the_identity_too(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section, texts: list[str], class_name: str, config: Any
) -> None:
    from transformers import AutoModel

    vocab_size = json.loads((tiny_headless_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    folder = save_variant(class_name, config(vocab_size), tiny_headless_folder, tmp_path / "variant")

    model = build_student(student_section(folder), folder)

    assert decoder_of(model).weight is model[0].model.get_input_embeddings().weight
    assert_starts_as_identity(model, AutoModel.from_pretrained(folder).eval(), texts)


@pytest.mark.parametrize(
    ("class_name", "config"), [("BertModel", None), ("DistilBertModel", tiny_distilbert), ("RobertaModel", tiny_roberta)]
)
def test_residual_scale_scales_what_each_layer_adds_and_nothing_else(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section, class_name: str, config: Any
) -> None:
    vocab_size = json.loads((tiny_headless_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    variant = tmp_path / "variant"
    folder = tiny_headless_folder if config is None else save_variant(class_name, config(vocab_size), tiny_headless_folder, variant)

    whole, scaled = (
        dict(build_student(student_section(folder, residual_scale=scale), folder)[0].model.named_parameters())
        for scale in (1.0, 0.25)
    )

    weights = {name for name, value in scaled.items() if not torch.equal(value, whole[name])}
    assert all(torch.equal(scaled[name], 0.25 * whole[name]) for name in weights)
    names = sorted(name.partition("layer.")[2] for name in weights if name.endswith("weight"))
    feed_forward, attention = (
        ("ffn.lin2", "attention.out_lin") if class_name == "DistilBertModel" else ("output.dense", "attention.output.dense")
    )
    assert names == sorted(f"{layer}.{part}.weight" for layer in (0, 1) for part in (feed_forward, attention))


def test_the_less_a_layer_adds_the_nearer_a_token_stays_to_its_word(
    student_section: Section, tiny_headless_folder: Path, texts: list[str]
) -> None:
    shares = []
    for scale in (1.0, 0.5, 1e-6):
        model = build_student(student_section(tiny_headless_folder, residual_scale=scale), tiny_headless_folder)
        features = model[0].preprocess(texts)
        with torch.inference_mode():
            logits_BLV = model[0](features)["token_embeddings"]
        is_token = features["attention_mask"].bool()
        ids_T = features["input_ids"][is_token]
        rank_T = (logits_BLV[is_token] > logits_BLV[is_token].gather(1, ids_T[:, None])).sum(dim=1)
        shares.append(float((rank_T == 0).float().mean()))

    assert shares[0] < shares[1] <= shares[2]


def test_building_twice_gives_equal_students(student_section: Section, tiny_headless_folder: Path, texts: list[str]) -> None:
    build = [build_student(student_section(tiny_headless_folder), tiny_headless_folder) for _ in range(2)]

    assert torch.equal(embed(build[0], texts), embed(build[1], texts))


def test_a_half_precision_checkpoint_becomes_a_float32_student(
    tmp_path: Path, student_section: Section, tiny_headless_folder: Path
) -> None:
    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: tensor.bfloat16() for name, tensor in weights.items()})

    halved = edit_weights(tiny_headless_folder, tmp_path / "half", halve)
    folder = edit_config(halved, tmp_path / "half-config", dtype="bfloat16")

    model = build_student(student_section(folder), folder)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_num_layers_keeps_the_first_layers(student_section: Section, tiny_headless_folder: Path) -> None:
    whole = build_student(student_section(tiny_headless_folder), tiny_headless_folder).state_dict()

    cut = build_student(student_section(tiny_headless_folder, num_layers=1), tiny_headless_folder).state_dict()

    assert {name for name in whole if name not in cut} == {name for name in whole if "layer.1." in name}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())


def test_more_layers_than_there_are_is_refused(student_section: Section, tiny_headless_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\[student\] num_layers = 3: .* has 2; ask for at most that"):
        build_student(student_section(tiny_headless_folder, num_layers=3), tiny_headless_folder)


def test_an_output_layer_that_is_not_tied_is_refused(tmp_path: Path, save_tiny_model: Save, student_section: Section) -> None:
    folder = save_tiny_model("BertForMaskedLM", tmp_path / "untied", tie_word_embeddings=False)

    with pytest.raises(ValueError, match="its output layer is not tied to its word embeddings; choose a tied model"):
        build_student(student_section(folder), folder)


def test_a_masked_lm_whose_head_has_no_weights_is_refused(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section
) -> None:
    folder = edit_config(tiny_headless_folder, tmp_path / "claims", architectures=["BertForMaskedLM"])

    with pytest.raises(ValueError, match=r"weights lack \['cls\.predictions\..*the student would start random"):
        build_student(student_section(folder), folder)


def test_a_body_that_lacks_weights_is_refused(tmp_path: Path, tiny_headless_folder: Path, student_section: Section) -> None:
    name = "encoder.layer.1.output.dense.weight"
    folder = edit_weights(tiny_headless_folder, tmp_path / "torn", lambda weights: weights.__delitem__(name))

    with pytest.raises(ValueError, match=rf"weights lack \['bert\.{name}'\]; the student would start random"):
        build_student(student_section(folder), folder)


@pytest.mark.parametrize("architectures", [None, ["BertModel"]])
def test_a_head_that_the_config_does_not_name_is_refused_instead_of_overwritten(
    tmp_path: Path, tiny_masked_lm_folder: Path, student_section: Section, architectures: list[str] | None
) -> None:
    folder = edit_config(tiny_masked_lm_folder, tmp_path / "unnamed", architectures=architectures)

    with pytest.raises(ValueError, match=r"brings a masked-LM head, but .* name BertForMaskedLM there"):
        build_student(student_section(folder), folder)


def test_the_head_of_a_pre_training_checkpoint_is_kept(
    tmp_path: Path, save_tiny_model: Save, student_section: Section, texts: list[str]
) -> None:
    folder = save_tiny_model("BertForPreTraining", tmp_path / "pre-training")

    model = build_student(student_section(folder), folder)

    assert has_masked_lm_head(folder)
    dense = load_file(folder / "model.safetensors")["cls.predictions.transform.dense.weight"]
    assert torch.equal(model[0].model.cls.predictions.transform.dense.weight, dense)


def test_max_length_beyond_the_positions_is_refused(student_section: Section, tiny_headless_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\[student\] max_length = 129: .* has 128 positions; lower it"):
        build_student(student_section(tiny_headless_folder, max_length=129), tiny_headless_folder)


def test_positions_that_roberta_reserves_are_not_counted(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section
) -> None:
    config = tiny_roberta(json.loads((tiny_headless_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    folder = save_variant("RobertaModel", config, tiny_headless_folder, tmp_path / "roberta")  # 130 rows, the first is padding's

    longest = build_student(student_section(folder, max_length=129), folder)

    assert embed(longest, ["a cat " * 100]).isfinite().all()
    with pytest.raises(ValueError, match=r"max_length = 130: .* has 129 positions; lower it"):
        build_student(student_section(folder, max_length=130), folder)


@pytest.mark.parametrize("class_name", ["AlbertModel", "ElectraModel"])
def test_an_encoder_that_cannot_start_as_the_identity_is_refused(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section, class_name: str
) -> None:
    import transformers

    kind = class_name.removesuffix("Model")
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**settings, embedding_size=32)
    folder = save_variant(class_name, config, tiny_headless_folder, tmp_path / "unknown")

    with pytest.raises(ValueError, match=rf"an encoder of type '{kind.lower()}' without a masked-LM head cannot start"):
        build_student(student_section(folder), folder)


def test_a_decoder_is_refused(tmp_path: Path, tiny_headless_folder: Path, student_section: Section) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    folder = save_variant("GPT2Model", config, tiny_headless_folder, tmp_path / "decoder")

    with pytest.raises(ValueError, match=r"transformers has no masked LM of its type, gpt2 \(GPT2Config\); expected an encoder"):
        build_student(student_section(folder), folder)


@pytest.mark.parametrize("kind", ["splade", "csr"])
def test_a_folder_without_a_tokenizer_is_refused(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section, kind: str
) -> None:
    folder = edit_config(tiny_headless_folder, tmp_path / "mute")
    for path in folder.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(ValueError, match=r"no tokenizer in it \(none of tokenizer.json, vocab.txt, .*save the tokenizer"):
        build_student(student_section(folder, kind=kind), folder)


@pytest.mark.parametrize("kind", ["splade", "csr"])
def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, save_tiny_model: Save, student_section: Section, kind: str
) -> None:
    folder = save_tiny_model("BertModel", tmp_path / "small", vocab_size=64)

    with pytest.raises(
        ValueError, match=r"its tokenizer gives ids up to 2\d\d, its embeddings have 64 rows; expected the tokenizer"
    ):
        build_student(student_section(folder, kind=kind, k_aux=16, k=8), folder)


def test_the_body_of_a_trained_head_is_not_scaled(student_section: Section, tiny_masked_lm_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"residual_scale = 0.5: .* brings a trained masked-LM head, which expects the body"):
        build_student(student_section(tiny_masked_lm_folder, residual_scale=0.5), tiny_masked_lm_folder)


@pytest.mark.parametrize("setting", ["initial_active_dims", "head_warmup_steps"])
def test_a_trained_head_is_neither_calibrated_nor_warmed_up(
    student_section: Section, tiny_masked_lm_folder: Path, setting: str
) -> None:
    with pytest.raises(ValueError, match=rf"\[student\] {setting}: .* brings a trained masked-LM head, .*; remove the key"):
        build_student(student_section(tiny_masked_lm_folder, **{setting: 3}), tiny_masked_lm_folder)


def test_the_first_layers_of_a_model_with_layers_of_two_types(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section, texts: list[str]
) -> None:
    from transformers import ModernBertConfig

    vocab_size = json.loads((tiny_headless_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = ModernBertConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    folder = save_variant("ModernBertForMaskedLM", config, tiny_headless_folder, tmp_path / "modern")

    model = build_student(student_section(folder, num_layers=2, dropout=0.0), folder)

    assert len(model[0].model.config.layer_types) == model[0].model.config.num_hidden_layers == 2
    assert embed(model, texts).isfinite().all()


def test_dropout_acts_while_training_only(student_section: Section, tiny_headless_folder: Path, texts: list[str]) -> None:
    still = build_student(student_section(tiny_headless_folder, dropout=0.0), tiny_headless_folder)
    shaken = build_student(student_section(tiny_headless_folder, dropout=0.5), tiny_headless_folder)

    assert torch.equal(embed(still, texts), embed(shaken, texts))
    rates = {module.p for module in shaken.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.5}
    torch.testing.assert_close(embed(still.train(), texts), embed(still.eval(), texts))
    assert not torch.allclose(embed(shaken.train(), texts), embed(shaken.eval(), texts))


@pytest.mark.parametrize("active_dims", [5, 40, 120])
def test_the_calibrated_bias_gives_the_active_dims_asked_for(
    student_section: Section, tiny_headless_folder: Path, texts: list[str], active_dims: int
) -> None:
    model = build_student(student_section(tiny_headless_folder), tiny_headless_folder)

    bias = calibrate_bias(model, texts, active_dims, batch_size=2)

    found = int(embed(model, texts).count_nonzero()) / len(texts)
    assert found == pytest.approx(active_dims, rel=0.1)
    assert decoder_of(model).bias.mean().item() == pytest.approx(bias, abs=1e-5)


def test_after_calibration_no_term_is_nearer_to_the_passages_than_another(
    student_section: Section, tiny_headless_folder: Path, texts: list[str]
) -> None:
    model = build_student(student_section(tiny_headless_folder), tiny_headless_folder)

    calibrate_bias(model, texts, 40)

    features = [model[0](model.preprocess([text])) for text in texts]  # one by one: no padding
    mean_V = torch.stack([part["token_embeddings"][0].amax(dim=0) for part in features]).mean(dim=0)
    assert (mean_V.max() - mean_V.min()).item() < 1e-4


def test_calibration_sees_the_passage_prompt(student_section: Section, tiny_headless_folder: Path, texts: list[str]) -> None:
    prompted = build_student(student_section(tiny_headless_folder, passage_prompt="number: "), tiny_headless_folder)
    plain = build_student(student_section(tiny_headless_folder), tiny_headless_folder)

    bias = calibrate_bias(prompted, texts, 40)

    assert bias == calibrate_bias(plain, [f"number: {text}" for text in texts], 40)


def test_more_active_dims_than_terms_is_refused(student_section: Section, tiny_headless_folder: Path, texts: list[str]) -> None:
    model = build_student(student_section(tiny_headless_folder), tiny_headless_folder)
    vocabulary = decoder_of(model).out_features

    with pytest.raises(ValueError, match=rf"initial_active_dims = {vocabulary}: the vocabulary has {vocabulary}; lower it"):
        calibrate_bias(model, texts, vocabulary)
