"""Each kind of student: built, trained two steps by the library's own trainer, saved, loaded in plain sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from sparsekd.recipe import Student
from sparsekd.students.building import build_student
from sparsekd.students.routes import check_columns, column_prompts, routes

Section = Callable[..., Student]

QUERIES = ["what is a cat", "which river", "heart disease treatment", "old bridge"]
PASSAGES = [
    "a cat and a dog", "the long river in the city", "treatment of heart disease in a patient", "the old bridge and the tower",
    "snow on the mountain", "the king of england", "a school law", "oxygen and water",
]  # fmt: skip
STUDENTS: dict[str, dict[str, Any]] = {
    "splade": {},
    "splade-warm-calibrated": {"head_warmup_steps": 2, "initial_active_dims": 60},
    "passage-expansion": {"expansion": "passage", "initial_active_dims": 60},
    "passage-expansion-frozen-ones": {"expansion": "passage", "static_weights": "ones", "static_frozen": True},
    "query-expansion": {"expansion": "query", "initial_active_dims": 60},
    "csr": {"kind": "csr", "hidden_dim": 128, "k": 8, "k_aux": 16},
    "csr-frozen-body": {"kind": "csr", "hidden_dim": 128, "k": 8, "k_aux": 16, "freeze_body": True},
    "passage-expansion-lora": {"expansion": "passage", "initial_active_dims": 60, "lora_rank": 2},
}
HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="needs peft: pip install 'sparsekd[lora]'")
each_student = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_peft] if "lora_rank" in settings else []) for name, settings in STUDENTS.items()]
)


def train_two_steps(model: Any, student: Student, folder: Path, routing: dict[str, str] | None = None) -> None:
    """Two steps of MarginMSE under SpladeLoss or CSRLoss, with the prompts and routes that the student asks for."""
    from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
    from sentence_transformers.sparse_encoder.losses import CSRLoss, SparseMarginMSELoss, SpladeLoss
    from transformers import PrinterCallback

    rows = {
        "query": QUERIES, "positive": PASSAGES[:4], "negative_1": PASSAGES[4:],
        "label": [[3.0, 1.0], [2.0, 0.0], [5.0, -1.0], [4.0, 2.0]],
    }  # fmt: skip
    columns = [name for name in rows if name != "label"]
    prompts = column_prompts(student, columns)
    if routing is None:
        routing = routes(student, columns)
        check_columns(columns, prompts=prompts, routes=routing)
    loss: Any
    callbacks: list[Any] = []
    if student.kind == "csr":
        loss = CSRLoss(model, SparseMarginMSELoss(model))
    else:
        loss = SpladeLoss(model, SparseMarginMSELoss(model), 1e-3, query_regularizer_weight=1e-3)
        callbacks = [SpladeRegularizerWeightSchedulerCallback(loss)]
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, prompts=prompts, router_mapping=routing, dataloader_pin_memory=False,
        logging_strategy="no",
    )  # fmt: skip
    trainer = SparseEncoderTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=loss, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


LOAD_WITHOUT_SPARSEKD = """
import json, sys
sys.modules["sparsekd"] = None  # any import of it raises
import numpy as np
from sentence_transformers import SparseEncoder
folders, queries, passages = json.loads(sys.argv[1])
for folder in folders:
    model = SparseEncoder(folder, device="cpu")
    found = {"queries": model.encode_query(queries), "passages": model.encode_document(passages)}
    similarity, limit = model.similarity_fn_name, model.max_seq_length
    dense = {name: vectors.to_dense().numpy() for name, vectors in found.items()}
    np.savez(folder + ".npz", similarity=similarity, limit=limit, **dense)
