"""Stage 1 as a Slurm job array: the script that `sbatch` takes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sparsekd.runners.supervision import MAX_DEATHS

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=sparsekd
#SBATCH --array=0-{last}
{resources}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sparsekd-%A-%a.log
# Stage 1, shared by {jobs} jobs: each goes on until everything is banked, so any of them may be preempted, requeued or killed, and
# those left do the rest. Submit from the folder of the repository, which all nodes must see: sbatch FILE
for attempt in {{1..{attempts}}}; do
    srun {command} --shard "$SLURM_ARRAY_TASK_ID/{jobs}"
    code=$?
    case $code in
        # Killed, often for memory: the bank counts it, and a text that kills again and again is named in the end (exit 3).
        134|135|136|137|139) echo "attempt $attempt ended with $code; starting again" >&2 ;;
        *) exit $code ;;
    esac
done
exit $code
"""


def array_script(
    recipe: str, overrides: Sequence[str], *, jobs: int, cpus: int, gpus: int, time: str | None, partition: str | None
) -> str:
    """Return an sbatch script that runs stage 1 of ``recipe`` in so many jobs, of so many cores and GPUs each.

    A job with several GPUs has a worker for each. ``time`` and ``partition`` are Slurm's own, None leaves its defaults.
    """
    resources = [f"--cpus-per-task={cpus}"]
    resources += [f"--gpus-per-task={gpus}"] if gpus else []
    resources += [f"--time={time}"] if time else []
    resources += [f"--partition={partition}"] if partition else []
    settings = [*overrides, f"run.threads={max(1, cpus // max(1, gpus))}"]
    settings += ["run.device=cuda"] if gpus else []
    settings += [f"run.workers={gpus}"] if gpus > 1 else []
    words = [".venv/bin/python", "pipeline/teacher_scores.py", recipe]
    words += [word for setting in settings for word in ("--set", setting)]
    return _SCRIPT.format(
        last=jobs - 1,
        resources="\n".join(f"#SBATCH {resource}" for resource in resources),
        jobs=jobs,
        attempts=MAX_DEATHS,
        command=shlex.join(words),
    )
