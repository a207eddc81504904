"""``sparsekd slurm``: the script that spreads stage 1 over a Slurm cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli.errors import one_line_errors


def slurm(
    recipe: Annotated[Path, typer.Argument(help="TOML file, as the jobs will find it from the folder they are submitted in.")],
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=100_000, help="Jobs of the array that share the work.")],
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="Cores of each job.")] = 4,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs of each job; it has a worker for each.")] = 0,
    time: Annotated[str | None, typer.Option("--time", help="Slurm's limit for each job, e.g. 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm's partition.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key.")] = None,
) -> None:
    """Print an sbatch script for stage 1 of a recipe: sparsekd slurm RECIPE --jobs 8 > stage1.sbatch; sbatch stage1.sbatch."""
    with one_line_errors():
        from sparsekd.recipe import load_recipe
        from sparsekd.runners.slurm import array_script

        load_recipe(recipe, overrides or [])  # refused here, not by every job
        for name, value in (("time", time), ("partition", partition)):
            if value is not None and not value.replace(":", "").replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"--{name} {value!r}: expected letters, digits, : - and _ only")
        script = array_script(str(recipe), overrides or [], jobs=jobs, cpus=cpus, gpus=gpus, time=time, partition=partition)
        typer.echo(script, nl=False)
