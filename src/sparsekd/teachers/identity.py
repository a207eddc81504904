"""What decides a teacher's outputs, as JSON-able fields: the key under which its vectors and scores are banked.

In: digests of weights, tokenizer and configuration, length limit, prompts, precision, similarity or activation, backend, and
the version of this code; for BM25 its settings and the passages it counts; for imported scores what their owner states. Out:
names, paths, device, batch sizes, threads. One model is one encoder whether it mines or teaches.
Imports no torch, so a full cache hit is known in the time it takes to hash the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from sparsekd.bank.text_key import text_keys
from sparsekd.model_reference import resolve, weights_identity
from sparsekd.recipe import BM25Teacher, EncoderSpec, Teacher
from sparsekd.teachers.protocols import Similarity

# Raise a version when a change to this room changes scores beyond float rounding: what the old one banked is then not used.
DENSE_STAGE = "teachers/dense v1"
CROSS_ENCODER_STAGE = "teachers/cross-encoder v1"
SPARSE_STAGE = "teachers/sparse v1"
BM25_STAGE = "teachers/bm25 v1"
FILE_STAGE = "teachers/file v1"
INT8 = "int8: weights per row, activations per token and 128 dims, v1"
"""What ``openvino_model`` does to matrices; a change of it is another teacher."""


def encoder_identity(spec: EncoderSpec) -> dict[str, Any]:
    """Return the identity of a dense bi-encoder; ValueError if the folder holds another kind of model."""
    folder = resolve(spec.model).path
    _refuse_other_kind(spec.model, folder)
    return {"stage": DENSE_STAGE, "kind": "dense", "similarity": declared_similarity(folder), **_common_fields(spec, folder)}


def teacher_identity(teacher: Teacher) -> dict[str, Any]:
    """Return the identity of a model that teaches; a dense one has its encoder's."""
    if teacher.kind == "dense":
        return encoder_identity(teacher)
    if teacher.kind == "sparse":
        return sparse_identity(teacher)
    folder = resolve(teacher.model).path
    return {
        "stage": CROSS_ENCODER_STAGE,
        "kind": "cross-encoder",
        "activation": "identity",
        **_common_fields(teacher, folder),
        "backend": teacher.backend,
        **({"quantization": INT8} if teacher.quantization == "int8" else {}),
    }


def sparse_identity(spec: EncoderSpec) -> dict[str, Any]:
    """Return the identity of a sparse encoder; ValueError if the folder holds another kind of model or declares another
    similarity than the dot product.
    """
    folder = resolve(spec.model).path
    config = _read_json(folder / "config_sentence_transformers.json")
    if config.get("model_type") != "SparseEncoder" or not (folder / "modules.json").is_file():
        found = config.get("model_type") or "no model_type in config_sentence_transformers.json"
        raise ValueError(
            f"model {spec.model!r}: {folder} holds {found}; expected a saved SparseEncoder, whose modules.json says how token "
            "weights become one vector; save it once as a SparseEncoder"
        )
    similarity = config.get("similarity_fn_name") or "dot"
    if similarity != "dot":
        raise ValueError(
            f"{folder / 'config_sentence_transformers.json'}: similarity_fn_name is {similarity!r}; a sparse teacher scores by the "
            "dot product, as a sparse index does; set it to dot if the model may be used so"
        )
    return {"stage": SPARSE_STAGE, "kind": "sparse", "similarity": "dot", **_common_fields(spec, folder)}


def bm25_identity(teacher: BM25Teacher, passages: Iterable[str]) -> dict[str, Any]:
    """Return the identity of BM25 over these passages, whose number, lengths and words every score depends on.

    Passages enter as the multiset of their texts: order, ids and files do not, a repeated text does. Digests about a million a
    second, and holds 16 bytes of each.
    """
    from sparsekd.mining.bm25 import scoring_fields  # bm25s takes .2 s, which recipes without this teacher do not pay

    keys = text_keys(passages)
    ordered = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    digest = hashlib.sha256(ordered.astype("<u8").tobytes()).hexdigest()
    return {"stage": BM25_STAGE, "kind": "bm25", **scoring_fields(teacher.k1, teacher.b), "passages": digest}


