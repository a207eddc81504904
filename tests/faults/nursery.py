"""A process that imports once and forks for each request; a child runs a script as ``python SCRIPT ARGUMENTS`` would.

    python nursery.py MODULE...

Requests are lines of JSON: ["start", folder, script, argument...] answers with the child's pid, ["wait", pid] with its exit code.
A child writes to PID.out and PID.err in its folder. It has one thread, so that forking is safe.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import traceback


def main() -> None:
    """Serve until the input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children would look at all of it, .5 s each time that a trainer collects garbage
    for line in sys.stdin:
        verb, *request = json.loads(line)
        answer = start(*request) if verb == "start" else os.waitstatus_to_exitcode(os.waitpid(request[0], 0)[1])
        print(answer, flush=True)


def start(folder: str, *command: str) -> int:
    """Fork, and return the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    code: object = 1
    try:
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, f"{os.getpid()}.out"), (2, f"{os.getpid()}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv = list(command)
        sys.path[0] = os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
