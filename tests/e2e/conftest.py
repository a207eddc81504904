"""A working directory per recipe, and the real stage scripts as processes in it.

A stage is a process that can be killed and that exits as it would for a user, but most are forked from one server that has
imported the libraries: an interpreter of its own costs 10 seconds of CPU for imports before it does a second of work. Where a
user's own start matters (a second run is fast, the documented commands), ``run_afresh`` starts an interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORKED = Path(__file__).with_name("forked_stage.py")
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


class ForkedStage:
    """A stage script in a process forked from the server, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, folder: Path, script: str, arguments: list[str], environment: dict[str, str]) -> None:
        said = Path(tempfile.mkdtemp(prefix="said-", dir=folder))
        self._stdout, self._stderr = said / "stdout", said / "stderr"
        request = {
            "folder": str(folder),
            "script": script,
            "arguments": arguments,
            "environment": environment,
            "stdout": str(self._stdout),
            "stderr": str(self._stderr),
        }
        context = multiprocessing.get_context("forkserver")
        arguments_of_run = (str(FORKED), {"request": request}, "__main__")
        self._process = context.Process(target=runpy.run_path, args=arguments_of_run, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what it said to stdout and to stderr."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self._stderr.read_text(encoding='utf-8')}")
        stdout, stderr = (path.read_text(encoding="utf-8") if path.exists() else "" for path in (self._stdout, self._stderr))
        return stdout, stderr


class Workplace:
    """A recipe with a cache of its own, in a folder of its own."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.cache = folder, folder / "cache"
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")

    def mine_by_bm25_alone(self) -> None:
        """Let workers start in 2 seconds in place of 13: nothing of this recipe but a model teacher needs torch then."""
        path = self.folder / "recipe.toml"
        recipe = path.read_text(encoding="utf-8")
        start, end = recipe.rindex("[[mining.miners]]"), recipe.index("[[teachers]]")
        path.write_text(recipe[:start].replace("quota = 3", "quota = 6") + recipe[end:], encoding="utf-8")

    def start(self, script: str, *overrides: str, **environment: str) -> ForkedStage:
        """Start a stage script with overrides, and with more environment variables than there are."""
        return ForkedStage(self.folder, str(ROOT / "pipeline" / f"{script}.py"), _arguments(overrides), environment)

    def fork(self, program: str, *arguments: str) -> ForkedStage:
        """Start a program that is no stage."""
        path = self.folder / "program.py"
        path.write_text(program, encoding="utf-8")
        return ForkedStage(self.folder, str(path), list(arguments), {})

    def run(self, script: str, *overrides: str) -> Finished:
        """Carry a stage out; fail with its log if it does not exit with 0."""
        process = self.start(script, *overrides)
        stdout, log = process.communicate(timeout=240)
        assert process.returncode == 0, log
        return Finished(Path(stdout.splitlines()[-1]), stdout, log)

    def run_afresh(self, script: str, *overrides: str) -> Finished:
        """Carry a stage out in an interpreter of its own, as a user does; fail with its log if it does not exit with 0."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "pipeline" / f"{script}.py"), *_arguments(overrides)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Finished(Path(done.stdout.splitlines()[-1]), done.stdout, done.stderr)


def _arguments(overrides: tuple[str, ...]) -> list[str]:
    return ["recipe.toml", *(argument for override in overrides for argument in ("--set", override))]


@pytest.fixture(scope="session")
def make_workplace(
    tmp_path_factory: pytest.TempPathFactory,
    sample_folder: Path,
    tiny_encoder_folder: Path,
    tiny_cross_encoder_folder: Path,
    fork_server: None,
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
def run_cases(request: pytest.FixtureRequest) -> Callable[..., dict[str, tuple[int, str, str]]]:
    """Return ``run_cases(program, script, arguments, folder)``: exit code, stdout and stderr by case, all cases in one process.

    ``program`` runs the stage script under each case's arguments and prints what each said as JSON; ``light`` ones, which need
    no torch, in an interpreter of their own, which they start sooner than the server does.
    """

    def run(
        program: str, script: str, arguments: dict[str, list[str]], folder: Path, *, light: bool = False
    ) -> dict[str, tuple[int, str, str]]:
        path, told = folder / "cases.py", [str(ROOT / "pipeline" / f"{script}.py"), json.dumps(arguments)]
        path.write_text(program, encoding="utf-8")
        process: Any
        if light:
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
            command = [sys.executable, str(path), *told]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)
        else:
            request.getfixturevalue("fork_server")
            process = ForkedStage(folder, str(path), told, {})
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
        return {name: tuple(found) for name, found in json.loads(stdout).items()}

    return run
