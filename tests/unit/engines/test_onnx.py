"""A student's graph in ONNX Runtime against sentence-transformers' own encoding, on other texts than those it was checked with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import read_manifest
from sparsekd.engines.onnx import export_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'sparsekd[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'sparsekd[onnx]'")

pytestmark = pytest.mark.slow  # torch's exporter takes some 10 seconds a graph

TEXTS = ["the river flows through the old city", "norman", "what is the cause of a disease of the heart " * 9, ""]


def by_runtime(folder: Path, texts: Sequence[str]) -> Any:
    """Vectors by the folder's own tokenizer and graph."""
    from transformers import AutoTokenizer

    manifest = read_manifest(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(
        [manifest["prompt"] + text for text in texts],
        padding=True,
        truncation=True,
        max_length=manifest["max_length"],
        return_tensors="np",
    )
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["weights"], {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")})[0]


def by_library(folder: Path, texts: Sequence[str], role: str = "document") -> Any:
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder), device="cpu")
    return getattr(model, f"encode_{role}")(list(texts), convert_to_sparse_tensor=False).numpy()


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory, tiny_splade_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "splade"
    export_onnx(tiny_splade_folder, folder)
    return folder


@pytest.fixture(scope="module")
def save_student(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Callable[..., Path]:
    """Return ``save(model, **student)``: the folder of an untrained student."""
    from sparsekd.collection.beir import read_texts
    from sparsekd.recipe import Student
    from sparsekd.students.building import build_student

    _, passages = read_texts(sample_folder)

    def save(model: Path, **student: Any) -> Path:
        folder = tmp_path_factory.mktemp("student")
        built = build_student(Student.model_validate({"model": str(model), **student}), model, list(passages.values()))
        built.save_pretrained(str(folder), create_model_card=False)
        return folder

    return save


def test_vectors_are_those_of_the_library(splade: Path, tiny_splade_folder: Path) -> None:
    found, expected = by_runtime(splade, TEXTS), by_library(tiny_splade_folder, TEXTS)

    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert (expected > 0.1).any(axis=1).all()
    assert read_manifest(splade)["largest_difference"] < 1e-4


def test_padding_changes_no_vector(splade: Path) -> None:
    alone, together = by_runtime(splade, TEXTS[:1]), by_runtime(splade, TEXTS)

    np.testing.assert_allclose(alone[0], together[0], atol=1e-5, rtol=0)


def test_the_transformer_side_of_an_inference_free_student_goes_out(
    save_student: Callable[..., Path], tiny_headless_folder: Path, tmp_path: Path
) -> None:
    student = save_student(tiny_headless_folder, expansion="passage", initial_active_dims=40)

    export_onnx(student, tmp_path / "out")

    assert read_manifest(tmp_path / "out")["task"] == "document"
    np.testing.assert_allclose(by_runtime(tmp_path / "out", TEXTS), by_library(student, TEXTS), atol=1e-4, rtol=0)


def test_an_autoencoder_goes_out_too(save_student: Callable[..., Path], tiny_encoder_folder: Path, tmp_path: Path) -> None:
    student = save_student(tiny_encoder_folder, kind="csr", hidden_dim=64, k=8, k_aux=16)

    export_onnx(student, tmp_path / "out")

    found = by_runtime(tmp_path / "out", TEXTS)
    np.testing.assert_allclose(found, by_library(student, TEXTS), atol=1e-4, rtol=0)
    assert ((found > 0).sum(axis=1) <= 8).all()


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no modules\.json; expected the folder of a saved SparseEncoder"):
        export_onnx(tmp_path, tmp_path / "out")


def test_a_student_that_cuts_its_vectors_afterwards_is_refused(tiny_splade_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_splade_folder, tmp_path / "student")
    config = tmp_path / "student" / "config_sentence_transformers.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_active_dims": 5}), encoding="utf-8")

    with pytest.raises(ValueError, match="keeps max_active_dims = 5 after its modules"):
        export_onnx(tmp_path / "student", tmp_path / "out")


def test_an_existing_target_is_refused_before_anything_is_loaded(tiny_splade_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export_onnx(tiny_splade_folder, tmp_path)
