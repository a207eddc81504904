"""Imported scores as a teacher: what the bank holds under a stated identity, and nothing else. Imports no torch.

It scores no pair. Those that were not imported are an error that says how many there are (never 0, never a mean), unless the
recipe lets other teachers take their weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.recipe import FileTeacher
from sparsekd.teachers.identity import file_identity

_SHOWN = 3


class FileScorer:
    """Knows no pair that the bank does not know; a Scorer."""

    def __init__(self, teacher: FileTeacher) -> None:
        self.num_truncated = 0
        self._teacher = teacher

    @property
    def identity(self) -> dict[str, Any]:
        """The name and fields the scores were imported under; the key of the score bank."""
        return file_identity(self._teacher.imported, self._teacher.fields)

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Raise ValueError: whatever is asked here was not imported."""
        query, passage = pairs[0]
        raise ValueError(
            f"teacher {self._teacher.name!r}: {len(pairs)} pairs were not imported (first: query {query[:80]!r}, passage "
            f"{passage[:80]!r}); import their scores with sparsekd import"
        )


def require_imported(
    teacher: FileTeacher, folder: Path, gold_sim: NDArray[np.float32], query_ids: Sequence[str], passage_ids: Sequence[str]
) -> None:
    """Raise ValueError, naming how many and the first ids, unless every pair has a score; ``folder`` is where they are banked."""
    missing = np.flatnonzero(np.isnan(gold_sim))
    if missing.size:
        first = "; ".join(f"query {query_ids[row]!r}, passage {passage_ids[row]!r}" for row in missing[:_SHOWN].tolist())
        stated = f"--name {teacher.imported}" + "".join(f" --field {name}={value}" for name, value in teacher.fields.items())
        raise ValueError(
            f"teacher {teacher.name!r}: {missing.size:,} of {len(gold_sim):,} pairs have no score among those imported as "
            f"{stated} ({folder}; first: {first}); import a file that has them with sparsekd import ... {stated}, or mine passages "
            "that it has scored"
        )
