"""The masked LM inside a SPLADE student: its own head kept, or one tied to the word embeddings that starts as the identity.

With the second an untrained student ranks already: its logits are the encoder's last hidden states times its word embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.recipe import Student
from sparsekd.students.body import changed_config, check_missing, check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


# The two layers of each block whose output is added to a token, as names end, by model type.
_RESIDUALS_BY_TYPE = {
    "bert": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "roberta": ("attention.output.dense", "output.dense"),
    "xlm-roberta": ("attention.output.dense", "output.dense"),
    "camembert": ("attention.output.dense", "output.dense"),
    "mpnet": ("attention.attn.o", "output.dense"),
}


def has_masked_lm_head(folder: Path) -> bool:
    """Tell from ``config.json`` whether the checkpoint brings its own masked-LM head."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # ForPreTraining, BERT's: a masked-LM head beside the next-sentence one. ELECTRA's has none and is refused for its lack.
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.get("architectures") or ())


def load_masked_lm(student: Student, folder: Path) -> PreTrainedModel:
    """Return the masked LM in float32, every weight from the checkpoint or the identity; ValueError if that cannot be."""
    from transformers import AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    config = changed_config(student, folder)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"[student] {student.model}: transformers has no masked LM of its type, {config.model_type} ({type(config).__name__}); "
            'expected an encoder such as BERT, or kind = "csr"'
        )
    has_head = has_masked_lm_head(folder)
    masked_lm: PreTrainedModel
    masked_lm, report = AutoModelForMaskedLM.from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    output: Any = masked_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is None or output.weight is not masked_lm.get_input_embeddings().weight:
        raise ValueError(f"[student] {student.model}: its output layer is not tied to its word embeddings; choose a tied model")
    missing = sorted(report["missing_keys"])
    body_missing = [name for name in missing if name.startswith(f"{masked_lm.base_model_prefix}.")]
    check_missing(student, body_missing or (missing if has_head else []))
    if not has_head and not missing:
        raise ValueError(
            f"[student] {student.model}: brings a masked-LM head, but config.json says architectures = {config.architectures}; "
            f"to keep the head, name {type(masked_lm).__name__} there; to start as the identity, save the encoder without it"
        )
    if not has_head:
        _start_as_identity(masked_lm, student)
    check_positions(student, masked_lm)
    return masked_lm


def head_parameters(masked_lm: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the head's own parameters: dense, norm, bias. The output weights are the word embeddings, which are the body's."""
    body = {id(parameter) for parameter in masked_lm.base_model.parameters()}
    return [parameter for parameter in masked_lm.parameters() if id(parameter) not in body]


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
        if student.residual_scale != 1:
            _scale_residuals(masked_lm, student.residual_scale)


def _scale_residuals(masked_lm: PreTrainedModel, scale: float) -> None:
    """Let a token keep more of its own word: attention and feed-forward add ``scale`` times what they would."""
    endings = tuple(f".{ending}" for ending in _RESIDUALS_BY_TYPE[masked_lm.config.model_type])
    for name, module in masked_lm.base_model.named_modules():
        if name.endswith(endings):
            for parameter in module.parameters():
                parameter.mul_(scale)
