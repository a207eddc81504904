from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from sparsekd.labels import agreement
from sparsekd.labels.agreement import kendall_tau


@pytest.mark.parametrize(
    ("second", "tau"),
    [
        ([1.0, 2.0, 3.0], 1.0),
        ([3.0, 2.0, 1.0], -1.0),
        ([1.0, 3.0, 2.0], 1 / 3),  # 2 of 3 pairs in the same order, 1 against
        ([1.0, 1.0, 2.0], 2 / np.sqrt(3 * 2)),  # 2 pairs in the same order; 3 decided by one teacher, 2 by the other
    ],
)
def test_tau_b_by_hand(second: list[float], tau: float) -> None:
    assert kendall_tau(np.array([[1.0, 2.0, 3.0]]), np.array([second])).tolist() == pytest.approx([tau])


def test_a_teacher_that_ties_all_passages_agrees_with_no_order() -> None:
    ties, order = np.array([[4.0, 4.0], [1.0, 2.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])

    assert np.isnan(kendall_tau(ties, order)).tolist() == [True, False]
    assert np.isnan(kendall_tau(np.array([[7.0]]), np.array([[7.0]]))).all()


def test_tau_equals_scipys_query_by_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_COMPARISONS_PER_BLOCK", 200)  # several queries a block, several blocks
    generator = np.random.default_rng(0)
    first_QN, second_QN = generator.integers(0, 6, (2, 50, 7)).astype(np.float32)

    expected = [kendalltau(first, second).statistic for first, second in zip(first_QN, second_QN, strict=True)]
    np.testing.assert_allclose(kendall_tau(first_QN, second_QN), expected)


def test_passages_that_one_teacher_has_not_scored_are_left_out() -> None:
    first, second = np.array([[1.0, 2.0, np.nan, 3.0, 0.0]]), np.array([[1.0, 3.0, -9.0, 2.0, np.nan]])

    np.testing.assert_allclose(kendall_tau(first, second), [1 / 3])
