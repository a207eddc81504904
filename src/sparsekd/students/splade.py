"""SPLADE students: a masked-LM body and head under max pooling, as a plain sentence-transformers model.

Starting weights come from a masked-LM checkpoint, or from an encoder without a head: then the head is tied to the word
embeddings and starts as the identity, so the untrained student already ranks. The saved folder needs nothing of this project.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.model_reference import num_positions
from sparsekd.recipe import Student
from sparsekd.students.fused_head import splade_max

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# GELU(x + 16) = x + 16 to float32 rounding for every x > -10, and the LayerNorm behind it takes the shift out again: with it a
# dense layer of ones on the diagonal passes hidden states through.
_GELU_SHIFT = 16.0
# (dense, norm) of the masked-LM head, by model type; the decoder is what get_output_embeddings returns.
_HEAD_BY_TYPE = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    "distilbert": ("vocab_transform", "vocab_layer_norm"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm"),
    "xlm-roberta": ("lm_head.dense", "lm_head.layer_norm"),
    "camembert": ("lm_head.dense", "lm_head.layer_norm"),
    "mpnet": ("lm_head.dense", "lm_head.layer_norm"),
}
_PROBE = ("a short text", "a second text that is somewhat longer than the first")


def build_student(student: Student, folder: Path) -> SparseEncoder:
    """Return the untrained student in float32 on CPU.

    ``folder`` holds the starting weights: a transformers masked-LM, or an encoder without a head (a sentence-transformers folder
    with its transformer at the root is one). Raises ValueError where the checkpoint cannot become a SPLADE student.
    """
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
    from transformers import AutoTokenizer

    masked_lm = _load_masked_lm(student, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as place:
        masked_lm.save_pretrained(place)
        tokenizer.save_pretrained(place)
        transformer = Transformer(place, transformer_task="fill-mask", model_kwargs={"dtype": torch.float32})
    modules = [transformer, SpladePooling("max", embedding_dimension=masked_lm.config.vocab_size)]
    prompts = {"query": student.query_prompt, "document": student.passage_prompt}
    model = SparseEncoder(modules=modules, prompts=prompts, device="cpu")
    limit = num_positions(masked_lm)
    if limit is not None and student.max_length > limit:
        raise ValueError(f"[student] max_length = {student.max_length}: {student.model} has {limit} positions; lower it")
    model.max_seq_length = student.max_length
    return model.eval()


def _load_masked_lm(student: Student, folder: Path) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForMaskedLM

    config = AutoConfig.from_pretrained(folder)
    if student.num_layers is not None:
        if student.num_layers > config.num_hidden_layers:
            raise ValueError(
                f"[student] num_layers = {student.num_layers}: {student.model} has {config.num_hidden_layers}; ask for at most that"
            )
        config.num_hidden_layers = student.num_layers
    if student.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, student.dropout)
    has_head = has_masked_lm_head(folder)
    masked_lm: PreTrainedModel
    masked_lm, report = AutoModelForMaskedLM.from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    output: Any = masked_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings = masked_lm.get_input_embeddings()
    if output is None or output.weight is not embeddings.weight:
        raise ValueError(f"[student] {student.model}: its output layer is not tied to its word embeddings; choose a tied model")
    missing = sorted(report["missing_keys"])
    body_missing = [name for name in missing if name.startswith(f"{masked_lm.base_model_prefix}.")]
    if body_missing or (has_head and missing):
        raise ValueError(f"[student] {student.model}: weights lack {(body_missing or missing)[:3]}; the student would start random")
    if not has_head and not missing:
        raise ValueError(
            f"[student] {student.model}: brings a masked-LM head, but config.json says architectures = {config.architectures}; "
            f"to keep the head, name {type(masked_lm).__name__} there; to start as the identity, save the encoder without it"
        )
    if not has_head:
        _start_as_identity(masked_lm, student)
    return masked_lm


def _start_as_identity(masked_lm: PreTrainedModel, student: Student) -> None:
    kind = masked_lm.config.model_type
    if kind not in _HEAD_BY_TYPE:
        raise ValueError(
            f"[student] {student.model}: an encoder of type {kind!r} without a masked-LM head cannot start as the identity; "
            f"expected one of {sorted(_HEAD_BY_TYPE)}, or a masked-LM checkpoint"
        )
    dense, norm = (masked_lm.get_submodule(name) for name in _HEAD_BY_TYPE[kind])
    output: Any = masked_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        torch.nn.init.eye_(dense.get_parameter("weight"))
        dense.get_parameter("bias").fill_(_GELU_SHIFT)
        norm.get_parameter("weight").fill_(1.0)
        norm.get_parameter("bias").zero_()
        output.bias.zero_()


def has_masked_lm_head(folder: Path) -> bool:
    """Tell from ``config.json`` whether the checkpoint brings its own masked-LM head."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # ForPreTraining, BERT's: a masked-LM head beside the next-sentence one. ELECTRA's has none and is refused for its lack.
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.get("architectures") or ())


