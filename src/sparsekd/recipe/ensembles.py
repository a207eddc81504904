"""Which calibrations of teachers a recipe may name: refused before a teacher is paid, with the reason and what would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsekd.recipe.sections import Calibration, Recipe

TABLE_WIDE = ("raw", "zscore", "affine")
"""Kinds that move all scores of a table alike, so that rows keep their contrast: the only ones that rescale combined scores."""


def check_calibrations(recipe: Recipe) -> None:
    """Raise ValueError unless calibrations name teachers, references give affine its numbers, and rescale moves a table whole."""
    names = [teacher.name for teacher in recipe.teachers]
    for name in recipe.labels.calibrations:
        if name not in names:
            raise ValueError(f"[labels] calibrations names {name!r}, which is no teacher; expected one of {names}")
    for section, calibration in _sections(recipe):
        _check_reference(section, calibration, names)
    rescale = recipe.labels.rescale
    if rescale.kind not in TABLE_WIDE:
        kinds = " or ".join(f'"{kind}"' for kind in TABLE_WIDE)
        raise ValueError(
            f'[labels.rescale] kind = "{rescale.kind}" is for one teacher\'s scores; combined scores take {kinds}: '
            "set one of them, or move the section to [labels.calibration]"
        )


def _sections(recipe: Recipe) -> Iterator[tuple[str, Calibration]]:
    labels = recipe.labels
    yield "labels.calibration", labels.calibration
    yield from ((f"labels.calibrations.{name}", calibration) for name, calibration in labels.calibrations.items())
    yield "labels.rescale", labels.rescale


def _check_reference(section: str, calibration: Calibration, names: list[str]) -> None:
    reference = calibration.reference
    if reference is None:
        return
    if calibration.kind != "affine":
        raise ValueError(
            f'[{section}] reference = {reference!r} acts on kind = "affine" only, not on "{calibration.kind}"; '
            'set kind = "affine" or remove the key'
        )
    if reference not in names:
        raise ValueError(f"[{section}] reference = {reference!r} is no teacher; expected one of {names}")
    for key, default in (("mean", 0.0), ("std", 1.0)):
        value = getattr(calibration, key)
        if value != default:
            raise ValueError(
                f"[{section}] {key} = {value!r} beside reference = {reference!r}, which gives mean and std; remove one of the two"
            )
