"""SIGTERM ends a stage as Ctrl-C does: by an exception, so that locks, claims and temporary files are given up on the way out.

Between two whole steps training listens for itself (``training/stopping.py``) and saves first.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it before it takes a machine away; no ``except Exception`` holds it."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise TerminatedError in the main thread on SIGTERM; in another thread, which may not say so, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(error: KeyboardInterrupt) -> int:
    """Return 128 + the number of the signal that raised this."""
    return 128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