def calibrate_bias(model: SparseEncoder, passages: Sequence[str], active_dims: int, *, batch_size: int = 16) -> float:
    """Set one output bias so that ``passages`` have ``active_dims`` active terms on average; return it.

    The bias is minus the maximum logit that ranks ``len(passages) * active_dims``-th over all (passage, term).
    """
    decoder = decoder_of(model)
    if active_dims >= decoder.out_features:
        raise ValueError(f"[student] initial_active_dims = {active_dims}: the vocabulary has {decoder.out_features}; lower it")
    prompt = model.prompts.get("document") or None
    with torch.inference_mode(), _hidden_instead_of_logits(model):
        rows = []
        for start in range(0, len(passages), batch_size):
            features = model.preprocess(list(passages[start : start + batch_size]), prompt=prompt)
            features = model[0]({name: _to(value, model.device) for name, value in features.items()})
            rows.append(_max_logits(features, decoder).cpu())
    logits_BV = torch.cat(rows)
    kept = len(passages) * active_dims
    bias = -float(torch.topk(logits_BV.flatten(), kept + 1).values[-1])
    with torch.no_grad():
        decoder.bias.add_(bias)
    return bias


def decoder_of(model: SparseEncoder) -> torch.nn.Linear:
    """Return the layer from hidden states to vocabulary logits."""
    masked_lm: Any = model[0].model
    decoder: torch.nn.Linear = masked_lm.get_output_embeddings()
    return decoder


@contextlib.contextmanager
def fused_head(model: SparseEncoder) -> Iterator[None]:
    """Compute the SPLADE head block by block while the context lasts; state, parameters and saved files stay as they are.

    Checked against the plain path on two short texts first: ValueError if the vectors differ by more than 1e-4.
    """
    plain = _encode(model, _PROBE)
    if not bool(torch.isfinite(plain).all()):
        raise ValueError("the student's vectors of a probe are not finite: its weights hold NaN or infinity; take other weights")
    pooling, decoder = model[1], decoder_of(model)

    def pool(features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"].bool()
        hidden_TD = features["token_embeddings"][mask]
        lengths = mask.sum(dim=1).tolist()
        features["sentence_embedding"] = splade_max(hidden_TD, decoder.weight, decoder.bias, lengths)
        return features

    with _hidden_instead_of_logits(model):
        pooling.forward = pool
        try:
            difference = float((_encode(model, _PROBE) - plain).abs().max())
            if not difference <= 1e-4:
                raise ValueError(
                    f"the fused head and {type(model[0].model).__name__} differ by {difference:.2g} on a probe; "
                    "set [run] fused_head = false"
                )
            yield
        finally:
            del pooling.forward


@contextlib.contextmanager
def _hidden_instead_of_logits(model: SparseEncoder) -> Iterator[None]:
    """Let the masked-LM return what would enter its output layer, whatever the architecture."""
    decoder = decoder_of(model)
    decoder.forward = lambda input: input  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.forward


def _encode(model: SparseEncoder, texts: Sequence[str]) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            features = {name: _to(value, model.device) for name, value in model.preprocess(list(texts)).items()}
            vectors: torch.Tensor = model(features)["sentence_embedding"]
    finally:
        model.train(was_training)
    return vectors


def _max_logits(features: dict[str, Any], decoder: torch.nn.Linear) -> torch.Tensor:
    mask = features["attention_mask"].bool()
    rows = [(hidden[keep] @ decoder.weight.T).amax(dim=0) for hidden, keep in zip(features["token_embeddings"], mask, strict=True)]
    return torch.stack(rows)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
