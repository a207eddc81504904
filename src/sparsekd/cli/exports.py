"""``sparsekd export``: what was made, in the forms that other projects read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli.errors import one_line_errors
from sparsekd.cli.imports import LayoutName
from sparsekd.cli.search import DEFAULT_INDEXES, Indexes
from sparsekd.cli.settings import LOOK
from sparsekd.engines.catalogue import ENGINES
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


@export.command("engine")
def export_engine(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help=f"One of {', '.join(ENGINES)}.")],
    student: Annotated[Path, typer.Argument(help="Folder of a saved SparseEncoder: CACHE/students/KEY.")],
    collection: Annotated[Path, typer.Argument(help="BEIR folder: its corpus.jsonl is exported.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    queries: Annotated[Path | None, typer.Option("--queries", help="A queries.jsonl to encode for the engine too.")] = None,
    indexes: Indexes = DEFAULT_INDEXES,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a student's vectors as a search engine's index or feed; the last line is the folder made."""
    with one_line_errors():
        from sparsekd.engines import exporting
        from sparsekd.engines.catalogue import engine_of
        from sparsekd.engines.student import source_of
        from sparsekd.exchange.target import require_free
        from sparsekd.recipe import Run
        from sparsekd.retrieval import StudentEncoder

        chosen = engine_of(engine)
        chosen.require()
        require_free(out, overwrite)
        index, source = source_of(StudentEncoder(student, Run()), collection, indexes, queries=queries)
        summary = exporting.export_engine(chosen, source, out, index_key=index.artifact.key, overwrite=overwrite)
        typer.echo(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in summary.items()), err=True)
        typer.echo(str(out))


@export.command("onnx")
def export_onnx(
    student: Annotated[Path, typer.Argument(help="Folder of a saved SparseEncoder: CACHE/students/KEY.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a student as one ONNX graph from token ids to weights, compared in ONNX Runtime; the last line is the folder made."""
    with one_line_errors():
        from sparsekd.engines import onnx

        difference = onnx.export_onnx(student, out, overwrite=overwrite)
        typer.echo(f"largest difference of a weight {difference:.1g}", err=True)
        typer.echo(str(out))