def file_identity(name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the identity of imported scores: what their owner states of them, a name and any fields.

    Stage and kind are ours and the statement lies below them, so that no statement can equal a model's or BM25's identity.
    """
    return {"stage": FILE_STAGE, "kind": "file", "name": name, "fields": dict(fields)}


def declared_similarity(folder: Path) -> Similarity:
    """Return the similarity a saved model declares; cosine where it declares none, as sentence-transformers has it."""
    declared = _read_json(folder / "config_sentence_transformers.json").get("similarity_fn_name") or "cosine"
    if declared not in get_args(Similarity):
        raise ValueError(
            f"{folder / 'config_sentence_transformers.json'}: similarity_fn_name is {declared!r}; expected one of "
            f"{', '.join(get_args(Similarity))}; a late-interaction model is not a dense bi-encoder"
        )
    return cast(Similarity, declared)


def _common_fields(spec: EncoderSpec, folder: Path) -> dict[str, Any]:
    weights = weights_identity(folder)
    _refuse_parts_elsewhere(spec, folder)
    return {
        "weights": weights,
        "max_length": spec.max_length,  # None: the model's own limit, which the digests of its configuration fix
        "query_prompt": spec.query_prompt,
        "passage_prompt": spec.passage_prompt,
        "dtype": spec.dtype,
        "backend": "torch",
        "trust_remote_code": spec.trust_remote_code,
    }


def _refuse_parts_elsewhere(spec: EncoderSpec, folder: Path) -> None:
    """Refuse a folder that takes its tokenizer or its code from another place: its digests would not cover them."""
    for path in sorted(folder.rglob("sentence_bert_config.json")):  # a router's transformers lie below the root
        tokenizer = _read_json(path).get("tokenizer_name_or_path")
        if tokenizer:
            raise ValueError(
                f"model {spec.model!r}: {path} takes the tokenizer from {tokenizer!r}; "
                "expected it in the model's folder, where its bytes are part of the key; save the model again with its tokenizer"
            )
    for path in sorted(folder.rglob("config.json")) if spec.trust_remote_code else []:
        code = [place for place in _read_json(path).get("auto_map", {}).values() if "--" in str(place)]
        if code:
            raise ValueError(
                f"model {spec.model!r}: {path} takes its code from {code[0]!r}; expected it in the model's "
                "folder, where its bytes are part of the key; copy the code there and drop the part before -- in auto_map"
            )


def _refuse_other_kind(reference: str, folder: Path) -> None:
    kind = _read_json(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    architecture = (_read_json(folder / "config.json").get("architectures") or [""])[0]
    if kind == "SentenceTransformer" and not (folder / "modules.json").exists() and "ForSequenceClassification" in architecture:
        kind = architecture
    if kind != "SentenceTransformer":
        raise ValueError(
            f"model {reference!r}: {folder} holds a {kind}; expected a dense bi-encoder; "
            'for a cross-encoder say kind = "cross-encoder", for a SparseEncoder kind = "sparse"'
        )
    if not (folder / "modules.json").is_file():  # sentence-transformers would choose a pooling: the mean, or the last token
        raise ValueError(
            f"model {reference!r}: {folder} has no modules.json, so nothing says how its token vectors become one; expected a "
            "saved sentence-transformers folder; save it once as a SentenceTransformer with the pooling it was trained with"
        )
    _refuse_router(reference, folder)


def _refuse_router(reference: str, folder: Path) -> None:
    """Refuse an asymmetric encoder: encode() names no task, so queries would silently take the default route."""
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        if module["type"].rpartition(".")[2] in ("Router", "Asym"):
            raise ValueError(
                f"model {reference!r}: {folder / 'modules.json'} lists a {module['type']}, which sends queries and passages "
                "through different modules; expected one encoder for both, since texts are encoded without naming a task and "
                "queries would take the document route; name a dense bi-encoder without a router"
            )


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))
