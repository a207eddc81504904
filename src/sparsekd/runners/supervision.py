"""Workers are started, started again where something killed them, and followed to their end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from sparsekd.artifact import IntegrityError
from sparsekd.bank.sharing import DEATHS, QuarantineError

MAX_DEATHS = 200
"""Killed workers after which a run gives up: a text that kills is found by some twenty, so this is several such texts, or a machine
that is not fit for the work."""

_REFUSALS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, FileNotFoundError, IntegrityError, QuarantineError)
}
"""What a worker may end with that the caller would have raised itself, alone."""

logger = logging.getLogger(__name__)


class WorkersError(RuntimeError):
    """Workers that failed, or were killed too often."""


@dataclass(frozen=True)
class Task:
    """What every worker does."""

    module: str
    """Its ``work(document, number)`` is what a worker calls; returns None, or the class name and the message of a refusal."""
    document: dict[str, Any]
    """JSON, the same for all."""
    num_workers: int


@dataclass(frozen=True)
class Ended:
    """How a worker ended: done, or with ``error``, or ``killed``."""

    number: int
    error: str | None = None
    """Name of an exception's class."""
    message: str = ""
    killed: bool = False
    """Ended by something else than itself: a signal, a lost node."""


class Workers(AbstractContextManager["Workers"], Protocol):
    """A place where workers run; leaving the context ends those that still do."""

    def start(self, number: int) -> None:
        """Start worker ``number``, from 0; also again, after it was killed."""

    def next_end(self) -> Ended:
        """Wait for a worker to end."""

    def __enter__(self) -> Self: ...


def supervise(workers: Workers, num_workers: int, attempts: Callable[[], Hashable]) -> None:
    """Run so many workers to their end.

    A worker that was killed is started again: its death is counted in the bank at the shard it held, which is halved and at last
    named. WorkersError if ``attempts``, what the bank says of its shards, stays the same over ``DEATHS`` deaths in a row, or after
    ``MAX_DEATHS`` in all. A worker that fails ends the others and its error is raised; QuarantineError waits for the others.
    """
    quarantine: Exception | None = None
    noted, in_vain, deaths, running = attempts(), 0, 0, num_workers
    with workers:
        for number in range(num_workers):
            workers.start(number)
        while running:
            ended = workers.next_end()
            if ended.killed:
                now, deaths = attempts(), deaths + 1
                noted, in_vain = now, in_vain + 1 if now == noted else 0
                if in_vain >= DEATHS or deaths >= MAX_DEATHS:
                    raise WorkersError(
                        f"worker {ended.number} was killed ({ended.message}); {deaths} so far, and the work does not go on. Often "
                        "memory: fewer workers, a smaller run.batch_tokens or run.shard_pairs; what is banked stays, the same "
                        "command goes on from there"
                    )
                logger.warning("worker %d was killed (%s): started again", ended.number, ended.message)
                workers.start(ended.number)
                continue
            running -= 1
            error = _error(ended)
            if isinstance(error, QuarantineError):
                quarantine = error
            elif error is not None:
                raise error
    if quarantine is not None:
        raise quarantine


def _error(ended: Ended) -> Exception | None:
    if ended.error is None:
        return None
    refusal = _REFUSALS.get(ended.error)
    if refusal is not None:
        return refusal(ended.message)
    return WorkersError(f"worker {ended.number} failed: {ended.error}: {ended.message}")
