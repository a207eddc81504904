"""Run in a forked process: become the stage script that ``request`` asks for, which tests/e2e/conftest.py puts here."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

if __name__ == "__main__":
    request: dict[str, Any] = globals()["request"]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")
