"""``sparsekd``: what one does beside a recipe. ``bank`` shows, verifies, repairs and sweeps the score bank; ``import`` and
``export`` exchange what was made with other projects; ``search`` and ``encode`` let a student work; ``slurm``
spreads stage 1 over a cluster.

Exit 0 done, 1 damage found, 2 bad input with one line on stderr. Imports no torch.
"""

from __future__ import annotations

import typer

from sparsekd.cli.bank import bank
from sparsekd.cli.cluster import slurm
from sparsekd.cli.exports import export
from sparsekd.cli.imports import import_scores
from sparsekd.cli.search import encode, search
from sparsekd.cli.settings import LOOK
from sparsekd.quiet import quieten_libraries

app = typer.Typer(**LOOK, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bank, name="bank", help="Show, verify, repair and sweep what teachers and encoders already answered.")
app.command("import")(import_scores)
app.command("search")(search)
app.command("encode")(encode)
app.command("slurm")(slurm)
app.add_typer(export, name="export", help="Write what was made in the forms that other projects read.")


@app.callback()
def sparsekd() -> None:
    """Distil rankers into learned sparse retrievers. Experiments are recipes, run by make; this is what one does beside."""
    quieten_libraries()
