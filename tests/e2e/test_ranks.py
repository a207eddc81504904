"""Several processes that train one student with the same script, on CPU: one publishes, killed ones go on, bits stay the same."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.enable_socket]

ROOT = Path(__file__).resolve().parents[2]
DROPOUT = "student.dropout=0.1"
POLL_SECONDS = 0.005
Content = Callable[[Path, str], dict[str, bytes]]


class Launched:
    """Processes of stage 2 that train together, however they were started."""

    def poll(self) -> int | None:
        """Return the exit code once they have ended, None before."""
        raise NotImplementedError

    def terminate(self) -> None:
        """Send SIGTERM."""
        raise NotImplementedError

    def kill_second(self) -> None:
        """SIGKILL the process of rank 1 alone."""
        raise NotImplementedError

    def said(self) -> tuple[set[int | None], str, str]:
        """Wait for all of them; return exit codes, and what they said to stdout and to stderr."""
        raise NotImplementedError

    def finish(self) -> tuple[Path, str, str]:
        codes, stdout, log = self.said()
        assert codes == {0}, log
        return Path(stdout.splitlines()[-1]), stdout, log


class Ranks(Launched):
    """As a launcher without a store starts them, but forked with the libraries imported: an interpreter each costs 10 seconds."""

    def __init__(self, workplace: Any, *overrides: str, num_processes: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = str(num_processes)
        common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = [
            workplace.start("train_student", *overrides, **common, RANK=rank, LOCAL_RANK=rank, GLOO_SOCKET_IFNAME="lo")
            for rank in map(str, range(num_processes))
        ]

    def poll(self) -> int | None:
        codes = [process.poll() for process in self.processes]
        return None if None in codes else codes[0]

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.said()

    def kill_second(self) -> None:
        self.processes[1].send_signal(signal.SIGKILL)

    def said(self) -> tuple[set[int | None], str, str]:
        said = [process.communicate(timeout=300) for process in self.processes]
        codes = {process.returncode for process in self.processes}
        return codes, "".join(stdout for stdout, _ in said), "".join(stderr for _, stderr in said)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)


class Torchrun(Launched):
    """Two processes that torchrun starts and watches."""

    def __init__(self, workplace: Any, *overrides: str) -> None:
        arguments = [argument for override in overrides for argument in ("--set", override)]
        script = str(ROOT / "pipeline" / "train_student.py")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self._process = subprocess.Popen(
            [*torchrun, script, "recipe.toml", *arguments],
            cwd=workplace.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill_second(self) -> None:
        started = psutil.Process(self._process.pid).children(recursive=True)
        [second] = [each for each in started if each.environ().get("RANK") == "1"]
        second.kill()

    def said(self) -> tuple[set[int | None], str, str]:
        started = psutil.Process(self._process.pid).children(recursive=True)
        stdout, log = self._process.communicate(timeout=300)
        assert not psutil.wait_procs(started, timeout=60)[1]
        return {self._process.returncode}, stdout, log


launchers = pytest.mark.parametrize("launcher", [Ranks, pytest.param(Torchrun, marks=pytest.mark.long)])


def reach(process: Launched, cache: Path, step: int) -> None:
    """Return when a checkpoint of ``step`` or later has begun to be written, or the process has ended."""
    while process.poll() is None and newest_step(cache) < step:
        time.sleep(POLL_SECONDS)


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def newest_step(cache: Path) -> int:
    steps = [int(path.name.rpartition("-")[2]) for path in (cache / "students").glob("*.work/checkpoint-*")]
    return max(steps, default=0)


@pytest.fixture(scope="module")
def uninterrupted(make_workplace: Callable[..., Any]) -> tuple[Any, Path, str, str]:
    """A student that two processes of torchrun trained in one go, with dropout."""
    workplace = make_workplace()
    return workplace, *Torchrun(workplace, DROPOUT).finish()


def test_two_processes_train_one_student_and_publish_it_once(uninterrupted: tuple[Any, Path, str, str]) -> None:
    workplace, folder, stdout, log = uninterrupted

    assert stdout.splitlines() == [str(folder)]
    assert log.count("step 30 of 30") == 1
    assert manifest_of(folder)["counts"]["steps"] == 30
    assert [path.name for path in (workplace.cache / "students").iterdir() if not path.name.startswith(".")] == [folder.name]


def test_the_key_knows_nothing_of_the_number_of_processes_and_a_second_run_is_a_hit(
    uninterrupted: tuple[Any, Path, str, str],
) -> None:
    workplace, folder, _, _ = uninterrupted

    alone = workplace.run("train_student", DROPOUT)
    again, stdout, log = Ranks(workplace, DROPOUT).finish()

    assert alone.folder == again == folder
    assert f"student {folder.name}: hit" in alone.log
    assert log.count(f"student {folder.name}: hit") == 1
    assert stdout.splitlines() == [str(folder)]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_learn_what_one_learns(make_workplace: Callable[..., Any], num_processes: int) -> None:
    plain = "student.dropout=0.0"

    alone = make_workplace().run("train_student", plain).folder
    together = Ranks(make_workplace(), plain, num_processes=num_processes).finish()[0]

    logs = [json.loads((folder / "training.json").read_text(encoding="utf-8")) for folder in (alone, together)]
    ours, theirs = ([entry for entry in log if "loss" in entry] for log in logs)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == [1, 10, 20, 30]
    for name in ("loss", "base_loss", "query_regularizer_loss", "document_regularizer_loss", "passage_active_dims"):
        assert [entry[name] for entry in theirs] == pytest.approx([entry[name] for entry in ours], rel=1e-3)


def test_killed_at_a_random_step_two_processes_end_with_the_same_weights(
    make_workplace: Callable[..., Any], uninterrupted: tuple[Any, Path, str, str], content_of: Content
) -> None:
    generator, workplace = random.Random(3), make_workplace()
    ranks = Ranks(workplace, DROPOUT)
    reach(ranks, workplace.cache, generator.randrange(3, 28, 3))
    time.sleep(generator.uniform(0, 0.3))
    ranks.kill()

    folder, _, log = Ranks(workplace, DROPOUT).finish()

    assert "train: resuming from checkpoint-" in log
    assert manifest_of(folder)["counts"]["resumed_from_step"] > 0
    assert content_of(folder, "model.safetensors") == content_of(uninterrupted[1], "model.safetensors")


@launchers
def test_a_process_that_dies_takes_the_others_with_it_and_the_next_run_goes_on(
    make_workplace: Callable[..., Any], uninterrupted: tuple[Any, Path, str, str], content_of: Content, launcher: Any
) -> None:
    workplace = make_workplace()
    process = launcher(workplace, DROPOUT)
    reach(process, workplace.cache, 6)

    process.kill_second()
    codes, _, _ = process.said()

    assert 0 not in codes
    folder = launcher(workplace, DROPOUT).finish()[0]
    assert content_of(folder, "model.safetensors") == content_of(uninterrupted[1], "model.safetensors")


@launchers
def test_sigterm_saves_a_step_of_all_processes_and_the_next_run_goes_on_from_it(
    make_workplace: Callable[..., Any], uninterrupted: tuple[Any, Path, str, str], content_of: Content, launcher: Any
) -> None:
    workplace = make_workplace()
    process = launcher(workplace, DROPOUT)
    reach(process, workplace.cache, 6)

    process.terminate()
    _, _, log = process.said()

    stopped = [line for line in log.splitlines() if line.startswith("stopped by SIGTERM after step ")]
    assert len(stopped) == 1, log
    assert "go on with: torchrun --nproc-per-node 2 pipeline/train_student.py recipe.toml --set student.dropout=0.1" in log
    folder = launcher(workplace, DROPOUT).finish()[0]
    assert manifest_of(folder)["counts"]["resumed_from_step"] == int(stopped[0].split()[5])
    assert content_of(folder, "model.safetensors") == content_of(uninterrupted[1], "model.safetensors")


def test_two_processes_train_the_students_of_two_rounds(make_workplace: Callable[..., Any]) -> None:
    rounds = ("mining.rounds=2", "training.max_steps=4")
    workplace = make_workplace()

    codes, _, problem = Ranks(workplace, *rounds).said()
    assert 0 not in codes
    assert "several processes train one student a run, and round 1 has none yet; run the same command first with" in problem
    Ranks(workplace, "mining.rounds=1", "training.max_steps=4").finish()
    folder, _, log = Ranks(workplace, *rounds).finish()

    assert log.count("step 4 of 4") == 1
    alone = workplace.run("train_student", *rounds)
    assert alone.folder == folder
    assert f"student {folder.name}: hit" in alone.log
    students = [path for path in (workplace.cache / "students").iterdir() if not path.name.startswith(".")]
    assert len(students) == 2
    for path in students:
        assert manifest_of(path)["counts"]["steps"] == 4


def test_a_batch_that_cannot_be_divided_is_refused(make_workplace: Callable[..., Any]) -> None:
    codes, _, log = Ranks(make_workplace(), "training.batch_size=5").said()

    assert codes == {2}
    assert "error: [training] batch_size = 5 cannot be divided among 2 processes; set a multiple of 2" in log
