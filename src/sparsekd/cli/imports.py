"""``sparsekd import``: teacher scores from other projects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparsekd.cli.errors import one_line_errors
from sparsekd.cli.settings import DEFAULT_CACHE, Cache
from sparsekd.exchange.layouts import LAYOUTS, layout_of

LayoutName = Annotated[str, typer.Argument(metavar="LAYOUT", help=f"One of {', '.join(LAYOUTS)}.")]


def import_scores(
    layout: LayoutName,
    path: Annotated[Path, typer.Argument(help="File, or folder that holds the layout's files.")],
    name: Annotated[str, typer.Option("--name", help="What the scores are; with the fields, their identity in the bank.")],
    fields: Annotated[list[str] | None, typer.Option("--field", help="KEY=VALUE more to the identity; repeatable.")] = None,
    collection: Annotated[
        Path | None, typer.Option("--collection", help="BEIR folder of the ids; texts not in it are refused too.")
    ] = None,
    to: Annotated[str, typer.Option("--to", help="scores: into the bank. table: margins and bare triples, as a table.")] = "scores",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out, and count, pairs that the collection does not have.")
    ] = False,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Take teacher scores from another project's file; the last line is the folder they are in."""
    with one_line_errors():
        from sparsekd.exchange import importing  # provenance, tables and tabular files: .3 s that `bank` need not pay

        if to not in ("scores", "table"):
            raise ValueError(f"--to {to}: expected scores or table")
        known, statement = layout_of(layout), importing.Statement(name, _stated(fields or []))
        if to == "table":
            if collection is None or skip_unknown:
                raise ValueError("--to table: needs --collection, whose ids the rows name, and has no --skip-unknown")
            table = importing.import_table(known, path, statement, cache=cache, collection=collection)
            repeated = table.counts["rows_dropped"]["repeated"]
            typer.echo(f"{len(table):,} rows of kind {table.kind}; {repeated:,} repeated", err=True)
            typer.echo(str(table.artifact.folder))
            return
        if skip_unknown and collection is None:
            raise ValueError("--skip-unknown: needs --collection, whose texts are the known ones")
        done = importing.import_scores(known, path, statement, cache=cache, collection=collection, skip_unknown=skip_unknown)
        counts = f"{done.pairs:,} pairs: {done.added:,} added, {done.known:,} there already"
        typer.echo(f"{counts}; {done.repeated:,} repeated, {done.unknown:,} unknown left out", err=True)
        typer.echo(str(done.folder))


def _stated(fields: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE words as a dictionary; ValueError if one is no such word or a key comes twice."""
    stated: dict[str, str] = {}
    for word in fields:
        key, equals, value = word.partition("=")
        if not key or not equals or key in stated:
            raise ValueError(f"--field {word!r}: expected KEY=VALUE, each key once")
        stated[key] = value
    return stated
