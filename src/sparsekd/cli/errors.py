"""How the command line says what went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from sparsekd.artifact import IntegrityError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can meet into one line on stderr and an exit code."""
    try:
        yield
    except IntegrityError as error:
        typer.echo(f"sparsekd: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        typer.echo(f"sparsekd: {error}", err=True)
        raise typer.Exit(2) from error
