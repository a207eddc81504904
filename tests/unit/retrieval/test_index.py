"""The index of a student: what is in it, search of it against brute force, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsekd.artifact import IntegrityError
from sparsekd.evaluation.student import sparse_rankings
from sparsekd.mining.ranking import to_ids
from sparsekd.recipe import Run
from sparsekd.retrieval import StudentEncoder, StudentIndex, building, encoder, find_or_build

QUERIES = ["old river", "heat of the boundary layer", "queen of england", "the wave"]


def vectors_of(index: StudentIndex) -> scipy.sparse.csr_matrix:
    return scipy.sparse.vstack([block for _, block in index.blocks()], format="csr")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.name != "manifest.json"}


@pytest.fixture
def index(student_folder: Path, collection_folder: Path, tmp_path: Path) -> StudentIndex:
    return find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "indexes")


def test_blocks_hold_what_the_library_encodes_in_corpus_order(
    index: StudentIndex, student_folder: Path, passages: dict[str, str]
) -> None:
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(student_folder), device="cpu")
    expected = model.encode_document(list(passages.values()), convert_to_sparse_tensor=False, show_progress_bar=False)
    vectors = vectors_of(index)

    assert index.passage_ids == list(passages)
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(passages), index.num_dims))
    np.testing.assert_allclose(vectors.toarray(), expected.numpy(), atol=1e-5)
    assert index.terms is not None
    assert index.terms[5:8] == ["a", "an", "the"]


@pytest.mark.parametrize(
    ("body", "section"),
    [
        ("tiny_masked_lm_folder", {"expansion": "passage"}),
        ("tiny_headless_folder", {"kind": "csr", "hidden_dim": 64, "k": 8, "k_aux": 16}),
    ],
)
def test_every_kind_of_student_is_searched_as_evaluation_ranks_it(
    request: pytest.FixtureRequest,
    save_student: Callable[..., Path],
    collection_folder: Path,
    tmp_path: Path,
    body: str,
    section: dict[str, Any],
) -> None:
    folder = save_student(request.getfixturevalue(body), **section)
    index = find_or_build(StudentEncoder(folder, Run()), collection_folder, tmp_path / "indexes")
    queries = StudentEncoder(folder, Run()).encode(QUERIES, role="query")

    ids, scores = to_ids(*index.search(queries, 9), index.passage_ids)

    expected = sparse_rankings(queries, vectors_of(index), QUERIES, index.passage_ids, depth=9)
    assert ids == [expected[query].passage_ids for query in QUERIES]
    for row, query in enumerate(QUERIES):
        np.testing.assert_array_equal(scores[row], expected[query].scores)
    assert (index.terms is None) == (section.get("kind") == "csr")


def test_a_student_that_declares_the_cosine_scores_by_it(
    save_student: Callable[..., Path],
    tiny_masked_lm_folder: Path,
    collection_folder: Path,
    tmp_path: Path,
    passages: dict[str, str],
) -> None:
    from sentence_transformers import SparseEncoder

    folder = save_student(tiny_masked_lm_folder, similarity="cosine")
    index = find_or_build(StudentEncoder(folder, Run()), collection_folder, tmp_path / "indexes")
    positions, scores = index.search(StudentEncoder(folder, Run()).encode(QUERIES[:1], role="query"), 100)

    model = SparseEncoder(str(folder), device="cpu")
    plain: dict[str, Any] = {"convert_to_sparse_tensor": False, "show_progress_bar": False}
    query, texts = model.encode_query(QUERIES[:1], **plain), model.encode_document(list(passages.values()), **plain)
    expected = model.similarity(query, texts).numpy()[0]
    np.testing.assert_allclose(scores[0], expected[positions[0]], atol=1e-5)
    assert index.artifact.manifest["has_unit_length"]


def integers(rows: int, seed: int) -> scipy.sparse.csr_matrix:
    """Return vectors of few different small integers: sums are exact, ties many; some rows and dims are empty."""
    generator = np.random.default_rng(seed)
    dense = generator.integers(1, 3, (rows, 30)) * (generator.random((rows, 30)) < 0.2)
    dense[::9], dense[:, 4] = 0, 0
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def index_of(vectors: scipy.sparse.csr_matrix, folder: Path, block: int) -> StudentIndex:
    """Publish the index of given vectors, whose ids descend, in blocks of ``block`` passages."""
    with building.published(folder, {"made": "by a test"}, {}) as writer:
        for start in range(0, vectors.shape[0], block):
            writer.add(vectors[start : start + block])
        ids = [f"p{vectors.shape[0] - row}" for row in range(vectors.shape[0])]
        writer.finish(ids, np.arange(len(ids), dtype=np.int64), None, has_unit_length=False)
    return StudentIndex.open(folder)


@pytest.mark.parametrize("depth", [1, 10, 500])
@pytest.mark.parametrize("block", [1, 7, 64, 200])
def test_search_equals_brute_force_to_the_id_in_blocks_of_any_size(tmp_path: Path, depth: int, block: int) -> None:
    queries, vectors = integers(20, 0), integers(200, 1)
    index = index_of(vectors, tmp_path / "index", block)

    ids, scores = to_ids(*index.search(queries, depth), index.passage_ids)

    dense = queries.toarray() @ vectors.toarray().T
    for row in range(20):
        by_score = sorted((-score, index.passage_ids[place], place) for place, score in enumerate(dense[row]) if score)
        order = [place for _, _, place in by_score]
        assert ids[row] == [index.passage_ids[position] for position in order[:depth]]
        assert scores[row].tolist() == dense[row, order[:depth]].tolist()


@pytest.mark.parametrize("block", [1, 33])
def test_blocks_give_back_the_vectors_and_weights_each_passage(tmp_path: Path, block: int) -> None:
    vectors = integers(50, 2)
    index = index_of(vectors, tmp_path / "index", block)

    assert [first for first, _ in index.blocks()] == list(range(0, 50, block))
    assert (vectors_of(index) != vectors).nnz == 0
    for position in (0, 32, 49):
        np.testing.assert_array_equal(index.weights(position, np.arange(30)), vectors[position].toarray()[0])


def test_encoding_in_blocks_of_any_size_gives_the_same_vectors(
    student_folder: Path, collection_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "whole")
    monkeypatch.setattr(encoder, "TEXTS", 8)
    monkeypatch.setattr(building, "BLOCK_PASSAGES", 16)

    parts = find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "parts")

    assert [block.shape[0] for _, block in parts.blocks()] == [16, 16, 16, 13]
    np.testing.assert_allclose(vectors_of(parts).toarray(), vectors_of(whole).toarray(), atol=1e-6)


def test_a_block_ends_at_its_postings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BLOCK_POSTINGS", 20)
    parts = [scipy.sparse.csr_matrix(np.ones((2, 5), dtype=np.float32))] * 5

    assert [block.shape[0] for block in building.joined_blocks(parts)] == [4, 4, 2]


def test_the_same_student_and_passages_are_found_and_nothing_is_encoded(
    index: StudentIndex, student_folder: Path, collection_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_texts(*_: object, **__: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(StudentEncoder, "encode_blocks", no_texts)

    again = find_or_build(StudentEncoder(student_folder, Run(batch_tokens=99)), collection_folder, tmp_path / "indexes")

    assert again.artifact.folder == index.artifact.folder


def test_a_changed_passage_or_student_makes_another_index(
    index: StudentIndex, save_student: Callable[..., Path], tiny_masked_lm_folder: Path, student_folder: Path,
    collection_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    student = StudentEncoder(save_student(tiny_masked_lm_folder), Run())
    other_student = find_or_build(student, collection_folder, tmp_path / "indexes")
    corpus = collection_folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"_id": "new", "text": "a cat"}\n', encoding="utf-8")

    other_passages = find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "indexes")

    assert len({index.artifact.key, other_student.artifact.key, other_passages.artifact.key}) == 3


def test_offsets_are_where_the_passages_lines_begin(index: StudentIndex, collection_folder: Path) -> None:
    with (collection_folder / "corpus.jsonl").open("rb") as stream:
        for passage_id, offset in zip(index.passage_ids, index.offsets.tolist(), strict=True):
            stream.seek(offset)
            assert json.loads(stream.readline())["_id"] == passage_id


def test_two_builds_give_the_same_bytes(student_folder: Path, collection_folder: Path, tmp_path: Path) -> None:
    builds = [find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / name) for name in ("one", "two")]

    assert files_of(builds[0].artifact.folder) == files_of(builds[1].artifact.folder)


@pytest.mark.parametrize("name", ["blocks/00000.weights.npy", "blocks/00000.passages.npy", "id_rank.npy", "passage_ids.txt"])
def test_a_changed_byte_is_refused_by_name(index: StudentIndex, name: str) -> None:
    path = index.artifact.folder / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)

    with pytest.raises(IntegrityError, match=name):
        StudentIndex.open(index.artifact.folder)


def test_a_missing_block_is_refused_by_name(
    index: StudentIndex, student_folder: Path, collection_folder: Path, tmp_path: Path
) -> None:
    (index.artifact.folder / "blocks" / "00000.starts.npy").unlink()

    with pytest.raises(IntegrityError, match=r"00000\.starts\.npy: missing, its manifest lists it; remove"):
        find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "indexes")


def test_a_build_killed_between_blocks_publishes_nothing_and_the_next_one_sweeps(
    student_folder: Path, collection_folder: Path, tmp_path: Path
) -> None:
    program = f"""
