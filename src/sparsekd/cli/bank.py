"""``sparsekd bank``: shows, verifies, repairs and sweeps the score bank and the embedding banks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsekd.artifact import IntegrityError, differing_fields
from sparsekd.bank import upkeep
from sparsekd.bank.manifest import Manifest, read_identity, read_manifest, read_reference
from sparsekd.cli.columns import columns, printable, size
from sparsekd.cli.errors import one_line_errors
from sparsekd.cli.settings import DEFAULT_CACHE, LOOK, Cache

bank = typer.Typer(**LOOK)

Key = Annotated[str, typer.Argument(help="Key of a teacher or encoder, or the beginning of it.")]
OptionalKey = Annotated[str | None, typer.Argument(help="Key, or the beginning of it; all without.")]


@bank.command("ls")
def list_bank(cache: Cache = DEFAULT_CACHE) -> None:
    """List teachers and encoders and how much they hold."""
    with one_line_errors():
        rows = [_summary(folder) for folder in upkeep.bank_folders(_root(cache))]
        header = ("bank", "key", "kind", "model", "rows", "size", "segments", "")
        typer.echo(columns([header, *rows]))


@bank.command()
def info(key: Key, cache: Cache = DEFAULT_CACHE) -> None:
    """Print one folder's identity and segments."""
    with one_line_errors():
        folder = upkeep.find_folder(_root(cache), key)
        manifest = read_manifest(folder)
        typer.echo(f"{folder}\n{_counts(manifest)} in {len(manifest.segments)} segments\n")
        identity = json.dumps(read_identity(folder), indent=2, sort_keys=True, ensure_ascii=False)
        typer.echo("\n".join(printable(line) for line in identity.split("\n")) + "\n")
        rows = [(entry.name, f"{entry.rows:,}", size(entry.bytes)) for entry in manifest.segments]
        typer.echo(columns([("segment", "rows", "size"), *rows]))


@bank.command()
def verify(key: OptionalKey = None, cache: Cache = DEFAULT_CACHE) -> None:
    """Read every byte; exit 1 if anything is damaged."""
    with one_line_errors():
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
    with one_line_errors():
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
    with one_line_errors():
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
    with one_line_errors():
        folders = [upkeep.find_folder(_root(cache), key) for key in (a, b)]
        changed = differing_fields(read_identity(folders[0]), read_identity(folders[1]))
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
        rows = [(field, json.dumps(left), json.dumps(right)) for field, (left, right) in changed.items()]
        typer.echo(columns([("field", *names), *rows]) if rows else f"{names[0]} and {names[1]} have the same identity")


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
    figures = (f"{manifest.num_rows:,}", size(manifest.num_bytes), str(len(manifest.segments)), "")
    return (*where, str(identity.get("kind", "")), read_reference(folder) or "-", *figures)


def _counts(manifest: Manifest) -> str:
    return f"{manifest.num_rows:,} {'pairs' if manifest.kind == 'scores' else 'vectors'}, {size(manifest.num_bytes)}"
