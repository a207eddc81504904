"""What is in quarantine is left out of a row, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekd.labels.complete import complete
from sparsekd.mining.candidates import CandidateRow

ROWS = [
    CandidateRow("q0", ["p0", "p1"], ["p2", "p3"], ["bm25", "dense"], [2.0, 1.0], [1, 1]),
    CandidateRow("q1", ["p2"], ["p0", "p4"], ["bm25", "bm25"], [3.0, 2.5], [1, 2]),
]


def known_but(*missing: tuple[str, str, str]) -> object:
    def gold_sim(teacher: str, query_ids: Sequence[str], passage_ids: Sequence[str]) -> NDArray[np.float32]:
        pairs = zip(query_ids, passage_ids, strict=True)
        return np.array([np.nan if (teacher, *pair) in missing else 1.0 for pair in pairs], dtype=np.float32)

    return gold_sim


def test_rows_whose_pairs_are_all_scored_are_what_they_were() -> None:
    rows = complete(ROWS, known_but(("other", "q0", "p0")), ["judge"])  # type: ignore[arg-type]

    assert (list(rows), list(rows), rows.missing) == (ROWS, ROWS, frozenset())


@pytest.mark.parametrize("teacher", ["judge", "second"])
def test_a_candidate_that_a_teacher_did_not_survive_leaves_its_row_with_all_that_stands_beside_it(teacher: str) -> None:
    rows = complete(ROWS, known_but((teacher, "q0", "p2")), ["judge", "second"])  # type: ignore[arg-type]

    assert list(rows) == [CandidateRow("q0", ["p0", "p1"], ["p3"], ["dense"], [1.0], [1]), ROWS[1]]
    assert rows.missing == {("q0", "p2")}


def test_a_positive_leaves_too_and_a_row_without_any_is_no_row() -> None:
    rows = complete(ROWS, known_but(("judge", "q0", "p0"), ("judge", "q1", "p2")), ["judge"])  # type: ignore[arg-type]

    assert list(rows) == [CandidateRow("q0", ["p1"], ["p2", "p3"], ["bm25", "dense"], [2.0, 1.0], [1, 1])]
