"""Checkpoints one can trust: each carries its experiment's key and a checksum of every file.

Resume takes the newest checkpoint that is whole. A torn one (the machine died while it was written) is named and removed, and
the one before is used; a checkpoint of other data, labels, losses or weights is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekd.artifact import checksum_of_file, fsync_path, write_json_atomically

logger = logging.getLogger(__name__)

SEAL = "sparsekd.json"


class SealCheckpoint(TrainerCallback):
    """Seals each checkpoint after the trainer has written all of it."""

    def __init__(self, key: str) -> None:
        self.key = key

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the seal of the checkpoint that was just saved."""
        seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self.key)


def seal(checkpoint: Path, key: str) -> None:
    """Flush every file of ``checkpoint`` and write its seal: the experiment's key and the files' checksums."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        fsync_path(path)
    checksums = {path.relative_to(checkpoint).as_posix(): checksum_of_file(path) for path in files}
    write_json_atomically(checkpoint / SEAL, {"key": key, "files": checksums})


def newest_whole_checkpoint(folder: Path, key: str) -> Path | None:
    """Return the newest checkpoint under ``folder`` whose files are as sealed, removing and naming those that are not.

    ValueError if a whole one belongs to another experiment.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    for checkpoint in checkpoints:
        found, damage = _inspect(checkpoint)
        if damage is None:
            if found != key:
                raise ValueError(f"{checkpoint}: belongs to experiment {found}, expected {key}; remove {folder} and rerun")
            return checkpoint
        logger.warning("%s: torn (%s); falling back to the checkpoint before it", checkpoint, damage)
        shutil.rmtree(checkpoint)
    return None


def _step(checkpoint: Path) -> int:
    suffix = checkpoint.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else -1


def _inspect(checkpoint: Path) -> tuple[str, str | None]:
    """Return the key of the experiment, and what is wrong with the checkpoint or None."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        key, checksums = str(seal["key"]), dict(seal["files"])
    except FileNotFoundError:
        return "", "it was never finished"
    except (ValueError, KeyError, TypeError):
        return "", f"{SEAL} is unreadable"
    for name, checksum in checksums.items():
        if not (checkpoint / name).is_file():
            return key, f"{name} is missing"
        if checksum_of_file(checkpoint / name) != checksum:
            return key, f"{name} has changed"
    return key, None
