"""Sparse teachers: vectors and scores against sentence-transformers itself; what is refused before a text is encoded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.artifact import key_of
from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.scores import ScoreBank
from sparsekd.bank.text_key import text_keys
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.scoring import PairTexts, bank_scores
from sparsekd.teachers.sparse import SparseTeacher, banked_sparse_vectors, pairwise_dot, teacher_vocabulary

Draw = Callable[..., list[str]]


@pytest.fixture(scope="module")
def inference_free_folder(tmp_path_factory: pytest.TempPathFactory, tiny_masked_lm_folder: Path) -> Path:
    """A saved Router: a table of weights for queries, SPLADE for passages."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling, Transformer

    folder = tmp_path_factory.mktemp("inference-free")
    body = Transformer(str(tiny_masked_lm_folder), transformer_task="fill-mask", model_kwargs={"dtype": "float32"})
    table = SparseStaticEmbedding(tokenizer=body.tokenizer, weight=torch.linspace(0.1, 2.0, len(body.tokenizer.get_vocab())))
    router = Router.for_query_document(query_modules=[table], document_modules=[body, SpladePooling("max")])
    SparseEncoder(modules=[router], device="cpu", similarity_fn_name="dot").save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def csr_folder(tmp_path_factory: pytest.TempPathFactory, tiny_headless_folder: Path) -> Path:
    """A saved CSR model: mean pooling under an autoencoder of 64 dims, 4 of them active."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    folder = tmp_path_factory.mktemp("csr")
    body = Transformer(str(tiny_headless_folder), model_kwargs={"dtype": "float32"})
    state = torch.get_rng_state()
    torch.manual_seed(0)
    encoder = SparseAutoEncoder(body.get_embedding_dimension(), hidden_dim=64, k=4, k_aux=8)
    torch.set_rng_state(state)
    model = SparseEncoder(modules=[body, Pooling(32, "mean"), encoder], device="cpu", similarity_fn_name="dot")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(params=["splade", "inference-free", "csr"])
def folder(request: pytest.FixtureRequest) -> Path:
    fixtures = {"splade": "tiny_splade_folder", "inference-free": "inference_free_folder", "csr": "csr_folder"}
    return Path(request.getfixturevalue(fixtures[request.param]))


def sparse(folder: Path, **fields: Any) -> Teacher:
    return Teacher(**{"name": "s", "kind": "sparse", "model": str(folder), **fields})


def library_vectors(folder: Path, texts: list[str], role: str, prompt: str = "") -> np.ndarray:
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder), device="cpu")
    encode = model.encode_query if role == "query" else model.encode_document
    return np.asarray(encode(texts, prompt=prompt, convert_to_sparse_tensor=False, show_progress_bar=False).numpy())


@pytest.mark.parametrize("role", ["query", "passage"])
def test_vectors_are_those_of_the_librarys_encode(folder: Path, role: Any, draw_texts: Draw) -> None:
    texts = draw_texts(25, longest=40)

    vectors = SparseTeacher(sparse(folder), Run(batch_tokens=200)).encode(texts, role=role)

    expected = library_vectors(folder, texts, role)
    assert (vectors.shape, vectors.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(vectors.toarray(), expected, atol=1e-5)


def test_the_width_is_that_of_the_vectors_whatever_the_modules_declare(folder: Path) -> None:
    assert SparseTeacher(sparse(folder), Run()).dimension == library_vectors(folder, ["a"], "passage").shape[1]


def test_prompts_are_the_recipes_and_never_the_models_own(tiny_splade_folder: Path, draw_texts: Draw) -> None:
    texts = draw_texts(4, longest=9)
    bare, prompted = (
        SparseTeacher(sparse(tiny_splade_folder, query_prompt=prompt), Run()).encode(texts, role="query").toarray()
        for prompt in ("", "what is ")
    )

    np.testing.assert_allclose(bare, library_vectors(tiny_splade_folder, texts, "query"), atol=1e-5)
    np.testing.assert_allclose(prompted, library_vectors(tiny_splade_folder, texts, "query", "what is "), atol=1e-5)
    assert np.abs(bare - prompted).max() > 0.01


def test_long_texts_are_cut_and_counted(folder: Path, draw_texts: Draw) -> None:
    texts = [*draw_texts(3, longest=4), "cat " * 30]
    teacher = SparseTeacher(sparse(folder, max_length=20), Run())

    vectors = teacher.encode(texts, role="passage")

    assert teacher.num_truncated == 1
    alone = SparseTeacher(sparse(folder, max_length=20), Run()).encode(["cat " * 18], role="passage")
    np.testing.assert_allclose(vectors.toarray()[3], alone.toarray()[0], atol=1e-5)


def test_no_texts_give_no_rows_of_the_right_width(tiny_splade_folder: Path, tmp_path: Path) -> None:
    teacher = SparseTeacher(sparse(tiny_splade_folder), Run())

    assert teacher.encode([], role="query").shape == (0, teacher.dimension)
    none = banked_sparse_vectors(teacher, EmbeddingBank(tmp_path).sparse, [], "query", Run())
    assert none.shape == (0, teacher.dimension)


def test_more_positions_than_the_model_has_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_length = 500, but it has only 128 positions"):
        SparseTeacher(sparse(folder, max_length=500), Run()).encode(["a cat"], role="passage")


def all_pairs(queries: list[str], passages: list[str]) -> PairTexts:
    query_index, passage_index = np.divmod(np.arange(len(queries) * len(passages), dtype=np.int32), len(passages))
    return PairTexts(queries, passages, query_index, passage_index)


def test_scores_are_the_librarys_dot_products_and_a_second_time_from_the_bank(
    folder: Path, tmp_path: Path, draw_texts: Draw
) -> None:
    queries, passages, teacher = draw_texts(5, longest=8), draw_texts(20, seed=1), sparse(folder)
    scores, embeddings = ScoreBank(tmp_path).open(teacher_identity(teacher)), EmbeddingBank(tmp_path)

    counts = bank_scores(teacher, Run(shard_pairs=30), scores, embeddings, all_pairs(queries, passages))
    again = bank_scores(teacher, Run(device="cuda:99"), scores, embeddings, all_pairs(queries, passages))

    expected = library_vectors(folder, queries, "query") @ library_vectors(folder, passages, "passage").T
    found = scores.lookup(np.repeat(text_keys(queries), 20, axis=0), np.tile(text_keys(passages), (5, 1)))
    np.testing.assert_allclose(found.reshape(5, 20), expected, rtol=1e-4)
    assert (counts.pairs_scored, again.pairs_scored, again.pairs_reused) == (100, 0, 100)


def test_a_text_is_encoded_once_whoever_asks(tiny_splade_folder: Path, tmp_path: Path, draw_texts: Draw) -> None:
    texts, bank = draw_texts(12), EmbeddingBank(tmp_path).sparse
    first = banked_sparse_vectors(SparseTeacher(sparse(tiny_splade_folder), Run()), bank, texts, "passage", Run(shard_pairs=5))

    # The device does not exist, so encoding anything would be refused.
    unable = SparseTeacher(sparse(tiny_splade_folder), Run(device="cuda:99"))
    again = banked_sparse_vectors(unable, bank, [*texts[3:], texts[0], texts[0]], "passage", Run(shard_pairs=5))

    np.testing.assert_array_equal(again.toarray(), first.toarray()[[*range(3, 12), 0, 0]])
    with pytest.raises(ValueError, match="cuda"):
        banked_sparse_vectors(unable, bank, texts[:1], "query", Run(shard_pairs=5))


def test_a_killed_run_resumes_to_equal_bytes(
    tiny_splade_folder: Path, tmp_path: Path, draw_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsekd.bank.sparse import SparseVectors

    texts, teacher = draw_texts(30, seed=3), SparseTeacher(sparse(tiny_splade_folder), Run(batch_tokens=300))
    whole = banked_sparse_vectors(teacher, EmbeddingBank(tmp_path / "whole").sparse, texts, "passage", Run(shard_pairs=8))
    append, appended = SparseVectors.append, []

    def append_twice(self: SparseVectors, *arguments: Any) -> None:
        if len(appended) == 2:
            raise KeyboardInterrupt
        appended.append(True)
        append(self, *arguments)

    monkeypatch.setattr(SparseVectors, "append", append_twice)
    killed = EmbeddingBank(tmp_path / "killed").sparse
    with pytest.raises(KeyboardInterrupt):
        banked_sparse_vectors(teacher, killed, texts, "passage", Run(shard_pairs=8))
    monkeypatch.undo()

    resumed = banked_sparse_vectors(teacher, killed, texts, "passage", Run(shard_pairs=8))

    assert (resumed != whole).nnz == 0


def test_the_dot_product_of_rows_by_hand() -> None:
    left = scipy.sparse.csr_matrix(np.array([[1, 2, 0], [0, 0, 0], [3, 0, 1]], dtype=np.float32))
    right = scipy.sparse.csr_matrix(np.array([[4, 5, 6], [1, 1, 1], [0, 7, 2]], dtype=np.float32))

    assert pairwise_dot(left, right).tolist() == [14.0, 0.0, 2.0]
    assert pairwise_dot(left, right).dtype == np.float32


def test_dims_of_a_vocabulary_are_named_by_the_tokenizer_and_latent_dims_by_nothing(
    tiny_splade_folder: Path, inference_free_folder: Path, csr_folder: Path
) -> None:
    from sentence_transformers import SparseEncoder

    vocabulary = SparseEncoder(str(tiny_splade_folder), device="cpu").tokenizer.get_vocab()

    assert teacher_vocabulary(sparse(tiny_splade_folder)) == vocabulary
    assert teacher_vocabulary(sparse(inference_free_folder)) == vocabulary
    assert teacher_vocabulary(sparse(csr_folder)) is None


def test_a_folder_without_a_fast_tokenizer_cannot_name_its_dims(tiny_splade_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_splade_folder, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()

    with pytest.raises(ValueError, match=r"has no tokenizer\.json, so nothing says which term a dim is"):
        teacher_vocabulary(sparse(folder))


def test_what_changes_vectors_changes_the_key_and_what_does_not_keeps_it(tiny_splade_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_splade_folder, tmp_path / "copy"))
    key = key_of(teacher_identity(sparse(tiny_splade_folder)))
    changed = [{"max_length": 64}, {"query_prompt": "q: "}, {"passage_prompt": " "}, {"dtype": "bfloat16"}]

    assert key_of(teacher_identity(sparse(folder, name="another"))) == key
    assert len({key, *(key_of(teacher_identity(sparse(folder, **change))) for change in changed)}) == 5
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert key_of(teacher_identity(sparse(folder))) != key


def test_another_kind_of_model_is_refused(tiny_encoder_folder: Path, tiny_masked_lm_folder: Path, tiny_splade_folder: Path) -> None:
    with pytest.raises(ValueError, match="holds SentenceTransformer; expected a saved SparseEncoder"):
        teacher_identity(sparse(tiny_encoder_folder))
    with pytest.raises(ValueError, match=r"holds no model_type in config_sentence_transformers\.json; expected a saved Sparse"):
        teacher_identity(sparse(tiny_masked_lm_folder))
    with pytest.raises(ValueError, match=r'holds a SparseEncoder; expected a dense .* for a SparseEncoder kind = "sparse"'):
        teacher_identity(Teacher(name="d", kind="dense", model=str(tiny_splade_folder)))


def test_another_similarity_than_the_dot_product_is_refused(tiny_splade_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_splade_folder, tmp_path / "copy"))
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "similarity_fn_name": "cosine"}))

    with pytest.raises(ValueError, match="similarity_fn_name is 'cosine'; a sparse teacher scores by the dot product"):
        teacher_identity(sparse(folder))


def test_a_tokenizer_that_a_route_takes_from_elsewhere_is_refused(inference_free_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(inference_free_folder, tmp_path / "copy"))
    [config] = folder.rglob("sentence_bert_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_name_or_path": "org/other"}))

    with pytest.raises(ValueError, match="takes the tokenizer from 'org/other'"):
        teacher_identity(sparse(folder))


def test_a_head_that_the_checkpoint_lacks_is_refused(tiny_splade_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_splade_folder, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "transform.dense" not in name}, folder / "model.safetensors")

    with pytest.raises(ValueError, match=r"lacks 2 weights \(cls\.predictions\.transform\.dense.*would be drawn at random"):
        SparseTeacher(sparse(folder), Run()).encode(["a cat"], role="query")


def test_vectors_that_are_not_finite_are_refused(tiny_splade_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_splade_folder, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.bias"][3] = np.inf
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(ValueError, match=r"2 of 2 query vectors are not finite \(first: text 0, 'a cat'\)"):
        SparseTeacher(sparse(folder), Run()).encode(["a cat", "a dog"], role="query")


def test_cutting_is_said_once(tiny_splade_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="sparsekd")
    teacher = SparseTeacher(sparse(tiny_splade_folder, max_length=8), Run())

    for _ in range(2):
        teacher.encode(["cat " * 20], role="passage")

    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "texts over 8 tokens are cut by the model and counted"
    ]
