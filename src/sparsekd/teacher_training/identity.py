"""What decides a fine-tuned cross-encoder, and the name under which teachers find it. Imports no torch.

Names are files beside the folders, ``teachers/names/NAME``, that hold a key: the last one made under that name. A teacher's scores
are banked under its weights, so a name that moves on to other weights can mix nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekd.artifact import find, read_manifest, write_file_atomically
from sparsekd.model_reference import resolve, weights_identity
from sparsekd.recipe import TRAINED, TrainTeacher

KIND = "teachers"
VERSION = 1
"""Raised when the same fields would give another cross-encoder."""


def trained_teacher_fields(section: TrainTeacher, candidates_key: str, dev: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the key: the body's files, the candidates, the dev split (``dev``), and every setting that acts."""
    idle = {"name", "model"} | ({"epochs"} if section.max_steps is not None else set())
    return {
        "stage": "train-teacher",
        "version": VERSION,
        "body": weights_identity(resolve(section.model).path),
        "candidates": candidates_key,
        "dev": dict(dev),
        "training": section.model_dump(mode="json", exclude=idle),
    }


def give_name(cache: Path, name: str, key: str) -> str | None:
    """Let ``name`` mean the folder of ``key`` from now on; return the key that it meant before, None if none or the same."""
    path = _name_path(cache, name)
    before = path.read_text(encoding="ascii").strip() if path.is_file() else None
    if before != key:
        write_file_atomically(path, f"{key}\n".encode("ascii"))
        return before
    return None


def find_trained(cache: Path, reference: str) -> Path:
    """Return the folder that ``trained:NAME`` means.

    Raises FileNotFoundError, with the command that makes it, if none does; IntegrityError if the folder is damaged.
    """
    name = reference.removeprefix(TRAINED)
    path = _name_path(cache, name)
    if not path.is_file():
        known = ", ".join(sorted(found.name for found in path.parent.glob("[!.]*"))) or "none"
        raise FileNotFoundError(
            f"[[teachers]] model = {reference!r}: no cross-encoder was trained under that name (names in {cache / KIND}: {known}); "
            f'train it first: make train-teacher RECIPE=..., with [train_teacher] name = "{name}" in the recipe'
        )
    folder = cache / KIND / path.read_text(encoding="ascii").strip()
    find(folder, read_manifest(folder)["fields"])
    return folder


def _name_path(cache: Path, name: str) -> Path:
    return cache / KIND / "names" / name