"""


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, student_section: Section, tiny_headless_folder: Path, tiny_encoder_folder: Path
) -> dict[str, tuple[Any, Any, Path]]:
    """{name: (student before training, after, saved folder)}, all loaded in one process that cannot import this project."""
    place = tmp_path_factory.mktemp("trained")
    made = {}
    for name, settings in STUDENTS.items():
        if "lora_rank" in settings and not HAS_PEFT:
            continue
        folder = tiny_encoder_folder if settings.get("kind") == "csr" else tiny_headless_folder
        student = student_section(folder, max_length=16, dropout=0.0, query_prompt="which ", passage_prompt="the ", **settings)
        before, model = (build_student(student, folder, PASSAGES) for _ in range(2))
        train_two_steps(model, student, place / "run")
        model.save_pretrained(str(place / name), create_model_card=False)
        made[name] = (before, model, place / name)
    arguments = json.dumps([[str(folder) for _, _, folder in made.values()], QUERIES, PASSAGES])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_SPARSEKD, arguments], env=environment, check=True, timeout=200)
    return made


def encoded(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_query(QUERIES).to_dense(), model.encode_document(PASSAGES).to_dense()


@each_student
def test_a_trained_student_loads_without_this_project_and_gives_equal_vectors(trained: dict[str, Any], name: str) -> None:
    _, model, folder = trained[name]
    loaded = np.load(f"{folder}.npz")

    queries, passages = encoded(model)

    # Adapters that are merged add in another order: 3e-6 was seen.
    np.testing.assert_allclose(loaded["queries"], queries, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loaded["passages"], passages, rtol=1e-5, atol=1e-5)
    assert str(loaded["similarity"]) == "dot"
    assert int(loaded["limit"]) == 16


@each_student
def test_two_steps_move_what_may_move_and_nothing_else(trained: dict[str, Any], name: str) -> None:
    before, after, _ = trained[name]
    settings = STUDENTS[name]
    fixed = {"static_frozen": "SparseStaticEmbedding", "freeze_body": "Transformer"}
    frozen = next((kind for key, kind in fixed.items() if settings.get(key)), None)

    for (title, old), (_, new) in zip(before.named_modules(), after.named_modules(), strict=True):
        if type(old).__name__ not in ("Transformer", "SparseStaticEmbedding", "SparseAutoEncoder"):
            continue
        moved = any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
        assert moved is (type(old).__name__ != frozen), title


@each_student
def test_building_twice_gives_the_same_weights(
    student_section: Section, tiny_headless_folder: Path, tiny_encoder_folder: Path, name: str
) -> None:
    folder = tiny_encoder_folder if STUDENTS[name].get("kind") == "csr" else tiny_headless_folder
    student = student_section(folder, **STUDENTS[name])

    torch.manual_seed(1)
    first = build_student(student, folder, PASSAGES).state_dict()
    torch.manual_seed(2)
    second = build_student(student, folder, PASSAGES[::-1]).state_dict()  # the order of passages changes nothing

    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@each_student
def test_building_draws_nothing_from_the_global_generator(
    student_section: Section, tiny_headless_folder: Path, tiny_encoder_folder: Path, name: str
) -> None:
    folder = tiny_encoder_folder if STUDENTS[name].get("kind") == "csr" else tiny_headless_folder
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    build_student(student_section(folder, **STUDENTS[name]), folder, PASSAGES)

    assert torch.equal(torch.rand(3), expected)


def test_a_text_of_no_side_is_an_error_where_sides_differ(trained: dict[str, Any]) -> None:
    _, model, _ = trained["passage-expansion"]

    with pytest.raises(ValueError, match="Could not determine route"):
        model.encode(["a cat"])


def test_a_column_that_no_route_names_stops_training(tmp_path: Path, student_section: Section, tiny_headless_folder: Path) -> None:
    student = student_section(tiny_headless_folder, expansion="passage")
    model = build_student(student, tiny_headless_folder, PASSAGES)
    misspelt = {"question": "query", "positive": "document", "negative_1": "document"}

    with pytest.raises(ValueError, match=r"Could not determine route for task=None|You must provide a `router_mapping`"):
        train_two_steps(model, student, tmp_path, misspelt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"budget": {"passage_active_dims": 300.0}},
            r"\[student\.budget\] passage_active_dims = 300: the vocabulary has 2\d\d; lower",
        ),
        ({"budget": {"query_active_dims": 300.0}}, r"\[student\.budget\] query_active_dims = 300: the vocabulary has 2\d\d; lower"),
        ({"initial_active_dims": 300}, r"\[student\] initial_active_dims = 300: the vocabulary has 2\d\d; lower"),
    ],
)
def test_more_active_dims_than_the_vocabulary_has_are_refused(
    student_section: Section, tiny_headless_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(student_section(tiny_headless_folder, **settings), tiny_headless_folder)


def test_a_collection_without_passages_is_refused(student_section: Section, tiny_headless_folder: Path) -> None:
    with pytest.raises(ValueError, match="the collection has no passages to start from"):
        build_student(student_section(tiny_headless_folder, expansion="passage"), tiny_headless_folder, [])
