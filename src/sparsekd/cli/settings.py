"""What every command shares: its look, and where the cache is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

LOOK: dict[str, Any] = {
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "no_args_is_help": True,
    "rich_markup_mode": None,
}
Cache = Annotated[Path, typer.Option("--cache", help="Folder of the bank and of everything made.")]
DEFAULT_CACHE = Path("data/cache")
