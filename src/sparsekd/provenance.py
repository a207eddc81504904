"""What every manifest says about how it was made: the command, the versions, the machine's kind.

No host and no user; paths only as the recipe gives them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = (
    "sparsekd", "torch", "transformers", "sentence-transformers", "datasets", "accelerate", "pyarrow", "numpy", "faiss-cpu",
    "faiss-gpu", "bm25s", "ir-measures",
)  # fmt: skip


class HeardWarnings(logging.Handler):
    """Keeps what this package's loggers warn of, each message once, for the manifests that are written afterwards."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of one record."""
        message = record.getMessage()
        if message not in self.messages:
            self.messages.append(message)


def heard_warnings() -> HeardWarnings:
    """Return what hears this package's loggers, from the first call on."""
    logger = logging.getLogger("sparsekd")
    found = next((handler for handler in logger.handlers if isinstance(handler, HeardWarnings)), None)
    if found is None:
        logger.addHandler(found := HeardWarnings())
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of each library that can change a result, as installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def is_ours(error: Exception) -> bool:
    """Tell a refusal, raised by this package with a message for people, from a library's error that nobody foresaw."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return Path(__file__).parent in raised_in.parents


def command(arguments: Sequence[str] | None = None) -> str:
    """Return the command line that is running, the interpreter's and absolute script paths shortened to their names."""
    argv = list(sys.argv if arguments is None else arguments)
    script = Path(argv[0])
    if script.is_absolute():
        script = Path(*script.parts[-2:]) if script.parent.name == "pipeline" else Path(script.name)
    return shlex.join(["python", str(script), *argv[1:]])


def provenance(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the fields that every stage adds to its manifest."""
    return {
        "command": command(),
        "overrides": list(overrides),
        "versions": versions(),
        "warnings": list(heard_warnings().messages),
        "machine": f"{platform.system()} {platform.machine()}",
        "recorded_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
