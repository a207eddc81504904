"""What a model's folder may hold: safetensors, and nothing that its files' digests do not cover or that runs when it is read.

Reads the small JSON files that loaders obey, no weights. Symbolic links are followed: the hub's cache consists of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

# What loaders look for, in this order; another *.safetensors beside a pickle would not keep them from the pickle.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_OBEYED = frozenset(
    "config.json modules.json sentence_bert_config.json config_sentence_transformers.json tokenizer_config.json".split()
)
_SUFFIX_OF_INDEX = ".safetensors.index.json"


def check_model_folder(folder: Path, files: Sequence[Path]) -> None:
    """Raise ValueError unless ``files``, those of ``folder`` that decide outputs, are a whole model that no pickle is part of.

    Refused are pickled weights that a loader would take, no weights, an adapter without its base, modules or shards that lie
    outside the folder, and JSON that is none.
    """
    pickled = [path for path in files if path.match("pytorch_model*.bin") and not _has_weights(path.parent)]
    if pickled:
        raise ValueError(
            f"model {folder}: {pickled[0].relative_to(folder)} is a pickle and there are no *.safetensors beside it; expected "
            f"safetensors weights, since reading a pickle runs code; load it once where you trust it and save_pretrained it"
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"model {folder}: no *.safetensors weights among {len(files)} files; expected a saved model's folder")
    adapters = [path for path in files if path.name == "adapter_config.json"]
    if adapters:
        raise ValueError(
            f"model {folder}: an adapter ({adapters[0].relative_to(folder)}), whose base model lies elsewhere, so these files do "
            "not decide its outputs; expected a whole model; merge it (merge_and_unload) and save that"
        )
    for path in files:
        if path.name in _OBEYED or path.name.endswith(_SUFFIX_OF_INDEX):
            _refuse_outside(folder, path, _parsed(folder, path))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def _parsed(folder: Path, path: Path) -> Any:
    kind = list if path.name == "modules.json" else dict
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise ValueError(
            f"model {folder}: {path.relative_to(folder)} is no JSON ({error}); expected a saved model's; copy the folder again"
        ) from error
    if not isinstance(content, kind) or (kind is list and not all(isinstance(module, dict) for module in content)):
        expected = "a list of modules" if kind is list else "an object"
        raise ValueError(
            f"model {folder}: {path.relative_to(folder)} holds a JSON {type(content).__name__}; expected {expected}; save it again"
        )
    return content


def _refuse_outside(folder: Path, path: Path, content: Any) -> None:
    """Refuse modules and shards named by a path that leaves the folder: their bytes would be no part of the key."""
    if path.name == "modules.json":
        named = [module.get("path", "") for module in content]
    elif path.name.endswith(_SUFFIX_OF_INDEX):
        shards = content.get("weight_map")
        named = list(shards.values()) if isinstance(shards, dict) else [shards]
    else:
        return
    outside = next((name for name in named if not _is_inside(name)), None)
    if outside is not None:
        raise ValueError(
            f"model {folder}: {path.relative_to(folder)} names {str(outside)[:80]!r}; expected files inside the model's folder, "
            "whose bytes are part of the key; copy them there"
        )


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
