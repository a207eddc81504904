"""The fault matrix: a cell is one fault in one stage, and green if all its cases are. ``make faults`` prints the table.

Each test says its fault by a marker and its stage by the marker or by the parameter ``stage``, and how many cases it tried by
``count``. What is written and read back in most cells are the small subjects of ``subjects``; the real stages run in ``nursery``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAULTS = {
    "F1": "SIGKILL",
    "F2": "a call fails",
    "F3": "disk full",
    "F4": "power loss",
    "F5": "shard cut",
    "F6": "bit flipped",
    "F7": "files moved about",
    "F8": "many processes",
    "F9": "two experiments",
    "F13": "checkpoint torn",
    "F14": "signals",
    "F15": "input changed",
    "F16": "recipe changed",
    "F17": "cache moved",
    "F18": "dead holders, clocks",
    "F19": "other shards, threads",
    "F20": "NaN, infinity",
}


@dataclass
class Cell:
    """One fault in one stage."""

    cases: int = 0
    outcomes: set[str] = field(default_factory=set)


_CELLS: dict[tuple[str, str], Cell] = defaultdict(Cell)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(number, stage): the cell of the fault matrix; the stage may be a parameter instead")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: flushing is what is tested here, and a disk takes its time over each."""
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Note which cell a test belongs to; every test here belongs to one."""
    number, *stage = request.node.get_closest_marker("fault").args
    record_property("cell", (number, stage[0] if stage else request.node.callspec.params["stage"]))


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Return ``count(cases)``: how many cases a test tried."""
    return lambda cases: record_property("cases", cases)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    told = dict(report.user_properties)
    if "cell" not in told or (report.when != "call" and report.outcome == "passed"):
        return
    found = _CELLS[tuple(told["cell"])]
    found.outcomes.add(report.outcome)
    found.cases += told.get("cases", 1) if report.when == "call" else 0


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the table after everything else that pytest says."""
    if not _CELLS:
        return
    writer = config.get_terminal_writer()
    for number, name in FAULTS.items():
        stages = {stage: found for (fault, stage), found in _CELLS.items() if fault == number}
        if stages:
            told = ", ".join(f"{stage} {found.cases:,}{_verdict(found)}" for stage, found in stages.items())
            writer.line(f"{number:<4}{name:<22}{told}")
    writer.line(f"{sum(found.cases for found in _CELLS.values()):,} cases")
    writer.line(f"{len(_CELLS)} cells, {sum(found.outcomes == {'passed'} for found in _CELLS.values())} green")


def _verdict(found: Cell) -> str:
    return "" if found.outcomes == {"passed"} else f" ({', '.join(sorted(found.outcomes - {'passed'}))})"


class Nursery:
    """Starts many short-lived processes from one that has imported what they need: a stage costs its work, not its imports."""

    def __init__(self, *modules: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(HERE / "nursery.py"), *modules]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def start(self, folder: Path, script: Path, *arguments: str) -> Child:
        """Run a script in a process of its own, with ``folder`` as its working directory; its words go to files there."""
        return Child(self, self._ask("start", str(folder), str(script), *map(str, arguments)), folder)

    def wait(self, pid: int) -> int:
        """Return the exit code of a child, minus the signal's number where one ended it."""
        return self._ask("wait", pid)

    def close(self) -> None:
        """End the nursery; its children are gone by then."""
        self._process.communicate("")

    def _ask(self, *request: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass(frozen=True)
class Child:
    """A process of the nursery's."""

    nursery: Nursery
    pid: int
    folder: Path

    def wait(self) -> int:
        """Return the exit code once it has ended."""
        return self.nursery.wait(self.pid)

    def signal(self, number: int) -> None:
        """Send a signal; one that has ended and is not waited for yet hears none."""
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return state != "Z"

    @property
    def stdout(self) -> str:
        """What it has said."""
        return (self.folder / f"{self.pid}.out").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """Its log."""
        return (self.folder / f"{self.pid}.err").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def make_nursery() -> Iterator[Callable[..., Nursery]]:
    """Return what makes a nursery of modules; each is closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*modules: str) -> Nursery:
            made = Nursery(*modules)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="session")
def nursery(make_nursery: Callable[..., Nursery]) -> Nursery:
    """Processes that have the subjects, and no torch."""
    return make_nursery("subjects")


def load_helper(name: str) -> Any:
    """Import a module that lies beside the tests."""
    sys.path.insert(0, str(HERE))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="session")
def disks() -> Any:
    """The disks that fail, run full or lose power: the module ``disks``."""
    return load_helper("disks")


@pytest.fixture(scope="session")
def subjects() -> dict[str, Any]:
    """What is written and read back, by stage."""
    return dict(load_helper("subjects").SUBJECTS)


@pytest.fixture
def subject(stage: str, subjects: dict[str, Any], tmp_path: Path) -> Any:
    """The subject of the stage that a test asks for by its parameter ``stage``."""
    return subjects[stage](tmp_path / "cache")
