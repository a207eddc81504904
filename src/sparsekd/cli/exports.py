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


@export.command("hub-folder")
def export_hub_folder(
    student: Annotated[Path, typer.Argument(help="Folder of a trained student: CACHE/students/KEY.")],
    table: Annotated[Path, typer.Argument(help="Folder of the score table it was trained on: CACHE/tables/KEY.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    collection: Annotated[
        Path | None, typer.Option("--collection", help="BEIR folder of the texts; what the table says without.")
    ] = None,
    texts: Annotated[
        bool | None,
        typer.Option("--with-texts/--without-texts", help="Texts, or ids and labels alone; what publish_texts said without."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write what one would push: the student with its card, its scores as a dataset; the last line is the folder made."""
    with one_line_errors():
        from sparsekd.exchange import hub_folder

        done = hub_folder.export_hub_folder(student, table, out, collection=collection, texts=texts, overwrite=overwrite)
        held = "with their texts" if done.has_texts else "ids and labels without texts"
        typer.echo(f"student and {done.num_rows:,} rows of scores, {held}", err=True)
        typer.echo("no licence is stated: add yours to student/README.md and scores/README.md before you publish", err=True)
        typer.echo(str(out))
