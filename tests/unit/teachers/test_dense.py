"""The dense encoder against SentenceTransformer.encode, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.recipe import EncoderSpec, Run
from sparsekd.teachers.dense import DenseEncoder

Draw = Callable[..., list[str]]


def encoder(folder: Path, *, run: Run | None = None, **fields: Any) -> DenseEncoder:
    return DenseEncoder(EncoderSpec(model=str(folder), **fields), run or Run())


def library_vectors(folder: Path, texts: list[str], **arguments: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False, **arguments)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize("batch_tokens", [16, 8192])
def test_vectors_equal_the_librarys_in_input_order(tiny_encoder_folder: Path, draw_texts: Draw, batch_tokens: int) -> None:
    texts = draw_texts(40)

    vectors = encoder(tiny_encoder_folder, run=Run(batch_tokens=batch_tokens)).encode(texts, role="passage")

    np.testing.assert_allclose(vectors, library_vectors(tiny_encoder_folder, texts), atol=1e-5)
    assert (vectors.shape, vectors.dtype) == ((40, 32), np.float32)


def test_vectors_and_identity_are_the_same_without_padding(tiny_encoder_folder: Path, draw_texts: Draw) -> None:
    texts = draw_texts(40)
    padded, packed = (encoder(tiny_encoder_folder, run=Run(packed=packed)) for packed in (False, True))

    vectors = packed.encode(texts, role="passage")

    np.testing.assert_allclose(vectors, padded.encode(texts, role="passage"), atol=1e-5)
    assert packed._loaded()[0].can_flatten_inputs
    assert not padded._loaded()[0].can_flatten_inputs
    assert packed.identity == padded.identity


def test_an_encoder_that_needs_padding_keeps_it(
    tiny_headless_folder: Path, tmp_path: Path, draw_texts: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    torch.manual_seed(0)
    config = MPNetConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    MPNetModel(config).save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(tiny_headless_folder).save_pretrained(tmp_path / "body")
    body = Transformer(str(tmp_path / "body"))
    SentenceTransformer(modules=[body, Pooling(32, "mean")], device="cpu", similarity_fn_name="dot").save_pretrained(
        str(tmp_path / "encoder"), create_model_card=False
    )
    texts = draw_texts(10)

    with caplog.at_level("INFO"):
        vectors = encoder(tmp_path / "encoder").encode(texts, role="passage")

    np.testing.assert_allclose(vectors, library_vectors(tmp_path / "encoder", texts), atol=1e-5)
    assert "with padding: MPNetModel" in caplog.text


def test_vectors_are_not_normalised_by_us(tiny_encoder_folder: Path, draw_texts: Draw) -> None:
    norms = np.linalg.norm(encoder(tiny_encoder_folder).encode(draw_texts(5), role="query"), axis=1)

    assert (np.abs(norms - 1) > 0.1).all()


def test_score_vectors_is_the_models_own_similarity(tiny_encoder_folder: Path, draw_texts: Draw) -> None:
    teacher = encoder(tiny_encoder_folder)
    queries, passages = teacher.encode(draw_texts(5), role="query"), teacher.encode(draw_texts(5, seed=1), role="passage")

    scores = teacher.score_vectors(queries, passages)

    np.testing.assert_allclose(scores, (queries * passages).sum(axis=1), rtol=1e-5)


def test_prompts_are_put_before_the_texts_of_their_role(tiny_encoder_folder: Path, draw_texts: Draw) -> None:
    texts = draw_texts(6)
    teacher = encoder(tiny_encoder_folder, query_prompt="what: ", passage_prompt="text: ")
    bare = encoder(tiny_encoder_folder)

    for role, prompt in (("query", "what: "), ("passage", "text: ")):
        prompted = bare.encode([prompt + text for text in texts], role="passage")
        np.testing.assert_allclose(teacher.encode(texts, role=role), prompted, atol=1e-5)


def test_a_models_own_prompts_are_not_used_but_named(
    tiny_encoder_folder: Path, tmp_path: Path, draw_texts: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_encoder_folder, tmp_path / "prompted"))
    edit_config(folder, prompts={"query": "what: ", "document": "text: "}, default_prompt_name="query")
    texts = draw_texts(6)

    vectors = encoder(folder, passage_prompt="text: ").encode(texts, role="query")

    np.testing.assert_allclose(vectors, encoder(tiny_encoder_folder).encode(texts, role="query"), atol=1e-5)
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("sparsekd")]
    assert len(warned) == 1
    assert "the query prompt 'what: ', but the recipe has no query_prompt, so none is used" in warned[0]


def test_a_declared_truncated_dimension_is_kept(tiny_encoder_folder: Path, tmp_path: Path, draw_texts: Draw) -> None:
    folder = Path(shutil.copytree(tiny_encoder_folder, tmp_path / "truncated"))
    edit_config(folder, truncate_dim=8)
    texts = draw_texts(3)

    teacher = encoder(folder)

    np.testing.assert_allclose(teacher.encode(texts, role="query"), library_vectors(folder, texts), atol=1e-5)
    assert teacher.dimension == 8


def test_cut_texts_are_counted_and_said_once(tiny_encoder_folder: Path, draw_texts: Draw, caplog: pytest.LogCaptureFixture) -> None:
    teacher = encoder(tiny_encoder_folder, max_length=10)
    short, long = "the heat of a wave", "the heat of a wave in the river of the old queen"

    vectors = teacher.encode([short, long, long], role="passage")
    teacher.encode([long], role="passage")

    assert teacher.num_truncated == 3
    np.testing.assert_allclose(vectors[1], teacher.encode(["the heat of a wave in the river"], role="passage")[0], atol=1e-5)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sparsekd")]
    assert said == [f"encoder {tiny_encoder_folder}: texts over 10 tokens are cut by the model and counted"]


def test_no_texts_give_no_vectors(tiny_encoder_folder: Path) -> None:
    assert encoder(tiny_encoder_folder).encode([], role="query").shape == (0, 32)


def test_a_half_precision_model_gives_float32_close_to_full(tiny_encoder_folder: Path, draw_texts: Draw) -> None:
    texts = draw_texts(4)

    half = encoder(tiny_encoder_folder, dtype="bfloat16").encode(texts, role="query")

    assert half.dtype == np.float32
    full = encoder(tiny_encoder_folder).encode(texts, role="query")
    # bfloat16 keeps 8 bits; two layers accumulate a few steps of 2^-8 around values of 1.
    np.testing.assert_allclose(half, full, atol=0.1)
    assert np.abs(half - full).max() > 1e-4


def test_a_checkpoint_saved_in_half_precision_runs_in_the_dtype_asked(
    tiny_encoder_folder: Path, save_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    folder = Path(shutil.copytree(tiny_encoder_folder, tmp_path / "half"))
    save_tiny_model("BertModel", folder, dtype=torch.bfloat16)  # the body only; the modules stay

    teacher = encoder(folder)
    teacher.encode(["the heat"], role="query")

    assert {parameter.dtype for parameter in teacher._loaded().parameters()} == {torch.float32}


def test_vectors_that_are_not_finite_are_refused(tiny_encoder_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_encoder_folder, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5] = np.nan  # row 5: the first word of the vocabulary, "a"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"2 of 3 query vectors are not finite \(first: text 1, 'a wave'\)"):
        encoder(folder).encode(["the heat", "a wave", "a"], role="query")


def test_a_length_beyond_the_models_positions_is_refused(tiny_encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_length = 129, but it has only 128 positions; expected at most 128"):
        encoder(tiny_encoder_folder, max_length=129).encode(["the"], role="query")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "cuda:99",
            r"device = 'cuda:99', but torch .* sees \d+ CUDA devices; expected one that is there; set device = \"cpu\"",
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(tiny_encoder_folder: Path, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(tiny_encoder_folder, run=Run(device=device)).encode(["the"], role="query")


def test_run_threads_sets_the_compute_threads(tiny_encoder_folder: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        encoder(tiny_encoder_folder, run=Run(threads=3)).encode(["the"], role="query")

        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
