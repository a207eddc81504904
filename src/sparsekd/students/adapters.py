"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of a student's attention, by peft through the library's own support.

While they train, the body's weights stay; a SPLADE head and a CSR autoencoder, which are small, learn whole. What is saved holds
plain weights with the adapters merged in, and beside them, in a checkpoint, the adapters to go on from.
"""

from __future__ import annotations

import copy
import importlib.util
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsekd.recipe import Student
from sparsekd.students.masked_lm import head_parameters

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import Transformer

ADAPTERS = "adapters.safetensors"
"""In a checkpoint's transformer folder: every tensor that the merged weights do not determine."""
# Query and value projections, which the paper found best for a given number of parameters (section 7.1).
_TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "camembert": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "mpnet": ["q", "v"],
    "modernbert": ["Wqkv"],
}


def check_adapters(student: Student) -> None:
    """Raise ValueError if the recipe asks for adapters and peft is not installed."""
    if student.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"[student] lora_rank = {student.lora_rank}: needs the package peft, which is not installed; pip install "
            "'sparsekd[lora]', or remove lora_rank"
        )


def add_adapters(model: SparseEncoder, student: Student) -> None:
    """Put adapters of ``lora_rank`` into the transformer's attention; they start as zero, so vectors stay as they are."""
    from peft import LoraConfig

    check_adapters(student)
    transformer = _transformer(model)
    body: Any = transformer.model
    kind = body.config.model_type
    if kind not in _TARGETS:
        raise ValueError(
            f"[student] lora_rank: no attention projections known for a model of type {kind!r}; expected one of {sorted(_TARGETS)}"
        )
    head = head_parameters(body)
    # peft's annotation says int; its arithmetic, alpha / r, takes what the recipe gives.
    settings = LoraConfig(
        r=cast(int, student.lora_rank),
        lora_alpha=cast(int, student.lora_alpha),
        lora_dropout=0.0,
        target_modules=_TARGETS[kind],
    )
    body.add_adapter(settings)
    for parameter in head:
        parameter.requires_grad_(True)
    transformer.save = types.MethodType(_save_merged, transformer)  # type: ignore[method-assign]


def has_adapters(model: SparseEncoder) -> bool:
    """Say whether the model has adapters that are not merged."""
    return any(getattr(transformer.model, "_hf_peft_config_loaded", False) for transformer in _transformers(model))


def merge_adapters(model: SparseEncoder) -> None:
    """Add the adapters into the weights they adapt and take them out; does nothing where there are none."""
    for transformer in _transformers(model):
        if getattr(transformer.model, "_hf_peft_config_loaded", False):
            _merge(transformer.model)
            del transformer.save


def load_checkpoint(model: SparseEncoder, folder: Path) -> None:
    """Load a checkpoint's weights into ``model``, adapters included where it has them.

    Raises ValueError if one of the two has adapters and the other has not.
    """
    from safetensors.torch import load_file
    from sentence_transformers import SparseEncoder

    saved = SparseEncoder(str(folder), device="cpu", local_files_only=True).state_dict()
    files = sorted(folder.rglob(ADAPTERS))
    if bool(files) != has_adapters(model):
        found, expected = ("has", "none") if files else ("has no", "them")
        raise ValueError(f"checkpoint {folder}: {found} {ADAPTERS}, the student expects {expected}; train from the start")
    if files:
        prefix = next(name for name, module in model.named_modules() if module is _transformer(model).model)
        trained = {f"{prefix}.{name}": tensor for name, tensor in load_file(files[0]).items()}
        adapted = {name: value for name, value in model.state_dict().items() if name.startswith(f"{prefix}.")}
        saved = {name: value for name, value in saved.items() if not name.startswith(f"{prefix}.")} | adapted | trained
    model.load_state_dict(saved)


def _save_merged(transformer: Transformer, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
    """Save in place of the module's own ``save``: plain merged weights, and the tensors that training goes on from."""
    from safetensors.torch import save_file

    live = transformer.model
    trained = {name for name, parameter in live.named_parameters() if parameter.requires_grad}
    state = {name: value.detach().cpu().contiguous() for name, value in live.named_parameters() if name in trained}
    merged = copy.deepcopy(live)
    _merge(merged)
    transformer.model = merged
    try:
        type(transformer).save(transformer, output_path, *args, safe_serialization=safe_serialization, **kwargs)
    finally:
        transformer.model = live
    save_file(state, Path(output_path) / ADAPTERS)


def _merge(body: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(body.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, module.get_base_layer())
    del body.peft_config
    body._hf_peft_config_loaded = False
    body.requires_grad_(True)


def _transformers(model: SparseEncoder) -> list[Transformer]:
    from sentence_transformers.sparse_encoder.modules import Transformer

    return [module for module in model.modules() if isinstance(module, Transformer)]


def _transformer(model: SparseEncoder) -> Transformer:
    (transformer,) = _transformers(model)
    return transformer
