"""From a spec and a run to keyword arguments for sentence-transformers: device, threads, precision, length limit.

Nothing falls back: a device that is not there, or a limit the model has no positions for, is refused before any work.
"""

from __future__ import annotations

from typing import Any

from sparsekd.device import prepare_device
from sparsekd.model_reference import num_positions
from sparsekd.recipe import EncoderSpec, Run


def model_arguments(spec: EncoderSpec, run: Run) -> dict[str, Any]:
    """Return the arguments that SentenceTransformer and CrossEncoder share.

    The dtype is explicit because transformers 5 would otherwise load a checkpoint in the precision it was saved in.
    """
    import torch

    return {
        "device": prepare_device(run),
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": True,  # the folder is complete; a model card's base model is not looked up on the hub
        "model_kwargs": {"dtype": getattr(torch, spec.dtype)},
    }


def length_limit(model: Any, spec: EncoderSpec) -> int | None:
    """Return the tokens a loaded model takes, None if it has no limit; ValueError if the recipe asks for more than it can."""
    positions = num_positions(model)
    if spec.max_length is not None and positions is not None and 0 < positions < spec.max_length:
        raise ValueError(
            f"model {spec.model!r}: max_length = {spec.max_length}, but it has only {positions} positions; "
            f"expected at most {positions}, or no max_length for the limit it was saved with"
        )
    limit = spec.max_length if spec.max_length is not None else model.max_seq_length
    return None if limit is None or limit > 1_000_000_000 else int(limit)  # a tokenizer without a limit says 1e30
