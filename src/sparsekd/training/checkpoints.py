"""Checkpoints one can trust: each carries what its experiment was made from and a checksum of every file.

Resume takes the newest checkpoint that is whole. A torn one (the machine died while it was written) is named and removed, and
the one before is used; a checkpoint of other data, labels, losses, lambdas or weights is refused, and what differs is named.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekd.artifact import checksum_of_file, differing_fields, fsync_path, key_of, write_json_atomically
from sparsekd.training import ranks

logger = logging.getLogger(__name__)

SEAL = "sparsekd.json"
_FIELDS_SHOWN = 3


class SealCheckpoint(TrainerCallback):
    """Seals each checkpoint after every process has written its part of it."""

    def __init__(self, key: str, fields: Mapping[str, Any]) -> None:
        self.key, self.fields = key, fields

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the seal of the checkpoint that was just saved."""
        ranks.wait_for_all()
        if ranks.is_first():
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self.key, self.fields)


def seal(checkpoint: Path, key: str, fields: Mapping[str, Any]) -> None:
    """Flush every file of ``checkpoint`` and write its seal: the experiment's key, what that is made of, the files' checksums."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        fsync_path(path)
    checksums = {path.relative_to(checkpoint).as_posix(): checksum_of_file(path) for path in files}
    content = {"key": key, "fields": dict(fields), "files": checksums, "processes": ranks.num_processes()}
    for folder in (path for path in checkpoint.rglob("*") if path.is_dir()):
        fsync_path(folder)
    write_json_atomically(checkpoint / SEAL, {**content, "seal": key_of(content)})
    fsync_path(checkpoint.parent)  # the checkpoint before this one is removed next, and must not be all that a power cut takes


def newest_whole_checkpoint(folder: Path, key: str, fields: Mapping[str, Any]) -> Path | None:
    """Return the newest checkpoint under ``folder`` whose files are as sealed, removing and naming those that are not.

    The first process looks, all get its answer. ValueError naming the fields that differ if a whole one belongs to another
    experiment.
    """
    found: Path | ValueError | None = None
    if ranks.is_first():
        try:
            found = _newest(folder, key, fields)
        except ValueError as error:
            found = error
    found = ranks.from_first(found)
    if isinstance(found, ValueError):
        raise ValueError(str(found))
    return found


def _newest(folder: Path, key: str, fields: Mapping[str, Any]) -> Path | None:
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if checkpoint.is_symlink():
            raise ValueError(f"{checkpoint}: a symbolic link, expected a folder of this run; remove it and rerun")
        found, damage = _inspect(checkpoint)
        if damage is None:
            _check_same_experiment(checkpoint, found, key, fields)
            if found["processes"] != ranks.num_processes():
                logger.warning(
                    "%s: saved by %d processes and resumed by %d: the same rows in each step, other dropout",
                    checkpoint,
                    found["processes"],
                    ranks.num_processes(),
                )
            return checkpoint
        logger.warning("%s: torn (%s); falling back to the checkpoint before it", checkpoint, damage)
        shutil.rmtree(checkpoint)
    return None


def _check_same_experiment(checkpoint: Path, found: Mapping[str, Any], key: str, fields: Mapping[str, Any]) -> None:
    changed = differing_fields(found["fields"], dict(fields))
    if found["key"] == key and not changed:
        return
    shown = [f"{name} was {theirs!r}, is {ours!r}" for name, (theirs, ours) in list(changed.items())[:_FIELDS_SHOWN]]
    more = f" and {len(changed) - _FIELDS_SHOWN} more" if len(changed) > _FIELDS_SHOWN else ""
    raise ValueError(
        f"{checkpoint}: belongs to experiment {found['key']}, expected {key}{': ' if shown else ''}{'; '.join(shown)}{more}; "
        f"remove {checkpoint.parent} and rerun"
    )


def _step(checkpoint: Path) -> int:
    suffix = checkpoint.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else -1


def _inspect(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    """Return the seal, and what is wrong with the checkpoint or None; every file in it is the seal's, and none a link."""
    try:
        found = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        own, checksums = found.pop("seal"), dict(found["files"])
        if own != key_of(found):
            return {}, f"{SEAL} has changed"
    except FileNotFoundError:
        return {}, "it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{SEAL} is unreadable"
    # What a resumed trainer unpickles is read by weights_only, and must still be what this run wrote.
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_symlink() or (path.is_file() and name not in checksums and name != SEAL):
            return found, f"{name} is not of this run"
    for name, checksum in checksums.items():
        if not (checkpoint / name).is_file():
            return found, f"{name} is missing"
        if checksum_of_file(checkpoint / name) != checksum:
            return found, f"{name} has changed"
    return found, None
