"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from sparsekd.runners.supervision import Ended, Task

END_SECONDS = 10.0
"""What a worker has to give its claims up after SIGTERM, before it is killed."""


class LocalWorkers:
    """Processes ``python -P -m sparsekd.runners.worker``, each with a share of the compute threads; see ``Workers``."""

    def __init__(self, task: Task, threads: int | None = None) -> None:
        """``threads`` are each worker's; None divides this process's cores among them."""
        self._task = task
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // task.num_workers)
        self._running: dict[int, tuple[subprocess.Popen[str], threading.Thread]] = {}
        self._ends: queue.Queue[Ended] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the workers that still run: SIGTERM, and after ``END_SECONDS`` SIGKILL."""
        for process, _ in self._running.values():
            process.terminate()
        for process, follower in self._running.values():
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            follower.join()

    def start(self, number: int) -> None:
        """Start worker ``number``."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sparsekd.runners.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            start_new_session=True,  # Ctrl-C comes to this process, which ends the workers once
        )
        follower = threading.Thread(target=self._follow, args=(number, process), daemon=True)
        self._running[number] = process, follower
        follower.start()

    def next_end(self) -> Ended:
        """Wait for a worker to end."""
        ended = self._ends.get()
        _, follower = self._running.pop(ended.number)
        follower.join()
        return ended

    def _follow(self, number: int, process: subprocess.Popen[str]) -> None:
        """Hand the task over, then wait. The pipe stays open: its end tells a worker that this process is gone."""
        assert process.stdin is not None
        assert process.stdout is not None
        told = {"module": self._task.module, "document": self._task.document, "number": number}
        with contextlib.suppress(BrokenPipeError):  # killed already; what follows says so
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        answer = process.stdout.read()
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._ends.put(_ended(number, code, answer))


def _ended(number: int, code: int, answer: str) -> Ended:
    if code == 0:
        refusal = json.loads(answer)
        return Ended(number) if refusal is None else Ended(number, *refusal)
    if code == 128 + signal.SIGTERM:
        return Ended(number, killed=True, message="SIGTERM")  # somebody's, as this process has ended none of them yet
    if code > 0:
        return Ended(number, "exit", f"code {code}; what it said is above")
    return Ended(number, killed=True, message=signal.Signals(-code).name)
