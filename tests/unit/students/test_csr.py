"""CSR students: what they start from, how many dims they have, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekd.recipe import Student
from sparsekd.students.building import build_student

Section = Callable[..., Student]
SMALL = {"kind": "csr", "hidden_dim": 128, "k": 8, "k_aux": 16}


def dense_of(model: Any, texts: list[str]) -> torch.Tensor:
    """What enters the autoencoder."""
    with torch.inference_mode():
        features = model.preprocess(texts)
        for module in list(model.children())[:-1]:
            features = module(features)
    vectors: torch.Tensor = features["sentence_embedding"]
    return vectors


def test_the_body_gives_the_encoders_own_vectors(student_section: Section, tiny_encoder_folder: Path, texts: list[str]) -> None:
    from sentence_transformers import SentenceTransformer

    model = build_student(student_section(tiny_encoder_folder, **SMALL), tiny_encoder_folder)

    own = SentenceTransformer(str(tiny_encoder_folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(dense_of(model, texts), own)


def test_what_follows_the_pooling_stays(
    tmp_path: Path, student_section: Section, tiny_headless_folder: Path, texts: list[str]
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    body = Transformer(str(tiny_headless_folder))
    modules = [body, Pooling(32, "cls"), Dense(32, 24), Normalize()]
    encoder = SentenceTransformer(modules=modules, prompts={"query": "own: "}, device="cpu")
    encoder.save_pretrained(str(tmp_path), create_model_card=False)

    model = build_student(student_section(tmp_path, **SMALL, query_prompt="which "), tmp_path)

    torch.testing.assert_close(dense_of(model, texts), encoder.encode(texts, convert_to_tensor=True))
    assert model[-1].input_dim == 24
    assert model.prompts == {"query": "which ", "document": ""}  # the recipe's, not the encoder's


def test_a_plain_encoder_gets_mean_pooling(student_section: Section, tiny_headless_folder: Path, texts: list[str]) -> None:
    from transformers import AutoModel

    model = build_student(student_section(tiny_headless_folder, **SMALL), tiny_headless_folder)

    features = model.preprocess(texts)
    body, mask = AutoModel.from_pretrained(tiny_headless_folder).eval(), features["attention_mask"].unsqueeze(-1)
    with torch.inference_mode():
        hidden = body(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).last_hidden_state
    torch.testing.assert_close(dense_of(model, texts), (hidden * mask).sum(1) / mask.sum(1))


def test_a_vector_has_at_most_k_active_dims(student_section: Section, tiny_encoder_folder: Path, texts: list[str]) -> None:
    model = build_student(student_section(tiny_encoder_folder, **SMALL), tiny_encoder_folder)

    vectors = model.encode_document(texts).to_dense()

    assert vectors.shape[1] == 128
    assert 1 <= int(vectors.count_nonzero(dim=1).max()) <= 8
    assert model.similarity_fn_name == "dot"


def test_the_width_is_four_times_the_encoders_unless_given(student_section: Section, tiny_encoder_folder: Path) -> None:
    student = student_section(tiny_encoder_folder, kind="csr", k=8, k_aux=16)

    assert build_student(student, tiny_encoder_folder).get_embedding_dimension() == 4 * 32


def test_layers_dropout_and_length_are_the_recipes(student_section: Section, tiny_encoder_folder: Path) -> None:
    student = student_section(tiny_encoder_folder, **SMALL, num_layers=1, dropout=0.3, max_length=12)

    model = build_student(student, tiny_encoder_folder)

    assert len(model[0].model.encoder.layer) == 1
    assert {module.p for module in model[0].modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert model.max_seq_length == 12


def test_a_frozen_body_runs_without_dropout_and_gets_no_gradient(
    student_section: Section, tiny_encoder_folder: Path, texts: list[str]
) -> None:
    model = build_student(student_section(tiny_encoder_folder, **SMALL, freeze_body=True), tiny_encoder_folder)

    trainable = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"2"}  # transformer, pooling, autoencoder
    torch.testing.assert_close(dense_of(model.train(), texts), dense_of(model.eval(), texts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"k": 200, "hidden_dim": 128},
            r"\[student\] k = 200: the vectors have only hidden_dim = 128; lower k or raise hidden_dim",
        ),
        (
            {"k": 33, "hidden_dim": 128},
            r"k = 33: .* best 4k = 132 dims, and there are only hidden_dim = 128; lower k to 32 or raise",
        ),
        ({"k": 64}, r"4k = 256 dims, and there are only hidden_dim = 128, 4 times the encoder's; lower k to 32"),
        ({"k": 8, "k_aux": 512}, r"k_aux = 512: the vectors have only hidden_dim = 128, .*; lower k_aux or raise hidden_dim"),
        ({"num_layers": 3}, r"\[student\] num_layers = 3: .* has 2; ask for at most that"),
        ({"max_length": 129}, r"max_length = 129: .* has 128 positions; lower it"),
    ],
)
def test_what_does_not_fit_is_refused(
    student_section: Section, tiny_encoder_folder: Path, settings: dict[str, Any], message: str
) -> None:
    student = student_section(tiny_encoder_folder, **{"kind": "csr", "k": 8, "k_aux": 16, **settings})

    with pytest.raises(ValueError, match=message):
        build_student(student, tiny_encoder_folder)


def test_a_body_that_lacks_weights_is_refused(tmp_path: Path, tiny_encoder_folder: Path, student_section: Section) -> None:
    folder, name = tmp_path / "torn", "encoder.layer.1.output.dense.weight"
    shutil.copytree(tiny_encoder_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=rf"weights lack \['{name}'\]; the student would start random"):
        build_student(student_section(folder, **SMALL), folder)


def test_a_sparse_encoder_is_no_dense_one(tmp_path: Path, tiny_masked_lm_folder: Path, student_section: Section) -> None:
    build_student(student_section(tiny_masked_lm_folder), tiny_masked_lm_folder).save_pretrained(
        str(tmp_path), create_model_card=False
    )

    with pytest.raises(
        ValueError, match=r"not a dense encoder but \['Transformer', 'SpladePooling'\]; expected a Transformer, a Pooling"
    ):
        build_student(student_section(tmp_path, **SMALL), tmp_path)


def test_a_model_without_a_transformer_is_refused(tmp_path: Path, tiny_headless_folder: Path, student_section: Section) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_headless_folder)
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    static.save_pretrained(str(tmp_path), create_model_card=False)

    with pytest.raises(ValueError, match=r"its first module is .*StaticEmbedding; a csr student needs a Transformer there"):
        build_student(student_section(tmp_path, **SMALL), tmp_path)


def test_prompts_that_the_pooling_leaves_out_are_refused(
    tmp_path: Path, tiny_headless_folder: Path, student_section: Section
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(str(tiny_headless_folder)), Pooling(32, "mean", include_prompt=False)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path), create_model_card=False)

    assert build_student(student_section(tmp_path, **SMALL), tmp_path) is not None
    with pytest.raises(ValueError, match=r"its pooling leaves prompts out, .* remove query_prompt and passage_prompt"):
        build_student(student_section(tmp_path, **SMALL, query_prompt="q: "), tmp_path)
