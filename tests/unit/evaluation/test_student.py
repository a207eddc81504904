"""The student's vectors against the library's own, its search against brute force, its sparsity by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.evaluation.runs import ranked
from sparsekd.evaluation.student import encode_csr, sparse_rankings, sparsity
from sparsekd.recipe import Student

WORDS = "the heat of a boundary layer is not old flow river school party queen england oxygen number wave blood".split()


def draw_texts(count: int, longest: int) -> list[str]:
    generator = np.random.default_rng(0)
    return ["", *(" ".join(generator.choice(WORDS, size=generator.integers(1, longest + 1))) for _ in range(count - 1))]


def build(folder: Path, **fields: Any) -> Any:
    from sparsekd.students.building import build_student

    return build_student(Student(model=str(folder), max_length=32, query_prompt="what is the ", **fields), folder)


@pytest.fixture(scope="module")
def model(tiny_masked_lm_folder: Path) -> Any:
    return build(tiny_masked_lm_folder)


def library_vectors(model: Any, texts: list[str], role: str) -> np.ndarray[Any, Any]:
    encode = model.encode_query if role == "query" else model.encode_document
    return np.asarray(encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False).cpu().numpy())


@pytest.mark.parametrize("fixture", ["tiny_masked_lm_folder", "tiny_headless_folder"])
@pytest.mark.parametrize("role", ["query", "passage"])
@pytest.mark.parametrize(("fused", "packed"), [(True, True), (True, False), (False, True), (False, False)])
def test_vectors_equal_the_librarys_own(request: pytest.FixtureRequest, fixture: str, role: Any, fused: bool, packed: bool) -> None:
    model, texts = build(request.getfixturevalue(fixture)), draw_texts(40, longest=50)  # some over the limit of 32 tokens

    vectors = encode_csr(model, texts, role=role, batch_tokens=128, fused=fused, packed=packed)

    np.testing.assert_allclose(vectors.toarray(), library_vectors(model, texts, role), atol=1e-5)
    assert (vectors.dtype, vectors.format, vectors.has_canonical_format) == (np.float32, "csr", True)
    assert (vectors.data > 0).all()


def test_blocks_and_batches_do_not_change_order_or_vectors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = draw_texts(23, longest=20)
    whole = encode_csr(model, texts, role="passage", batch_tokens=8192, fused=True)
    monkeypatch.setattr("sparsekd.evaluation.student.BLOCK", 7)
    monkeypatch.setattr("sparsekd.evaluation.student._BLOCK_ROWS", 2)

    parts = encode_csr(model, texts, role="passage", batch_tokens=40, fused=True)

    np.testing.assert_allclose(parts.toarray(), whole.toarray(), atol=1e-5)


def test_max_active_dims_of_the_model_is_kept(tiny_masked_lm_folder: Path) -> None:
    model, texts = build(tiny_masked_lm_folder), draw_texts(5, longest=9)
    model.max_active_dims = 4

    vectors = encode_csr(model, texts, role="passage", batch_tokens=64, fused=True)

    assert np.diff(vectors.indptr).tolist() == [4] * 5
    np.testing.assert_allclose(vectors.toarray(), library_vectors(model, texts, "passage"), atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_texts_over_the_limit_are_counted(model: Any, caplog: pytest.LogCaptureFixture, packed: bool) -> None:
    fits, over = " ".join(["cat"] * 30), " ".join(["cat"] * 31)  # and two special tokens, at a limit of 32

    with caplog.at_level("INFO"):
        encode_csr(model, ["a", fits, over, over], role="passage", batch_tokens=64, fused=True, packed=packed)

    assert "passage texts 4, 2 of them over the limit of tokens" in caplog.text


def test_routers_encode_each_side_by_its_own_route(tiny_masked_lm_folder: Path) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    splade, texts = build(tiny_masked_lm_folder), draw_texts(30, longest=50)
    static = SparseStaticEmbedding(splade.tokenizer)
    router = Router.for_query_document([static], [splade[0], splade[1]], default_route=None, allow_empty_key=False)
    student = SparseEncoder(modules=[router], device="cpu")

    for role in ("query", "passage"):
        vectors = encode_csr(student, texts[1:], role=role, batch_tokens=128, fused=True)

        np.testing.assert_allclose(vectors.toarray(), library_vectors(student, texts[1:], role), atol=1e-5)


def test_a_text_is_tokenised_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tokenizer = [], type(model.tokenizer)
    encode = tokenizer._encode_plus
    monkeypatch.setattr(tokenizer, "_encode_plus", lambda self, text, *a, **k: seen.extend(text) or encode(self, text, *a, **k))

    encode_csr(model, ["a cat", "a dog"], role="passage", batch_tokens=64, fused=False, packed=False)

    assert seen == ["a cat", "a dog"]


def test_no_texts_give_no_rows_of_the_right_width(model: Any) -> None:
    vectors = encode_csr(model, [], role="query", batch_tokens=64, fused=True)

    assert vectors.shape == (0, model.get_embedding_dimension())


def test_encoding_leaves_the_model_as_it_was(model: Any) -> None:
    model.train()

    encode_csr(model, ["a cat"], role="query", batch_tokens=64, fused=True)

    assert model.training
    assert "forward" not in vars(model[1])
    model.eval()


def test_dropout_is_off_while_encoding(model: Any) -> None:
    model.train()

    first, second = (encode_csr(model, ["a cat"], role="query", batch_tokens=64, fused=False) for _ in range(2))

    model.eval()
    np.testing.assert_array_equal(first.toarray(), second.toarray())


def test_a_diverged_student_is_refused(tiny_masked_lm_folder: Path) -> None:
    import torch

    model = build(tiny_masked_lm_folder)
    with torch.no_grad():
        model[0].model.get_output_embeddings().bias[3] = float("inf")

    with pytest.raises(ValueError, match=r"2 of 2 passage vectors are not finite \(first: 'a cat'\)"):
        encode_csr(model, ["a cat", "a dog"], role="passage", batch_tokens=64, fused=False)


def small_integers(shape: tuple[int, int], seed: int) -> scipy.sparse.csr_matrix:
    """Sparse rows of small integers: exact products, many ties, some empty rows."""
    generator = np.random.default_rng(seed)
    dense = generator.integers(1, 3, shape) * (generator.random(shape) < 0.15)
    dense[:: max(2, shape[0] // 3)] = 0
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


@pytest.mark.parametrize("depth", [1, 7, 100])
@pytest.mark.parametrize("group", [1, 7, 1 << 24])
def test_search_equals_brute_force(monkeypatch: pytest.MonkeyPatch, depth: int, group: int) -> None:
    monkeypatch.setattr("sparsekd.mining.sparse._GROUP", group)
    queries, passages = small_integers((13, 30), 0), small_integers((60, 30), 1)
    query_ids, passage_ids = [f"q{row}" for row in range(13)], [f"p{row}" for row in range(60)]  # p10 before p9

    rankings = sparse_rankings(queries, passages, query_ids, passage_ids, depth=depth)

    scores = queries.toarray() @ passages.toarray().T
    for row, query_id in enumerate(query_ids):
        hits = np.flatnonzero(scores[row] > 0)
        expected = ranked([passage_ids[hit] for hit in hits], scores[row, hits])
        assert rankings[query_id].passage_ids == expected.passage_ids[:depth]
        np.testing.assert_array_equal(rankings[query_id].scores, expected.scores[:depth])
    assert list(rankings) == query_ids
    assert rankings["q0"].passage_ids == []  # an empty query finds nothing


def test_search_of_the_students_vectors_equals_the_librarys_similarity(model: Any) -> None:
    texts = draw_texts(30, longest=20)
    queries = encode_csr(model, texts[:6], role="query", batch_tokens=256, fused=True)
    passages = encode_csr(model, texts, role="passage", batch_tokens=256, fused=True)
    ids = [f"p{row:02}" for row in range(30)]

    rankings = sparse_rankings(queries, passages, ids[:6], ids, depth=30)

    scores = library_vectors(model, texts[:6], "query") @ library_vectors(model, texts, "passage").T
    for row, query_id in enumerate(ids[:6]):
        found = [ids.index(passage_id) for passage_id in rankings[query_id].passage_ids]
        np.testing.assert_allclose(rankings[query_id].scores, scores[row, found], rtol=1e-4)
        assert len(found) == 30


def test_vectors_that_do_not_fit_are_refused() -> None:
    queries, passages = small_integers((2, 30), 0), small_integers((3, 31), 1)

    with pytest.raises(ValueError, match=r"vectors \(2, 30\) and \(3, 31\) for 2 query_ids and 3 passage_ids"):
        sparse_rankings(queries, passages, ["a", "b"], ["x", "y", "z"])
    with pytest.raises(ValueError, match="for 1 query_ids and 3 passage_ids"):
        sparse_rankings(queries, queries, ["a"], ["x", "y", "z"])


def test_sparsity_by_hand() -> None:
    queries = scipy.sparse.csr_matrix(np.array([[1, 0, 2, 0], [3, 0, 0, 0]], dtype=np.float32))
    passages = scipy.sparse.csr_matrix(np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]], dtype=np.float32))

    figures = sparsity(queries, passages)

    # queries: 1, 0, 1/2, 0; passages: 1/2, 1/4, 3/4, 1/4; FLOPS = 1/2 + 3/8
    assert figures == {"query_active_dims": 1.5, "passage_active_dims": 1.75, "FLOPS": 0.875}


def test_flops_is_the_mean_number_of_terms_a_pair_shares() -> None:
    queries, passages = small_integers((20, 40), 2), small_integers((30, 40), 3)

    shared = (queries.toarray() > 0).astype(float) @ (passages.toarray() > 0).astype(float).T
    assert sparsity(queries, passages)["FLOPS"] == pytest.approx(shared.mean())


def test_stored_zeros_are_not_active() -> None:
    vectors = scipy.sparse.csr_matrix((np.array([1, 0], np.float32), np.array([0, 1]), np.array([0, 2])), shape=(1, 3))

    assert sparsity(vectors, vectors) == {"query_active_dims": 1.0, "passage_active_dims": 1.0, "FLOPS": 1.0}


def test_sparsity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no passage vectors"):
        sparsity(small_integers((2, 3), 0), small_integers((0, 3), 0))
