"""A worker process: reads one line of JSON, does that work, and answers with one line of JSON.

It ends by SIGTERM when the process that started it is gone, whose end of the pipe is then closed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading

from sparsekd.interruption import TerminatedError, exit_code, terminable


def main() -> int:
    """Work; return the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with terminable():
            answer = importlib.import_module(told["module"]).work(told["document"], told["number"])
    except TerminatedError as terminated:
        return exit_code(terminated)
    answers.write(json.dumps(answer) + "\n")
    answers.close()
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
