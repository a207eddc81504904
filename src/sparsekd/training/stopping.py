"""SIGTERM and SIGINT: a stage cleans up and ends with 128 + the signal's number; a student that trains finishes and saves the step.

Imports no torch: the stage scripts know these errors without it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StoppedError(Exception):
    """Training was ended by a signal after a whole step, whose checkpoint is saved."""

    def __init__(self, number: int, step: int, last_step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step} of {last_step}, which is saved; the same command goes on from there")
        self.number = number


class TerminatedError(BaseException):
    """SIGTERM came; like KeyboardInterrupt no Exception, so that nothing but clean-up comes between."""


class Signals:
    """Which of the two signals has come, 0 for none."""

    def __init__(self) -> None:
        self.number = 0

    def _came(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.number = number


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Take note of SIGTERM and SIGINT instead of dying of them; a thread other than the main one, which may not, hears none."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals._came) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Raise TerminatedError where SIGTERM comes, which would else leave temporary files; in the main thread, which alone may."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
