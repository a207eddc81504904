"""From a spec and a run to keyword arguments for sentence-transformers: device, threads, precision, length limit.

Nothing falls back: a device that is not there, or a limit the model has no positions for, is refused before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsekd.artifact import differing_fields
from sparsekd.device import prepare_device
from sparsekd.model_reference import num_positions, resolve, weights_identity
from sparsekd.recipe import EncoderSpec, ModelSpec, Run


def model_arguments(spec: ModelSpec, run: Run) -> dict[str, Any]:
    """Return the arguments that sentence-transformers' models share.

    The dtype is explicit because transformers 5 would otherwise load a checkpoint in the precision it was saved in.
    """
    import torch

    return {
        "device": prepare_device(run),
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": True,  # the folder is complete; a model card's base model is not looked up on the hub
        "model_kwargs": {"dtype": getattr(torch, spec.dtype), "use_safetensors": True},
    }


def require_unchanged(reference: str, identity: Mapping[str, Any]) -> None:
    """Raise ValueError if a model that has just been loaded is not the one of this identity: its files changed since the plan.

    Nothing would tell later: what it answers would be banked as the other's.
    """
    changed = differing_fields(identity["weights"], weights_identity(resolve(reference).path))
    if changed:
        raise ValueError(
            f"model {reference!r}: {', '.join(changed)} changed after its key was made, so nothing is banked under it; run the "
            "same command again"
        )


def length_limit(model: Any, spec: EncoderSpec) -> int | None:
    """Return the tokens a loaded model takes, None if it has no limit; ValueError if the recipe asks for more than it can."""
    if spec.max_length is not None:
        refuse_beyond_positions(model, spec.model, spec.max_length, ", or no max_length for the limit it was saved with")
    limit = spec.max_length if spec.max_length is not None else model.max_seq_length
    return None if limit is None or limit > 1_000_000_000 else int(limit)  # a tokenizer without a limit says 1e30


def refuse_beyond_positions(model: Any, reference: str, max_length: int, otherwise: str = "") -> None:
    """Raise ValueError if a loaded model has fewer positions than ``max_length`` tokens; ``otherwise`` ends the message."""
    positions = num_positions(model)
    if positions is not None and 0 < positions < max_length:
        raise ValueError(
            f"model {reference!r}: max_length = {max_length}, but it has only {positions} positions; "
            f"expected at most {positions}{otherwise}"
        )
