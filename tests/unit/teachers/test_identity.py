"""What changes a teacher's key and what does not; asked of real model folders, without loading a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import key_of
from sparsekd.recipe import DenseMiner, Run, Teacher
from sparsekd.teachers import identity
from sparsekd.teachers.cross_encoder import CrossEncoderScorer
from sparsekd.teachers.dense import DenseEncoder
from sparsekd.teachers.identity import encoder_identity, teacher_identity

Edit = Callable[[Path], object]


@pytest.fixture
def dense_folder(tiny_encoder_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder_folder, tmp_path / "dense"))


@pytest.fixture
def cross_folder(tiny_cross_encoder_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cross_encoder_folder, tmp_path / "cross"))


def dense(folder: Path, **fields: Any) -> Teacher:
    return Teacher(**{"name": "d", "kind": "dense", "model": str(folder), **fields})


def cross(folder: Path, **fields: Any) -> Teacher:
    return Teacher(**{"name": "c", "kind": "cross-encoder", "model": str(folder), **fields})


def key(teacher: Teacher) -> str:
    return key_of(teacher_identity(teacher))


def flip_last_byte(name: str) -> Edit:
    def edit(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return edit


def set_json(name: str, **fields: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **fields}), encoding="utf-8")

    return edit


def add(name: str, text: str = "x") -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return edit


CHANGING_EDITS = {
    "one byte of the weights": flip_last_byte("model.safetensors"),
    "one byte of the tokenizer": flip_last_byte("tokenizer.json"),
    "a tokenizer setting": set_json("tokenizer_config.json", do_lower_case=False),
    "the saved length limit": set_json("tokenizer_config.json", model_max_length=64),
    "a setting of the body": set_json("config.json", layer_norm_eps=1e-6),
    "the pooling": set_json("1_Pooling/config.json", pooling_mode="cls"),
    "the declared similarity": set_json("config_sentence_transformers.json", similarity_fn_name="cosine"),
    "the truncated dimension": set_json("config_sentence_transformers.json", truncate_dim=16),
    "code beside the weights": add("modeling_x.py"),
    "weights of one more module": add("2_Dense/model.safetensors"),
}
CHANGING_FIELDS: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 64},
    "query_prompt": {"query_prompt": "query: "},
    "passage_prompt": {"passage_prompt": "passage: "},
    "a space in a prompt": {"query_prompt": " "},
    "dtype": {"dtype": "bfloat16"},
    "trust_remote_code": {"trust_remote_code": True},
}
KEEPING_EDITS = {
    "README": add("README.md", "edited"),
    "git attributes": add(".gitattributes"),
    "an ONNX export": add("onnx/model.onnx"),
    "an OpenVINO export": add("openvino/config.json"),
    "pickled weights beside the safe ones": add("pytorch_model.bin"),
    "a training checkpoint": add("checkpoint-5/model.safetensors"),
    "a touched file": lambda folder: os.utime(folder / "model.safetensors", (1, 1)),
}


@pytest.mark.parametrize("name", CHANGING_EDITS)
def test_changing_the_model_changes_a_dense_key(dense_folder: Path, name: str) -> None:
    before = key(dense(dense_folder))

    CHANGING_EDITS[name](dense_folder)

    assert key(dense(dense_folder)) != before


@pytest.mark.parametrize("name", ["one byte of the weights", "one byte of the tokenizer", "a setting of the body"])
def test_changing_the_model_changes_a_cross_encoder_key(cross_folder: Path, name: str) -> None:
    before = key(cross(cross_folder))

    CHANGING_EDITS[name](cross_folder)

    assert key(cross(cross_folder)) != before


@pytest.mark.parametrize("make", [dense, cross])
@pytest.mark.parametrize("name", CHANGING_FIELDS)
def test_changing_how_it_is_run_changes_the_key(
    dense_folder: Path, cross_folder: Path, make: Callable[..., Teacher], name: str
) -> None:
    folder = dense_folder if make is dense else cross_folder

    assert key(make(folder, **CHANGING_FIELDS[name])) != key(make(folder))


@pytest.mark.parametrize("field", ["stage", "kind", "activation", "backend", "weights", "max_length", "dtype"])
def test_every_field_of_a_cross_encoder_is_part_of_the_key(cross_folder: Path, field: str) -> None:
    fields = teacher_identity(cross(cross_folder))

    assert key_of({**fields, field: "another"}) != key_of(fields)


def test_a_new_version_of_this_code_changes_the_key(
    dense_folder: Path, cross_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(dense(dense_folder)), key(cross(cross_folder))

    monkeypatch.setattr(identity, "DENSE_STAGE", "teachers/dense v2")
    monkeypatch.setattr(identity, "CROSS_ENCODER_STAGE", "teachers/cross-encoder v2")

    assert not {*before} & {key(dense(dense_folder)), key(cross(cross_folder))}


@pytest.mark.parametrize("name", KEEPING_EDITS)
def test_what_cannot_change_a_score_keeps_the_key(dense_folder: Path, name: str) -> None:
    before = key(dense(dense_folder))

    KEEPING_EDITS[name](dense_folder)

    assert key(dense(dense_folder)) == before


def test_name_and_place_of_the_folder_keep_the_key(dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(dense(dense_folder))

    moved = dense_folder.rename(tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)

    assert key(dense(moved)) == key(dense(Path("renamed"))) == key(dense(moved, name="another-name")) == before


@pytest.mark.parametrize("field", ["device", "threads", "batch_tokens", "shard_pairs", "cache", "log_level"])
def test_where_and_how_fast_it_runs_keeps_the_identity(dense_folder: Path, cross_folder: Path, field: str) -> None:
    values = {"device": "cuda:7", "threads": 3, "batch_tokens": 99, "shard_pairs": 7, "cache": "x", "log_level": "DEBUG"}
    run = Run(**{field: values[field]})

    assert DenseEncoder(dense(dense_folder), run).identity == encoder_identity(dense(dense_folder))
    assert CrossEncoderScorer(cross(cross_folder), run).identity == teacher_identity(cross(cross_folder))


def test_one_model_is_one_encoder_whether_it_mines_or_teaches(dense_folder: Path) -> None:
    miner = DenseMiner(kind="dense", model=str(dense_folder), quota=3, depth=9, skip=1)

    assert encoder_identity(miner) == teacher_identity(dense(dense_folder))


def test_an_identity_holds_no_path_and_no_name(dense_folder: Path) -> None:
    text = json.dumps(teacher_identity(dense(dense_folder, name="a-name-of-mine")))

    assert str(dense_folder.parent) not in text
    assert "a-name-of-mine" not in text


def test_similarity_defaults_to_cosine(dense_folder: Path) -> None:
    (dense_folder / "config_sentence_transformers.json").unlink()

    assert teacher_identity(dense(dense_folder))["similarity"] == "cosine"


def test_identity_imports_no_torch(dense_folder: Path) -> None:
    code = (
        "import sys; from sparsekd.recipe import Teacher, Run; from sparsekd.teachers import scoring, dense\n"
        f"teacher = Teacher(name='d', kind='dense', model={str(dense_folder)!r})\n"
        "print(dense.DenseEncoder(teacher, Run()).identity['kind'], 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.split() == ["dense", "False"]


def test_a_cross_encoder_called_dense_is_refused(cross_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a CrossEncoder; expected a dense bi-encoder; .* kind = \"cross-encoder\""):
        teacher_identity(dense(cross_folder))


def test_a_plain_classifier_called_dense_is_refused(cross_folder: Path) -> None:
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (cross_folder / name).unlink()

    with pytest.raises(ValueError, match="holds a BertForSequenceClassification; expected a dense bi-encoder"):
        teacher_identity(dense(cross_folder))


def test_a_folder_that_says_no_pooling_is_refused(tiny_headless_folder: Path) -> None:
    message = (
        r"has no modules.json, so nothing says .* expected a saved sentence-transformers folder; "
        "save it once as a SentenceTransformer with the pooling it was trained with"
    )
    with pytest.raises(ValueError, match=message):
        teacher_identity(dense(tiny_headless_folder))


def test_a_router_saved_by_the_library_is_refused(tiny_encoder_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    routes = [list(SentenceTransformer(str(tiny_encoder_folder), device="cpu").children()) for _ in range(2)]
    router = Router.for_query_document(query_modules=routes[0], document_modules=routes[1])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "routed"), create_model_card=False)

    with pytest.raises(ValueError, match=r"modules.json lists a .*\.Router, .* queries would take the document route"):
        teacher_identity(dense(tmp_path / "routed"))


def test_an_asym_module_of_older_versions_is_refused(dense_folder: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Asym"}]
    (dense_folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")

    with pytest.raises(ValueError, match=r"lists a sentence_transformers.models.Asym, .* expected one encoder for both"):
        teacher_identity(dense(dense_folder))


def test_a_late_interaction_similarity_is_refused(dense_folder: Path) -> None:
    set_json("config_sentence_transformers.json", similarity_fn_name="maxsim")(dense_folder)

    with pytest.raises(ValueError, match=r"similarity_fn_name is 'maxsim'; expected one of cosine, dot, euclidean, manhattan"):
        teacher_identity(dense(dense_folder))


def test_a_tokenizer_from_another_place_is_refused(dense_folder: Path) -> None:
    set_json("sentence_bert_config.json", tokenizer_name_or_path="org/other")(dense_folder)

    with pytest.raises(ValueError, match=r"takes the tokenizer from 'org/other'; expected it in the model's folder"):
        teacher_identity(dense(dense_folder))


def test_remote_code_from_another_place_is_refused(dense_folder: Path) -> None:
    set_json("config.json", auto_map={"AutoModel": "org/code--modeling.Model"})(dense_folder)

    with pytest.raises(ValueError, match=r"takes its code from 'org/code--modeling.Model'; expected it in the model's folder"):
        teacher_identity(dense(dense_folder, trust_remote_code=True))
