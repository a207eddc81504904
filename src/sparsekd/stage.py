"""The frame around every stage script: arguments, logging, errors, exit codes.

A stage takes one recipe, logs to stderr, and prints the folder it made or found as the last line of stdout. Exit 0 done or hit,
1 failed, 2 bad input, 3 done but for what is in quarantine, 128 + the signal's number where SIGINT or SIGTERM ended it; training
finishes its step first. Of several processes that a launcher started, the first speaks; the others say warnings and errors only.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsekd.artifact import IntegrityError
from sparsekd.bank.sharing import QuarantineError
from sparsekd.interruption import exit_code, terminable
from sparsekd.plan import Plan
from sparsekd.provenance import command, heard_warnings, is_ours
from sparsekd.quiet import quieten_libraries
from sparsekd.recipe import load_recipe
from sparsekd.resources import require
from sparsekd.study import FailedMembersError
from sparsekd.training.stopping import StoppedError

logger = logging.getLogger("sparsekd")

# What the system says of a path that the user named, wherever it is first used; a full or failing disk is another matter.
_UNUSABLE_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS}
_FAILING_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def run_stage(
    description: str,
    stage: Callable[[Plan], Path],
    kinds: Sequence[str],
    arguments: Sequence[str] | None = None,
    *,
    describe: Callable[[Plan, Sequence[str]], str] | None = None,
    require: Callable[[Plan, Sequence[str]], None] = require,
) -> int:
    """Parse arguments, load the recipe, carry the stage out or print its plan; return the exit code.

    ``kinds`` are the artifacts a dry run reports, in the order of work, in the words of ``describe`` if the stage has its own;
    ``require`` raises ValueError if they cannot fit into memory or on the disk.
    """
    options = _parser(description).parse_args(arguments)
    if options.shard is not None:
        options.set.append(f"run.shard={options.shard}")
    if options.allow_quarantine is not None:
        options.set.append(f"labels.allow_quarantine={options.allow_quarantine}")
    try:
        recipe = load_recipe(Path(options.recipe), options.set)
        _prepare(recipe.run.log_level, recipe.run.threads)
        plan = Plan(recipe, tuple(options.set))
        if options.dry_run:
            sys.stdout.write((describe or _describe)(plan, kinds) + "\n")
            return 0
        require(plan, kinds)
        # Another process of a launcher's may wait for the first inside a library, which hears no handler; the default ends it.
        with terminable() if _is_first() else contextlib.nullcontext():
            folder = stage(plan)
    except QuarantineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 3
    except (IntegrityError, FailedMembersError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, FileNotFoundError) as error:
        if not is_ours(error):
            traceback.print_exc()
            return 1
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.errno in _FAILING_DISK and error.filename is not None:
            sys.stderr.write(f"error: {_failing_disk(error)}\n")
            return 1
        if error.errno not in _UNUSABLE_PATH:
            traceback.print_exc()
            return 1
        sys.stderr.write(f"error: {error.filename}: {(error.strerror or '').lower()}; name another path in the recipe\n")
        return 2
    except StoppedError as stopped:
        if _is_first():
            sys.stderr.write(f"{stopped}\ngo on with: {_launched()}\n")
        return 128 + stopped.number
    except KeyboardInterrupt as interrupt:
        if _is_first():
            sys.stderr.write(f"interrupted; what was committed stays\ngo on with: {_launched()}\n")
        return exit_code(interrupt)
    except Exception:
        traceback.print_exc()
        return 1
    if _is_first():
        sys.stdout.write(f"{folder}\n")
    return 0


def _failing_disk(error: OSError) -> str:
    """Say what a full or failing disk refused, how much is free there, and what to do."""
    path = Path(str(error.filename)).absolute()
    place = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(place).free
    return (
        f"{error.filename}: {(error.strerror or '').lower()}; {free:,} bytes are free at {place}; what was committed stays: make "
        "room, or name another [run] cache, and run the same command again"
    )


def _describe(plan: Plan, kinds: Sequence[str]) -> str:
    from sparsekd.dry_run import describe_plan

    return describe_plan(plan, kinds)


def _is_first() -> bool:
    """Whether this process is the only one or the first of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _launched() -> str:
    """Return the command line, with the launcher that started several processes of it on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return command() if processes == "1" else f"torchrun --nproc-per-node {processes} {command().removeprefix('python ')}"


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", help="TOML file, e.g. pipeline/recipes/quickstart.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one recipe key")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="this is process I, from 0, of N that run this recipe over one cache: where it begins; each goes on until everything "
        "is there, so any of them may die",
    )
    parser.add_argument(
        "--allow-quarantine",
        metavar="N",
        help="leave up to N pairs out of the table that are in quarantine because they ended every process that scored them",
    )
    parser.add_argument("--dry-run", action="store_true", help="print keys, hits and costs; make nothing")
    return parser


def _prepare(log_level: str, threads: int | None) -> None:
    """Send logs to stderr and set what libraries read from the environment before they are imported."""
    level = log_level if _is_first() else "WARNING"
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    heard_warnings().messages.clear()
    quieten_libraries()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
