"""Progress on stderr: rate, time left and what was reused. A tqdm bar on a terminal, a whole line every 30 s elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress(Protocol):
    """Is told what was done."""

    def update(self, n: int, /) -> object:
        """Say that ``n`` more are done."""


@contextlib.contextmanager
def progress(description: str, *, total: int, unit: str) -> Iterator[Progress]:
    """Yield an object whose ``update(n)`` says that n more of ``total`` are done."""
    if not sys.stderr.isatty():
        yield _Lines(description, total, unit)
        return
    with tqdm(desc=description, total=total, unit=unit, file=sys.stderr, disable=total == 0) as bar:
        yield bar


class _Lines:
    """Whole lines for a log file, where a bar redrawn in place would be one endless line."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = 0
        self._started = self._written = time.monotonic()

    def update(self, n: int, /) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._written < SECONDS_BETWEEN_LINES:
            return
        self._written = now
        rate = self._done / (now - self._started)
        left = tqdm.format_interval((self._total - self._done) / rate)
        line = f"{self._description}: {self._done}/{self._total} {self._unit}, {rate:.1f} {self._unit}/s, {left} left\n"
        sys.stderr.write(line)
        sys.stderr.flush()
