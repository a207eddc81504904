"""``sparsekd``: what one does beside a recipe. ``sparsekd bank`` shows, verifies, repairs and sweeps the score bank; ``sparsekd
import`` and ``sparsekd export`` exchange teacher scores with other projects.

Exit 0 done, 1 damage found, 2 bad input with one line on stderr. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparsekd.artifact import IntegrityError, differing_fields
from sparsekd.bank import upkeep
from sparsekd.bank.manifest import Manifest, read_identity, read_manifest, read_reference
from sparsekd.exchange.layouts import LAYOUTS, layout_of

_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    context_settings=_SETTINGS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bank = typer.Typer(context_settings=_SETTINGS, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bank, name="bank", help="Show, verify, repair and sweep what teachers and encoders already answered.")

Cache = Annotated[Path, typer.Option("--cache", help="Folder of the bank and of everything made.")]
Key = Annotated[str, typer.Argument(help="Key of a teacher or encoder, or the beginning of it.")]
OptionalKey = Annotated[str | None, typer.Argument(help="Key, or the beginning of it; all without.")]
LayoutName = Annotated[str, typer.Argument(metavar="LAYOUT", help=f"One of {', '.join(LAYOUTS)}.")]
DEFAULT_CACHE = Path("data/cache")
_FIGURE = re.compile(r"([\d,.]+( [kMGT]?B)?)?")


@app.callback()
def sparsekd() -> None:
    """Distil rankers into learned sparse retrievers. Experiments are recipes, run by make; this is what one does beside."""


@app.command("import")
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
    with _one_line_errors():
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


@app.command("export")
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
    with _one_line_errors():
        from sparsekd.exchange import exporting

        num_rows = exporting.export_table(layout_of(layout), table, out, collection=collection, overwrite=overwrite)
        typer.echo(f"{num_rows:,} rows", err=True)
        typer.echo(str(out))


def _stated(fields: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE words as a dictionary; ValueError if one is no such word or a key comes twice."""
    stated: dict[str, str] = {}
    for word in fields:
        key, equals, value = word.partition("=")
        if not key or not equals or key in stated:
            raise ValueError(f"--field {word!r}: expected KEY=VALUE, each key once")
        stated[key] = value
    return stated


@bank.command("ls")
def list_bank(cache: Cache = DEFAULT_CACHE) -> None:
    """List teachers and encoders and how much they hold."""
    with _one_line_errors():
        rows = [_summary(folder) for folder in upkeep.bank_folders(_root(cache))]
        header = ("bank", "key", "kind", "model", "rows", "size", "segments", "")
        typer.echo(_table([header, *rows]))


@bank.command()
def info(key: Key, cache: Cache = DEFAULT_CACHE) -> None:
    """Print one folder's identity and segments."""
    with _one_line_errors():
        folder = upkeep.find_folder(_root(cache), key)
        manifest = read_manifest(folder)
        typer.echo(f"{folder}\n{_counts(manifest)} in {len(manifest.segments)} segments\n")
        typer.echo(json.dumps(read_identity(folder), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        rows = [(entry.name, f"{entry.rows:,}", _size(entry.bytes)) for entry in manifest.segments]
        typer.echo(_table([("segment", "rows", "size"), *rows]))


@bank.command()
def verify(key: OptionalKey = None, cache: Cache = DEFAULT_CACHE) -> None:
    """Read every byte; exit 1 if anything is damaged."""
    with _one_line_errors():
        damaged = False
        for folder in _folders(cache, key):
            damage = upkeep.find_damage(folder)
            damaged = damaged or bool(damage)
            typer.echo("\n".join(damage) if damage else f"{folder}: sound, {_counts(read_manifest(folder))}")
    if damaged:
        raise typer.Exit(1)


@bank.command()
def repair(key: OptionalKey = None, cache: Cache = DEFAULT_CACHE) -> None:
    """Move damaged segments aside, keep the sound ones.

    Only pairs that no sound segment holds are scored again. Nothing is deleted: see the folder damaged/."""
    with _one_line_errors():
        for folder in _folders(cache, key):
            done = upkeep.repair(folder)
            for line in done.taken_out:
                typer.echo(line)
            state = "repaired" if done.taken_out else "sound"
            typer.echo(f"{folder}: {state}, {done.num_segments} segments with {done.num_rows:,} rows")


@bank.command("gc")
def collect_garbage(
    cache: Cache = DEFAULT_CACHE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove what crashed runs left unpublished."""
    with _one_line_errors():
        leftovers = upkeep.find_leftovers(_root(cache))
        for leftover in leftovers:
            if not dry_run:
                upkeep.remove(leftover)
            typer.echo(f"{leftover.path}: {leftover.why}, {leftover.num_bytes:,} bytes")
        total = sum(leftover.num_bytes for leftover in leftovers)
        typer.echo(f"{'would remove' if dry_run else 'removed'} {len(leftovers)} leftovers, {total:,} bytes")


@bank.command()
def explain(
    a: Annotated[str, typer.Argument(help="Key, or the beginning of it.")],
    b: Annotated[str, typer.Argument(help="Key to compare it with.")],
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Say which identity fields of two keys differ."""
    with _one_line_errors():
        folders = [upkeep.find_folder(_root(cache), key) for key in (a, b)]
        changed = differing_fields(read_identity(folders[0]), read_identity(folders[1]))
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
        rows = [(field, json.dumps(left), json.dumps(right)) for field, (left, right) in changed.items()]
        typer.echo(_table([("field", *names), *rows]) if rows else f"{names[0]} and {names[1]} have the same identity")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can meet into one line on stderr and an exit code."""
    try:
        yield
    except IntegrityError as error:
        typer.echo(f"sparsekd: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        typer.echo(f"sparsekd: {error}", err=True)
        raise typer.Exit(2) from error


def _root(cache: Path) -> Path:
    root = cache / "bank"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no bank here; give the cache folder of your recipes with --cache, or score something first"
        )
    return root


def _folders(cache: Path, key: str | None) -> list[Path]:
    root = _root(cache)
    return [upkeep.find_folder(root, key)] if key else upkeep.bank_folders(root)


def _summary(folder: Path) -> tuple[str, ...]:
    """Return a line of ``ls``; a damaged folder is listed as such, its neighbours stay readable."""
    where = (folder.parent.name, folder.name)
    try:
        identity, manifest = read_identity(folder), read_manifest(folder)
    except IntegrityError:
        return (*where, "", read_reference(folder), "", "", "", "DAMAGED: sparsekd bank verify")
    figures = (f"{manifest.num_rows:,}", _size(manifest.num_bytes), str(len(manifest.segments)), "")
    return (*where, str(identity.get("kind", "")), read_reference(folder) or "-", *figures)


def _counts(manifest: Manifest) -> str:
    return f"{manifest.num_rows:,} {'pairs' if manifest.kind == 'scores' else 'vectors'}, {_size(manifest.num_bytes)}"


def _size(num_bytes: int) -> str:
    """Return bytes with three significant digits.

    >>> _size(1_234_567)
    '1.23 MB'
    """
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns; columns of figures align right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    is_figure = [all(_FIGURE.fullmatch(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, is_figure, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
