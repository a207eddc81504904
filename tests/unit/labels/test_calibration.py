from __future__ import annotations

import math

import numpy as np
import pytest

from sparsekd.labels.calibration import (
    affine,
    calibrate,
    constant_rows,
    effective_calibration,
    minmax,
    softmax_entropy,
    weighted_mean,
    zscore,
)
from sparsekd.recipe import Calibration

RAW = np.array([[8.0, 2.0, 5.0], [-1.0, -4.0, 2.0]], dtype=np.float32)  # mean 2, variance (36+0+9+9+36+0)/6 = 15


def test_raw_changes_nothing() -> None:
    np.testing.assert_array_equal(calibrate(RAW, Calibration(scale=7.0)), RAW)


def test_opensearchs_minmax_times_thirty_by_hand() -> None:
    expected = [[30.0, 0.0, 15.0], [15.0, 0.0, 30.0]]

    np.testing.assert_allclose(calibrate(RAW, Calibration(kind="minmax", scale=30.0)), expected)


def test_zscore_takes_mean_and_population_deviation_over_all_rows() -> None:
    root = math.sqrt(15)

    calibrated = calibrate(RAW, Calibration(kind="zscore"))

    np.testing.assert_allclose(calibrated, [[6 / root, 0.0, 3 / root], [-3 / root, -6 / root, 0.0]])
    np.testing.assert_allclose(zscore(RAW.astype(np.float64), 2.0), calibrated * 2)


def test_affine_moves_to_the_reference_mean_and_deviation() -> None:
    calibrated = calibrate(RAW, Calibration(kind="affine", mean=-3.0, std=5.0))

    assert calibrated.mean() == pytest.approx(-3.0)
    assert calibrated.std() == pytest.approx(5.0)
    np.testing.assert_allclose(calibrated[0], [-3 + 30 / math.sqrt(15), -3.0, -3 + 15 / math.sqrt(15)])


def test_zscore_and_affine_keep_the_order_between_queries_and_minmax_does_not() -> None:
    by_teacher = RAW.ravel().argsort().tolist()

    assert zscore(RAW.astype(np.float64), 3.0).ravel().argsort().tolist() == by_teacher
    assert affine(RAW.astype(np.float64), 1.0, 2.0).ravel().argsort().tolist() == by_teacher
    assert minmax(RAW.astype(np.float64), 1.0).ravel().argsort(kind="stable").tolist() != by_teacher


def test_equal_scores_are_refused_where_the_formula_divides_by_their_spread() -> None:
    equal = np.full((3, 2), 4.0)

    with pytest.raises(
        ValueError, match="all 6 scores of the teacher equal 4, so their standard deviation is 0; check the teacher"
    ):
        zscore(equal, 1.0)
    with pytest.raises(ValueError, match="standard deviation is 0"):
        affine(equal, 0.0, 5.0)
    with pytest.raises(ValueError, match="3 of 3 rows have equal scores, for which minmax is undefined"):
        minmax(equal, 1.0)


def test_constant_rows_are_found() -> None:
    assert constant_rows(np.array([[1.0, 1.0], [1.0, 2.0]])).tolist() == [True, False]


def test_the_ensemble_is_the_weighted_mean() -> None:
    first, second = np.array([[2.0, 4.0]]), np.array([[10.0, 0.0]])

    np.testing.assert_allclose(weighted_mean([first, second], [1.0, 1.0]), [[6.0, 2.0]])
    np.testing.assert_allclose(weighted_mean([first, second], [3.0, 1.0]), [[4.0, 3.0]])
    np.testing.assert_allclose(weighted_mean([first], [7.0]), first)


@pytest.mark.parametrize(
    ("settings", "acting"),
    [
        ({"kind": "raw", "scale": 9.0, "mean": 9.0, "std": 9.0}, {"kind": "raw"}),
        ({"kind": "zscore", "scale": 9.0, "mean": 9.0}, {"kind": "zscore", "scale": 9.0}),
        ({"kind": "minmax", "scale": 9.0, "std": 9.0}, {"kind": "minmax", "scale": 9.0}),
        ({"kind": "affine", "scale": 9.0, "mean": 1.0, "std": 2.0}, {"kind": "affine", "mean": 1.0, "std": 2.0}),
    ],
)
def test_only_settings_that_act_are_effective(settings: dict[str, object], acting: dict[str, object]) -> None:
    assert effective_calibration(Calibration.model_validate(settings)) == acting


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_softmax_entropy_equals_the_definition(temperature: float) -> None:
    scores = np.array([[9.5, 6.1, 3.2, -1.0], [0.0, 0.0, 0.0, 0.0]])

    entropy, support = softmax_entropy(scores, temperature)

    powers = [[math.exp(score / temperature) for score in row] for row in scores.tolist()]
    shares = [[power / sum(row) for power in row] for row in powers]
    expected = [-sum(share * math.log(share) for share in row) for row in shares]
    assert entropy == pytest.approx(sum(expected) / 2)
    assert support == pytest.approx(sum(math.exp(value) for value in expected) / 2)


def test_softmax_entropy_survives_scores_that_underflow() -> None:
    assert softmax_entropy(np.array([[1e4, 0.0, -1e4]]), 1.0) == (0.0, 1.0)
