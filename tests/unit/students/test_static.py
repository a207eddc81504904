"""The side without a transformer: its table, its tokens, and one vocabulary with the other side."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.recipe import Student
from sparsekd.students.building import build_student
from sparsekd.students.calibration import calibrate_bias
from sparsekd.students.fast import decoder_of
from sparsekd.students.routes import splade_route, static_route
from sparsekd.students.static import document_frequency, inverse_document_frequency, whole_passage_ids

Section = Callable[..., Student]

PASSAGES = ["a cat and a cat", "a dog", "a bird or the cat", "xyz", "the the the"]


@pytest.fixture
def build(student_section: Section, tiny_headless_folder: Path) -> Callable[..., Any]:
    """Return ``build(passages, **settings)``: a student that starts from the tiny encoder."""

    def make(passages: list[str] | None = None, **settings: Any) -> Any:
        return build_student(student_section(tiny_headless_folder, **settings), tiny_headless_folder, passages)

    return make


def weight_of(model: Any, word: str) -> float:
    table = static_route(model)
    assert table is not None
    return float(table[1].weight[table[1].tokenizer.convert_tokens_to_ids(word)].detach())


def test_the_table_starts_from_the_idf_of_the_passages(build: Callable[..., Any]) -> None:
    model = build(PASSAGES, expansion="passage")

    # cat is in 2 of 5, a in 3, x (the word piece) in 1, mountain in none; twice in one passage counts once.
    assert weight_of(model, "cat") == pytest.approx(math.log((5 - 2 + 0.5) / (2 + 0.5) + 1))
    assert weight_of(model, "a") == pytest.approx(math.log((5 - 3 + 0.5) / (3 + 0.5) + 1))
    assert weight_of(model, "mountain") == pytest.approx(math.log((5 + 0.5) / 0.5 + 1))


@pytest.mark.parametrize("weights", ["idf", "ones"])
def test_special_tokens_weigh_nothing(build: Callable[..., Any], weights: str) -> None:
    model = build(PASSAGES, expansion="passage", static_weights=weights)
    _, table = static_route(model) or (None, None)
    special = set(table.tokenizer.all_special_ids)

    zero = {int(position) for position in (table.weight == 0).nonzero()}

    assert zero == special
    if weights == "ones":
        assert set(table.weight[[i for i in range(len(table.weight)) if i not in special]].tolist()) == {1.0}


@pytest.mark.parametrize("expansion", ["passage", "query"])
def test_a_static_side_weighs_its_own_terms_by_the_table(build: Callable[..., Any], expansion: str) -> None:
    model = build(PASSAGES, expansion=expansion)
    encode = model.encode_query if expansion == "passage" else model.encode_document

    vector = encode(["the cat and the dog"]).to_dense()[0]

    tokenizer = model.tokenizer
    active = {tokenizer.convert_ids_to_tokens(int(position)): float(vector[position]) for position in vector.nonzero()}
    assert active == {word: pytest.approx(weight_of(model, word)) for word in ("the", "cat", "and", "dog")}


def test_document_frequency_equals_counting_by_hand(build: Callable[..., Any]) -> None:
    tokenizer: Any = build().tokenizer
    long = " ".join(["cat"] * 500 + ["tower"])  # beyond every length limit
    passages = [*PASSAGES, long, ""] * 200  # more than are tokenised at once

    found = document_frequency(tokenizer, passages)

    expected = np.zeros(len(tokenizer.get_vocab()), dtype=np.int64)
    for text in passages:
        for token in {*tokenizer.tokenize(text)}:
            expected[tokenizer.convert_tokens_to_ids(token)] += 1
    np.testing.assert_array_equal(found, expected)
    assert found[tokenizer.convert_tokens_to_ids("tower")] == 200
    assert len(list(whole_passage_ids(tokenizer, passages))) == len(passages)


def test_idf_falls_with_frequency_and_stays_above_zero() -> None:
    idf = inverse_document_frequency(np.arange(11), 10)

    assert (np.diff(idf) < 0).all()
    assert (idf > 0).all()
    assert idf[-1] == pytest.approx(math.log(0.5 / 10.5 + 1))
    assert idf.dtype == np.float32


def test_both_sides_cut_texts_at_max_length_after_loading_too(tmp_path: Path, build: Callable[..., Any]) -> None:
    from sentence_transformers import SparseEncoder

    model = build(PASSAGES, expansion="passage", max_length=8)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    loaded = SparseEncoder(str(tmp_path), device="cpu")
    words = "cat dog bird fish rain snow sun mountain bridge tower king queen"

    for each in (model, loaded):
        assert each.max_seq_length == 8
        assert int(each.encode_query([words]).to_dense().count_nonzero()) == 8  # no special tokens on this side
        assert each.preprocess([words], task="document")["input_ids"].shape[1] == 8


@pytest.mark.parametrize("expansion", ["passage", "query"])
def test_calibration_sets_the_bias_of_the_side_that_passes_through_the_transformer(
    build: Callable[..., Any], texts: list[str], expansion: str
) -> None:
    model = build(expansion=expansion, query_prompt="which ", passage_prompt="the ")

    bias = calibrate_bias(model, texts, 40)

    side, transformer, _ = splade_route(model)
    encode = model.encode_query if expansion == "query" else model.encode_document
    assert side == ("query" if expansion == "query" else "document")
    assert int(encode(texts).to_dense().count_nonzero()) / len(texts) == pytest.approx(40, rel=0.1)
    assert decoder_of(model) is transformer.model.get_output_embeddings()
    assert decoder_of(model).bias.mean().item() == pytest.approx(bias, abs=1e-5)


def with_vocabulary(folder: Path, copy: Path, edit: Callable[[dict[str, int]], None]) -> Path:
    """Copy a model with the vocabulary of its tokenizer edited."""
    shutil.copytree(folder, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    edit(tokenizer["model"]["vocab"])
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return copy


def test_embeddings_beyond_the_tokenizer_are_cut_so_that_both_sides_have_one_width(
    tmp_path: Path, save_tiny_model: Callable[..., Path], student_section: Section, texts: list[str]
) -> None:
    from sentence_transformers import SparseEncoder

    folder = save_tiny_model("BertForMaskedLM", tmp_path / "rounded", vocab_size=320)
    whole = build_student(student_section(folder), folder)

    model = build_student(student_section(folder, expansion="passage"), folder, PASSAGES)
    model.save_pretrained(str(tmp_path / "student"), create_model_card=False)

    width = len(model.tokenizer.get_vocab())
    assert width < 320
    assert model.encode_query(texts).shape[1] == model.encode_document(texts).shape[1] == width
    torch.testing.assert_close(model.encode_document(texts).to_dense(), whole.encode_document(texts).to_dense()[:, :width])
    loaded = SparseEncoder(str(tmp_path / "student"), device="cpu")
    torch.testing.assert_close(loaded.encode_document(texts).to_dense(), model.encode_document(texts).to_dense())


def test_a_vocabulary_with_gaps_is_refused(tmp_path: Path, tiny_masked_lm_folder: Path, student_section: Section) -> None:
    folder = with_vocabulary(tiny_masked_lm_folder, tmp_path / "gap", lambda vocabulary: vocabulary.__delitem__("cat"))

    with pytest.raises(ValueError, match=r'expansion = "passage": the tokenizer of .* tokens with ids up to \d+; expected no gaps'):
        build_student(student_section(folder, expansion="passage"), folder)
