"""A working directory per recipe, and the real stage scripts as processes in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
[collection]
path = "{collection}"
[[mining.miners]]
kind = "bm25"
quota = 3
[[mining.miners]]
kind = "dense"
model = "{encoder}"
quota = 3
[[teachers]]
name = "tiny"
kind = "{kind}"
model = "{teacher}"
[labels]
num_negatives = 3
[student]
model = "{encoder}"
max_length = 64
initial_active_dims = 60
[training]
batch_size = 4
max_steps = 30
learning_rate = 1e-3
[run]
cache = "{cache}"
save_steps = 3
shard_pairs = 6
threads = 1
"""


@dataclass(frozen=True)
class Finished:
    """A stage that exited with 0: its last line, its log, its seconds."""

    folder: Path
    stdout: str
    log: str

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "manifest.json").read_text(encoding="utf-8")))


class Workplace:
    """A recipe with a cache of its own, in a folder of its own."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.cache = folder, folder / "cache"
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")

    def start(self, script: str, *overrides: str) -> subprocess.Popen[str]:
        """Start a stage script with overrides."""
        arguments = [argument for override in overrides for argument in ("--set", override)]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "pipeline" / f"{script}.py"), "recipe.toml", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *overrides: str) -> Finished:
        """Carry a stage out; fail with its log if it does not exit with 0."""
        process = self.start(script, *overrides)
        stdout, log = process.communicate(timeout=240)
        assert process.returncode == 0, log
        return Finished(Path(stdout.splitlines()[-1]), stdout, log)


@pytest.fixture(scope="session")
def make_workplace(
    tmp_path_factory: pytest.TempPathFactory, sample_folder: Path, tiny_encoder_folder: Path, tiny_cross_encoder_folder: Path
) -> Callable[..., Workplace]:
    """Return ``make(kind)``: a workplace whose teacher is ``dense`` or ``cross-encoder``."""

    def make(kind: str = "dense") -> Workplace:
        folder = tmp_path_factory.mktemp("workplace")
        teacher = tiny_encoder_folder if kind == "dense" else tiny_cross_encoder_folder
        names = {"collection": sample_folder, "encoder": tiny_encoder_folder, "teacher": teacher, "cache": folder / "cache"}
        return Workplace(folder, RECIPE.format(kind=kind, **names))

    return make


@pytest.fixture(scope="session")
def content_of() -> Callable[[Path, str], dict[str, bytes]]:
    """Return ``content_of(folder, pattern)``: bytes by relative path."""
    return lambda folder, pattern: {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(pattern)}


@pytest.fixture(scope="session")
def run_cases() -> Callable[..., dict[str, tuple[int, str, str]]]:
    """Return ``run_cases(program, script, arguments, folder)``: exit code, stdout and stderr by case, all cases in one process.

    ``program`` runs the stage script under each case's arguments and prints what each said as JSON.
    """

    def run(program: str, script: str, arguments: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str, str]]:
        done = subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "pipeline" / f"{script}.py"), json.dumps(arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return {name: tuple(found) for name, found in json.loads(done.stdout).items()}

    return run
