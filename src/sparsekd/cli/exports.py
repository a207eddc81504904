"""``sparsekd export``: what was made, in the forms that other projects read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli.errors import one_line_errors
from sparsekd.cli.imports import LayoutName
from sparsekd.cli.settings import LOOK
from sparsekd.exchange.layouts import layout_of

export = typer.Typer(**LOOK)


@export.command("table")
def export_table(
    layout: LayoutName,
    table: Annotated[Path, typer.Argument(help="Folder of a score table: CACHE/tables/KEY.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    collection: Annotated[
        Path | None, typer.Option("--collection", help="BEIR folder of the texts; what the table says without.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a score table in another project's layout; the last line is the folder made."""
    with one_line_errors():
        from sparsekd.exchange import exporting

        num_rows = exporting.export_table(layout_of(layout), table, out, collection=collection, overwrite=overwrite)
        typer.echo(f"{num_rows:,} rows", err=True)
        typer.echo(str(out))
