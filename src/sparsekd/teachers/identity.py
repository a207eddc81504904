"""What decides a teacher's outputs, as JSON-able fields: the key under which its vectors and scores are banked.

In: digests of weights, tokenizer and configuration, length limit, prompts, precision, similarity or activation, backend, and
the version of this code; for a language model its template and answer tokens; for BM25 its settings and the passages it counts;
for imported scores and functions what their owner states. Out: names, paths, device, batch sizes, threads. One model is one
encoder whether it mines or teaches.
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
from sparsekd.recipe import BM25Teacher, CallableTeacher, CausalLMTeacher, EncoderSpec, ModelSpec, Teacher, TokenLogitTeacher
from sparsekd.teachers.protocols import Similarity

# Raise a version when a change to this room changes scores beyond float rounding: what the old one banked is then not used.
DENSE_STAGE = "teachers/dense v1"
CROSS_ENCODER_STAGE = "teachers/cross-encoder v1"
SPARSE_STAGE = "teachers/sparse v1"
LATE_INTERACTION_STAGE = "teachers/late-interaction v1"
TOKEN_LOGITS_STAGE = "teachers/token-logits v1"
CALLABLE_STAGE = "teachers/callable v1"
BM25_STAGE = "teachers/bm25 v1"
FILE_STAGE = "teachers/file v1"
INT8 = "int8: weights per row, activations per token and 128 dims, v1"
"""What ``openvino_model`` does to matrices; a change of it is another teacher."""


def encoder_identity(spec: EncoderSpec) -> dict[str, Any]:
    """Return the identity of a dense bi-encoder; ValueError if the folder holds another kind of model."""
    folder = resolve(spec.model).path
    _refuse_other_kind(spec.model, folder)
    return {"stage": DENSE_STAGE, "kind": "dense", "similarity": declared_similarity(folder), **_common_fields(spec, folder)}


def teacher_identity(teacher: Teacher | TokenLogitTeacher | CallableTeacher) -> dict[str, Any]:
    """Return the identity of a model or function that teaches; a dense one has its encoder's."""
    if isinstance(teacher, CallableTeacher):
        return callable_identity(teacher)
    if not isinstance(teacher, Teacher):
        return token_logit_identity(teacher)
    if teacher.kind == "dense":
        return encoder_identity(teacher)
    if teacher.kind == "sparse":
        return sparse_identity(teacher)
    if teacher.kind == "late-interaction":
        return late_interaction_identity(teacher)
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


def late_interaction_identity(teacher: Teacher) -> dict[str, Any]:
    """Return the identity of a MultiVectorEncoder.

    Raises ValueError if the folder holds another kind of model, or names prompts of its own that the recipe does not mention: its
    token vectors were trained behind them.
    """
    folder = resolve(teacher.model).path
    place = folder / "config_sentence_transformers.json"
    config = _read_json(place)
    if config.get("model_type") != "MultiVectorEncoder" or not (folder / "modules.json").is_file():
        found = config.get("model_type") or "no model_type in config_sentence_transformers.json"
        raise ValueError(
            f"model {teacher.model!r}: {folder} holds {found}; expected a saved MultiVectorEncoder, whose modules.json says how "
            "token states become the vectors of MaxSim; load a PyLate or ColBERT folder once as a MultiVectorEncoder and save it"
        )
    prompts = config.get("prompts") or {}
    for key, name in (("query_prompt", "query"), ("passage_prompt", "document")):
        if prompts.get(name) and key not in teacher.model_fields_set:
            raise ValueError(
                f"model {teacher.model!r}: {place} has the {name} prompt {prompts[name]!r}, and the recipe says nothing of {key}; "
                f"set {key} = {json.dumps(prompts[name])}, or to the one you want"
            )
    return {
        "stage": LATE_INTERACTION_STAGE,
        "kind": "late-interaction",
        "similarity": config.get("similarity_fn_name") or "maxsim",
        **_common_fields(teacher, folder),
    }


def token_logit_identity(teacher: TokenLogitTeacher) -> dict[str, Any]:
    """Return the identity of a language model that answers by token logits.

    Raises ValueError if the folder holds another architecture, if a token is not one of its vocabulary, or if the folder was saved
    to score by others.
    """
    folder = resolve(teacher.model).path
    _refuse_other_head(teacher, folder)
    token_ids = _token_ids(teacher, folder)
    _refuse_other_tokens(teacher, folder, token_ids)
    return {
        "stage": TOKEN_LOGITS_STAGE,
        "kind": teacher.kind,
        "template": teacher.filled_template,
        "tokens": [teacher.true_token, teacher.false_token or None],
        "token_ids": token_ids,
        **_model_fields(teacher, folder, teacher.max_length),
    }


