"""Workers as processes of this machine: real ones, of a module written for each test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekd.interruption import TerminatedError, terminable
from sparsekd.runners import LocalWorkers, Task, WorkersError, supervise

Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return ``run(body, num_workers)``: workers that carry ``def work(document, number)`` with this body out, in ``tmp_path``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)

    def go(body: str, num_workers: int = 2, **options: int) -> None:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        module = f"import os, pathlib, signal, time\ndef work(document, number):\n{lines}\n"
        (tmp_path / "task.py").write_text(module, encoding="utf-8")
        task = Task("task", {"word": "tern"}, num_workers)
        supervise(LocalWorkers(task, **options), num_workers, lambda: sorted(path.name for path in tmp_path.iterdir()))

    return go


def test_each_gets_the_document_its_number_and_its_threads(run: Run, tmp_path: Path) -> None:
    run("pathlib.Path(f'{number}.txt').write_text(document['word'] + os.environ['OMP_NUM_THREADS'])", 2, threads=3)

    assert [(tmp_path / f"{number}.txt").read_text(encoding="utf-8") for number in (0, 1)] == ["tern3", "tern3"]


def test_without_threads_the_cores_are_divided(run: Run, tmp_path: Path) -> None:
    run("pathlib.Path(f'{number}.txt').write_text(os.environ['OMP_NUM_THREADS'])", 2)

    assert (tmp_path / "0.txt").read_text(encoding="utf-8") == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_what_a_worker_prints_is_no_answer(run: Run, tmp_path: Path) -> None:
    run("print('{\"a library\": true}')\npathlib.Path(f'done-{number}').touch()")

    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


def test_a_killed_worker_is_started_again(run: Run, tmp_path: Path) -> None:
    body = """mark = pathlib.Path(f'mark-{number}')
if not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path(f'done-{number}').touch()"""

    run(body)

    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


def test_a_refusal_is_raised_and_the_others_end(run: Run, tmp_path: Path) -> None:
    started = time.monotonic()

    with pytest.raises(ValueError, match=r"^that is none$"):
        run("if number == 1: return 'ValueError', 'that is none'\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)")

    assert time.monotonic() - started < 30
    pid = tmp_path / "pid"
    if pid.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text(encoding="utf-8")), 0)


def test_a_crash_is_named_with_its_code(run: Run) -> None:
    with pytest.raises(WorkersError, match=r"worker 0 failed: exit: code 1; what it said is above"):
        run("raise ZeroDivisionError", 1)


def test_sigterm_gives_claims_up_on_the_way_out(run: Run, tmp_path: Path) -> None:
    body = """if number == 1:
    while not pathlib.Path('waiting').exists(): time.sleep(.01)
    return 'ValueError', 'end'
try:
    pathlib.Path('waiting').touch()
    time.sleep(60)
finally:
    pathlib.Path('given-up').touch()"""

    with pytest.raises(ValueError, match="end"):
        run(body)

    assert (tmp_path / "given-up").exists()


def test_sigterm_is_an_exception_that_no_handler_of_errors_holds() -> None:
    def careless() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            pytest.fail("held")

    with terminable(), pytest.raises(TerminatedError):
        careless()
