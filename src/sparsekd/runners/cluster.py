"""Workers as tasks of a Ray cluster, each on whichever node has room; extra ``ray``.

Ray starts processes and says which were lost; nothing but the recipe goes through it. What workers make goes to the cache, a folder
that every node must see: each writes there by the same renames as on one machine, and a claim of a shard is a lock in it.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparsekd.artifact import write_json_atomically
from sparsekd.runners.supervision import Ended, Task

_OBJECT_STORE_BYTES = 80_000_000  # Ray's least: a recipe and an answer a worker
_POLL_SECONDS = 1.0  # between looks at the workers, so that Ctrl-C is heard


class RayWorkers:
    """One Ray task per worker. Ray itself tries none again: it would not count what a shard has killed."""

    def __init__(self, task: Task, *, address: str | None, cpus: int, gpus: float, cache: Path) -> None:
        """Connect to the cluster at ``address``, or start one on this machine where it is None.

        ``cpus`` and ``gpus`` are each worker's; ``cache`` is the folder, seen by all nodes, in which they find each other's work.
        Raises ValueError without the extra ``ray``, if there is no cluster, or if no node of it could ever hold a worker.
        """
        self._task = task
        self._ray = _connected(address, task.num_workers * cpus)
        self._numbers: dict[Any, int] = {}
        self._mark = cache.resolve() / f".seen-by-all-{secrets.token_hex(8)}"
        try:
            self._check_room(cpus, gpus)
            write_json_atomically(self._mark, {})
        except BaseException:
            self._ray.shutdown()
            raise
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "max_calls": 1}
        self._run = self._ray.remote(**options)(_work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the tasks that still run, and leave the cluster; one that was started here ends."""
        for reference in self._numbers:
            self._ray.cancel(reference)  # KeyboardInterrupt in the worker: claims are given up
        if self._numbers:
            self._ray.wait(list(self._numbers), num_returns=len(self._numbers), timeout=10)
        self._mark.unlink(missing_ok=True)
        self._ray.shutdown()

    def start(self, number: int) -> None:
        """Submit worker ``number``; it runs as soon as a node has room."""
        reference = self._run.remote(self._task.module, self._task.document, number, str(self._mark))
        self._numbers[reference] = number

    def next_end(self) -> Ended:
        """Wait for a worker to end."""
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(self._numbers), num_returns=1, timeout=_POLL_SECONDS)
        number = self._numbers.pop(ready[0])
        lost = self._ray.exceptions
        try:
            refusal = self._ray.get(ready[0])
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError, lost.ObjectLostError) as error:
            return Ended(number, killed=True, message=type(error).__name__)
        except lost.RayTaskError as error:
            return Ended(number, type(error.cause).__name__, str(error.cause))
        return Ended(number) if refusal is None else Ended(number, *refusal)

    def _check_room(self, cpus: int, gpus: float) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise ValueError(
                f"[run] a worker needs {cpus} CPUs and {gpus:g} GPUs, and no node of the Ray cluster has them ({found}); lower "
                "run.threads or run.gpus_per_worker"
            )


def _connected(address: str | None, num_cpus: int) -> Any:
    # Read when Ray is imported. Whoever reaches a cluster without tokens can run code on it; `ray start` makes the token.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ValueError("[run] runner = 'ray' needs the extra: make setup EXTRAS=cpu,ray") from error
    try:
        _knock(address)  # Ray itself would try for minutes
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            num_cpus=num_cpus if address is None else None,
            object_store_memory=_OBJECT_STORE_BYTES if address is None else None,
        )
    except ray.exceptions.AuthenticationError as error:
        raise ValueError(
            f"[run] address = {address!r}: the Ray cluster asks for a token; make one with `ray get-auth-token --generate`, and "
            "give ~/.ray/auth_token to every node"
        ) from error
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise ValueError(f"[run] address = {address!r}: no Ray cluster answers there; start one with: ray start --head") from error
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # Ray's own handler ends the process where it stands
    return ray


def _knock(address: str | None) -> None:
    """Raise ConnectionError, TimeoutError or gaierror if nobody listens at ``host:port``; other addresses are Ray's to resolve."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _work(module: str, document: dict[str, Any], number: int, mark: str) -> tuple[str, str] | None:
    """Run in a process of its own on some node: Ray's ``max_calls=1`` ends it afterwards, and its memory with it."""
    if not Path(mark).exists():
        found = f"[run] cache = {str(Path(mark).parent)!r}: a node of the Ray cluster does not see this folder"
        return "ValueError", f"{found}; expected one that all nodes share"
    answer: tuple[str, str] | None = importlib.import_module(module).work(document, number)
    return answer