def callable_identity(teacher: CallableTeacher) -> dict[str, Any]:
    """Return the identity of a Python function: its name and what its owner states of it."""
    return {"stage": CALLABLE_STAGE, "kind": "callable", "function": teacher.function, "stated": dict(teacher.identity)}


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
    # max_length None: the model's own limit, which the digests of its configuration fix
    prompts = {"query_prompt": spec.query_prompt, "passage_prompt": spec.passage_prompt}
    return _model_fields(spec, folder, spec.max_length) | prompts


def _model_fields(spec: ModelSpec, folder: Path, max_length: int | None) -> dict[str, Any]:
    weights = weights_identity(folder)
    _refuse_parts_elsewhere(spec, folder)
    return {
        "weights": weights,
        "max_length": max_length,
        "dtype": spec.dtype,
        "backend": "torch",
        "trust_remote_code": spec.trust_remote_code,
    }


def _refuse_parts_elsewhere(spec: ModelSpec, folder: Path) -> None:
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


def _refuse_other_head(teacher: TokenLogitTeacher, folder: Path) -> None:
    """Refuse another architecture: one with a classification head would answer from an output layer that was never trained so."""
    found = ", ".join(_read_json(folder / "config.json").get("architectures") or []) or "no architecture"
    is_causal = isinstance(teacher, CausalLMTeacher)
    expected = "ForCausalLM" if is_causal else "ForConditionalGeneration"
    if not found.endswith(expected):
        raise ValueError(
            f"model {teacher.model!r}: {folder / 'config.json'} names {found}; expected a model ...{expected}, whose output layer "
            f"answers with a token; for {'an encoder-decoder' if is_causal else 'a decoder'} say kind = "
            f'"{"seq2seq-lm" if is_causal else "causal-lm"}", for one with a classification head kind = "cross-encoder"'
        )


def _token_ids(teacher: TokenLogitTeacher, folder: Path) -> list[int]:
    """Return the ids of the answer tokens, read from tokenizer.json without loading the model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"model {teacher.model!r}: {folder} has no tokenizer.json; save the model again with its fast tokenizer")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    token_ids = []
    for key, token in (("true_token", teacher.true_token), ("false_token", teacher.false_token)):
        if not token:
            continue
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            pieces = tokenizer.encode(token, add_special_tokens=False).tokens
            raise ValueError(
                f"[[teachers]] {teacher.name!r}: {key} = {token!r} is no token of {path}, which writes it as {pieces}; expected "
                "one token as the vocabulary has it, with its mark for a space in front if the answer follows one"
            )
        token_ids.append(token_id)
    if len(token_ids) != len(set(token_ids)):
        raise ValueError(f"[[teachers]] {teacher.name!r}: true_token and false_token are both {teacher.true_token!r}; name two")
    return token_ids


def _refuse_other_tokens(teacher: TokenLogitTeacher, folder: Path, token_ids: list[int]) -> None:
    """Refuse tokens other than those of a saved CrossEncoder's LogitScore, whose model was trained to answer with them."""
    listed = folder / "modules.json"
    for module in json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []:
        if module["type"].endswith(".LogitScore"):
            place = folder / module["path"] / "config.json"
            config = _read_json(place)
            saved = [config[key] for key in ("true_token_id", "false_token_id") if config.get(key) is not None]
            if saved != token_ids:
                raise ValueError(
                    f"[[teachers]] {teacher.name!r}: true_token and false_token have the ids {token_ids}, but {place} scores by "
                    f"{saved}; name those tokens"
                )


def _refuse_other_kind(reference: str, folder: Path) -> None:
    kind = _read_json(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    architecture = (_read_json(folder / "config.json").get("architectures") or [""])[0]
    if kind == "SentenceTransformer" and not (folder / "modules.json").exists() and "ForSequenceClassification" in architecture:
        kind = architecture
    if kind != "SentenceTransformer":
        raise ValueError(
            f"model {reference!r}: {folder} holds a {kind}; expected a dense bi-encoder; "
            'for a cross-encoder say kind = "cross-encoder", for a SparseEncoder kind = "sparse", for a MultiVectorEncoder '
            'kind = "late-interaction"'
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