import os, signal
from pathlib import Path
from sparsekd.recipe import Run
from sparsekd.retrieval import building, encoder
encoder.TEXTS, building.BLOCK_PASSAGES = 8, 16
add = building.IndexWriter.add
def add_and_die(writer, vectors):
    add(writer, vectors)
    if len(writer.block_passages) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
building.IndexWriter.add = add_and_die
student = encoder.StudentEncoder(Path({str(student_folder)!r}), Run())
building.find_or_build(student, Path({str(collection_folder)!r}), Path({str(tmp_path / "indexes")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), capture_output=True, text=True, check=False)
    left = [path.name for path in (tmp_path / "indexes").iterdir()]

    index = find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "indexes")

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(left) == 1
    assert left[0].startswith(".tmp-")
    assert [path.name for path in (tmp_path / "indexes").iterdir()] == [index.artifact.key]


def test_a_malformed_passage_is_refused_before_any_text_is_encoded(
    student_folder: Path, collection_folder: Path, tmp_path: Path
) -> None:
    corpus = collection_folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"_id": "p0", "text": "another"}\n', encoding="utf-8")

    with pytest.raises(ValueError, match=r"corpus\.jsonl:64: found _id 'p0' again with another text"):
        find_or_build(StudentEncoder(student_folder, Run()), collection_folder, tmp_path / "indexes")
    assert not (tmp_path / "indexes").exists()


def test_a_folder_that_holds_no_sparse_encoder_is_refused(tiny_encoder_folder: Path, tiny_masked_lm_folder: Path) -> None:
    with pytest.raises(ValueError, match="holds SentenceTransformer; expected a saved SparseEncoder"):
        StudentEncoder(tiny_encoder_folder, Run())
    with pytest.raises(ValueError, match=r"holds no model_type in config_sentence_transformers\.json; expected"):
        StudentEncoder(tiny_masked_lm_folder, Run())


def test_queries_of_another_width_are_refused(tmp_path: Path) -> None:
    index = index_of(integers(10, 3), tmp_path / "index", 10)

    with pytest.raises(ValueError, match="queries of 29 dims in an index of 30"):
        index.search(integers(2, 4)[:, :29], 5)


def test_an_artifact_of_another_kind_is_refused(student_folder: Path, tmp_path: Path) -> None:
    from sparsekd.artifact import publish

    with publish(tmp_path / "other", kind="student", fields={}, extra={}):
        pass

    with pytest.raises(ValueError, match="holds a student; expected an index"):
        StudentIndex.open(tmp_path / "other")
