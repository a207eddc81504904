"""A study: experiments that differ from one recipe in a few keys, over one collection, one evaluation and one bank.

A member is a list of ``section.key=value`` overrides, written as after ``--set``. Members are validated like any recipe, all before
the first one runs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsekd.recipe.section import Section

if TYPE_CHECKING:
    from sparsekd.recipe.sections import Recipe

SECTIONS = ("mining", "teachers", "labels", "student", "training")
"""What members may differ in: under another collection or evaluation their figures would not compare."""


_Overrides = Annotated[tuple[str, ...], Field(strict=False)]  # a list in TOML


class Study(Section):
    """Which experiments a study has: every combination of the grid, then the members listed."""

    grid: tuple[_Overrides, ...] = Field(default=(), strict=False)
    """Axes; each is a list of overrides of which a member takes one, e.g. ``["labels.num_negatives=2", "labels.num_negatives=4"]``.
    An override that is empty leaves that axis as the recipe has it."""
    members: tuple[_Overrides, ...] = Field(default=(), strict=False)
    """Lists of overrides; ``[]`` is the recipe as it stands."""

    @property
    def overrides(self) -> list[tuple[str, ...]]:
        """Overrides of each member, in the order in which they run."""
        combined = itertools.product(*self.grid) if self.grid else []
        return [tuple(filter(None, overrides)) for overrides in combined] + list(self.members)


@dataclass(frozen=True)
class Member:
    """One experiment of a study."""

    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its overrides, as they are written; what it is called on pages and in logs."""
        return " ".join(self.overrides) or "the recipe as it stands"
