"""Bootstrap intervals and p-values against a second formula, the t-test, and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sparsekd.evaluation.significance import bootstrap


def test_the_interval_is_that_of_resampling_row_by_row() -> None:
    values_QK = np.random.default_rng(1).random((23, 2))

    [first, second] = bootstrap(values_QK, num_resamples=400, seed=7)

    rng = np.random.default_rng(7)
    means_BK = np.array([values_QK[row].mean(axis=0) for row in rng.integers(23, size=(400, 23))])
    for estimate, column, means in zip((first, second), values_QK.T, means_BK.T, strict=True):
        assert estimate.mean == pytest.approx(column.mean())
        assert [estimate.low, estimate.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
        assert estimate.p_value == np.mean(np.abs(means - column.mean()) >= column.mean())


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_p_values_and_intervals_agree_with_the_t_test_for_many_queries(shift: float) -> None:
    differences = np.random.default_rng(2).normal(shift, 0.3, size=500)

    [estimate] = bootstrap(differences[:, None])

    t_test = scipy.stats.ttest_1samp(differences, 0.0)
    assert estimate.p_value == pytest.approx(t_test.pvalue, abs=0.02)
    interval = t_test.confidence_interval(0.95)
    assert [estimate.low, estimate.high] == pytest.approx([interval.low, interval.high], abs=0.004)


def test_two_equal_systems_do_not_differ() -> None:
    [estimate] = bootstrap(np.zeros((10, 1)))

    assert (estimate.mean, estimate.low, estimate.high, estimate.p_value) == (0, 0, 0, 1)
    assert not estimate.is_significant


def test_a_difference_and_its_negation_mirror_each_other() -> None:
    values = np.random.default_rng(3).normal(0.1, 1, size=(40, 1))

    [one], [other] = bootstrap(values), bootstrap(-values)

    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.p_value == other.p_value


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random((30, 1))
    whole = bootstrap(values, num_resamples=100)

    monkeypatch.setattr("sparsekd.evaluation.significance._BLOCK", 90)

    [part], [expected] = bootstrap(values, num_resamples=100), whole
    assert (part.mean, part.low, part.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_no_query_is_refused() -> None:
    with pytest.raises(ValueError, match="no query; expected at least one"):
        bootstrap(np.zeros((0, 1)))
