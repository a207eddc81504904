"""Banks of a few hundred made-up pairs: pair i is always the same two texts with score i + 0.5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import sparsekd
from sparsekd.bank import ScoreBank, TeacherScores, text_keys

Keys = npt.NDArray[np.uint64]
PASSAGES_PER_QUERY = 20


class Sample:
    """A bank folder and what is put into it."""

    identity: dict[str, Any] = {"kind": "dense", "weights": {"model.safetensors": "00ff"}, "max_length": 128}  # noqa: RUF012
    other_identity: dict[str, Any] = {**identity, "max_length": 256}  # noqa: RUF012

    def __init__(self, root: Path) -> None:
        self.root = root

    def pairs(self, numbers: npt.ArrayLike) -> tuple[Keys, Keys, npt.NDArray[np.float32]]:
        """Return query keys, passage keys and scores of the numbered pairs."""
        rows = np.asarray(numbers, dtype=np.int64)
        query_keys = text_keys(f"query {row // PASSAGES_PER_QUERY}" for row in rows)
        return query_keys, text_keys(f"passage {row % 97}" for row in rows), rows.astype(np.float32) + np.float32(0.5)

    def answers(self, scores: TeacherScores, numbers: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Look the numbered pairs up."""
        query_keys, passage_keys, _ = self.pairs(numbers)
        return scores.lookup(query_keys, passage_keys)

    def open(self, identity: dict[str, Any] | None = None) -> TeacherScores:
        """Open the teacher's scores as another process would."""
        return ScoreBank(self.root).open(identity or self.identity)

    def fill(self, identity: dict[str, Any] | None = None, *, add: float = 0.0) -> TeacherScores:
        """Store 300 pairs in 3 segments and open them."""
        scores = ScoreBank(self.root, max_segment_pairs=100).open(identity or self.identity)  # full segments are not merged
        query_keys, passage_keys, gold_sim = self.pairs(np.arange(300))
        scores.append(query_keys, passage_keys, gold_sim + np.float32(add))
        return self.open(identity)

    def segments(self, scores: TeacherScores) -> list[Path]:
        """Return the segment files by name."""
        return sorted(scores.folder.glob("*.arrow"))

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Run fill_bank.py in a process of its own."""
        command = [sys.executable, str(Path(__file__).with_name("fill_bank.py")), str(self.root), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._environment())

    def modules(self, code: str) -> set[str]:
        """Return the top-level modules that a fresh process has imported after ``code``."""
        code = code.format(root=self.root) + "; print('modules', *sorted({name.split('.')[0] for name in sys.modules}))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=self._environment())
        return set(done.stdout.splitlines()[-1].split()[1:])

    def _environment(self) -> dict[str, str]:
        paths = [str(Path(sparsekd.__file__).parents[1]), str(Path(__file__).parent)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return Sample(tmp_path / "cache" / "bank")
