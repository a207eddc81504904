"""Model references: from what a recipe names to a folder on disk, and from a folder to the digests of what decides outputs.

Three forms are accepted: ``package:NAME``, a local folder, and a hub id with optional ``@revision``. Nothing is imported from
a package and nothing is fetched unless a hub id is not yet in the local cache. Imports no torch; hashing a folder costs about
0.5 s per GB once per process. Only safetensors weights are accepted: a pickle runs code when it is read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekd.artifact import sha256_of_file
from sparsekd.model_folder import check_model_folder

_FORMS = (
    "expected package:NAME (a model inside an installed package), an existing local folder, or a hub id ORG/NAME with optional "
    "@REVISION that is in the local cache or can be downloaded"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FETCHED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken"]
_SUFFIXES = frozenset(pattern.removeprefix("*") for pattern in _FETCHED)
# Other backends' exports, the trainer's own state, and what this project writes beside a student's weights (manifest.json and
# training.json, which hold times and commands): no output of the torch model depends on them.
_FOREIGN_FOLDERS = re.compile(r"onnx|openvino|eval|checkpoint-\d+|__pycache__|\..*", re.IGNORECASE)
_FOREIGN_FILES = re.compile(
    r"readme.*|license.*|notice.*|\..*|data_config\.json|trainer_state\.json|\w+_results\.json|manifest\.json|training\.json",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ModelFolder:
    """Where a reference leads: ``revision`` is the hub's commit where there is one."""

    reference: str
    path: Path
    revision: str | None


def resolve(reference: str) -> ModelFolder:
    """Find the folder a reference names, asking the network only for a hub id that is not in the local cache.

    Raises FileNotFoundError if nothing is there, and ValueError if a package holds no model or several.
    """
    if reference.startswith("package:"):
        return ModelFolder(reference, _folder_in_package(reference), None)
    try:
        folder = Path(reference).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"model {reference!r}: {error} {_FORMS}") from error
    if folder.is_dir():
        return ModelFolder(reference, folder, None)
    repository, _, revision = reference.partition("@")
    if not _HUB_ID.fullmatch(repository):
        raise FileNotFoundError(f"model {reference!r}: no such folder, and not a hub id; {_FORMS}")
    path = _snapshot(reference, repository, revision or None)
    return ModelFolder(reference, path, path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision or None)


def weights_identity(folder: Path) -> dict[str, str]:
    """Return {relative file: sha256} of every file that can change outputs: weights, configuration, tokenizer, code.

    Model cards, other backends' exports and training state are left out, and so are the folder's name and times. Raises
    ValueError for what ``check_model_folder`` refuses: no weights, pickled ones, an adapter, parts outside, JSON that is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _matters(path.relative_to(folder)))
    check_model_folder(folder, files)
    identity = {}
    for path in files:
        if path.suffix in _SUFFIXES:
            status = path.stat()
            identity[path.relative_to(folder).as_posix()] = _digest(path, status.st_size, status.st_mtime_ns)
    return identity


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per process; size and time are only the memory's key."""
    return sha256_of_file(path)


def _matters(relative: Path) -> bool:
    in_foreign = any(_FOREIGN_FOLDERS.fullmatch(part) for part in relative.parts[:-1])
    return not in_foreign and not _FOREIGN_FILES.fullmatch(relative.name)


def _folder_in_package(reference: str) -> Path:
    name = reference.removeprefix("package:")
    roots = _package_roots(name) if name else []  # importlib.metadata raises for the empty name
    if not roots:
        raise FileNotFoundError(f"model {reference!r}: no installed package or module is called {name!r}; {_FORMS}")
    holders = sorted({path.parent for root in roots for mark in ("modules.json", "config.json") for path in root.rglob(mark)})
    # A pooling module's own config.json lies inside the model's folder.
    models = [folder for folder in holders if not any(other in folder.parents for other in holders)]
    if len(models) != 1:
        found = ", ".join(str(folder) for folder in models) or "none"
        raise ValueError(f"model {reference!r}: expected one folder with a config.json inside the package, found {found}")
    return models[0]


def _package_roots(name: str) -> list[Path]:
    """Return the package's own folders, found by module name, else by distribution name; imports nothing."""
    modules = [name]
    try:
        files = importlib.metadata.distribution(name).files or []
        tops = {file.parts[0] for file in files if len(file.parts) > 1}
        modules += sorted(top for top in tops if top.isidentifier() and top != "__pycache__")
    except importlib.metadata.PackageNotFoundError:
        pass  # then it may be a module's name
    roots: list[Path] = []
    for module in dict.fromkeys(modules):
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        roots += [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
    return list(dict.fromkeys(roots))


def _snapshot(reference: str, repository: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub id: the local cache's if it has weights, else a download."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download = functools.partial(
        huggingface_hub.snapshot_download, repository, revision=revision, allow_patterns=_FETCHED
    )  # the same patterns for both: a file left out below would make the cached snapshot incomplete on every later run
    try:
        path = Path(download(local_files_only=True))
        if any(path.rglob("*.safetensors")):
            return path
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not in the cache; the download below says what is wrong
    try:
        return Path(download())
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"model {reference!r}: not a folder, and not on the hub within reach ({reason}); {_FORMS}"
        ) from error


def num_positions(model: Any) -> int | None:
    """Return the tokens a loaded model has positions for, None if it says nothing.

    RoBERTa's kind counts positions from the one after padding's, so its table holds more rows than a text can have tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else int(positions)
