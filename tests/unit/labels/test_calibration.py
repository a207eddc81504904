from __future__ import annotations

import math

import numpy as np
import pytest

from sparsekd.labels.calibration import (
    affine,
    calibrate,
    constant_rows,
    effective_calibration,
    lone_rows,
    minmax,
    moments,
    percentile,
    rank,
    softmax_entropy,
    undefined_rows,
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


def test_affine_takes_the_moments_of_a_reference_before_the_numbers_stated() -> None:
    reference = moments(np.array([[1.0, 5.0]]))  # mean 3, deviation 2

    calibrated = calibrate(RAW, Calibration(kind="affine", mean=99.0, std=99.0), reference)

    np.testing.assert_allclose(calibrated, affine(RAW.astype(np.float64), 3.0, 2.0))
    np.testing.assert_allclose([calibrated.mean(), calibrated.std()], [3.0, 2.0])


def test_rank_is_the_share_of_the_other_passages_below_by_hand() -> None:
    calibrated = calibrate(RAW, Calibration(kind="rank", scale=4.0))

    assert calibrated.tolist() == [[4.0, 0.0, 2.0], [2.0, 0.0, 4.0]]


def test_rank_gives_ties_the_mean_of_their_places() -> None:
    assert rank(np.array([[5.0, 5.0, 1.0, 9.0, 5.0]]), 1.0).tolist() == [[0.5, 0.5, 0.0, 1.0, 0.5]]
    assert rank(np.array([[2.0, 2.0, 2.0]]), 6.0).tolist() == [[3.0, 3.0, 3.0]]
    assert rank(np.array([[8.0, 2.0], [2.0, 2.0]]), 1.0).tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_percentile_is_the_share_of_positives_at_or_below_by_hand() -> None:
    scores = np.array([[4.0, 1.0, 3.0], [1.0, 0.5, 4.0], [1.0, 9.0, 3.9], [8.0, 7.9, -2.0]])  # positives 1 1 4 8

    calibrated = calibrate(scores, Calibration(kind="percentile", scale=100.0))

    assert calibrated.tolist() == [[75.0, 50.0, 50.0], [50.0, 0.0, 75.0], [50.0, 100.0, 50.0], [100.0, 75.0, 0.0]]


def test_percentile_of_equal_positives_is_a_step() -> None:
    assert percentile(np.array([[4.0, 4.1], [4.0, 3.9]]), 1.0).tolist() == [[1.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("kind", ["raw", "zscore", "minmax", "affine", "rank", "percentile"])
def test_a_pair_not_scored_stays_so_and_enters_no_statistic(kind: str) -> None:
    calibration = Calibration.model_validate({"kind": kind, "scale": 3.0, "mean": 1.0, "std": 2.0})
    full = np.array([[8.0, 2.0, 5.0], [-1.0, -4.0, 2.0]])

    holed = calibrate(np.insert(full, 1, np.nan, axis=1), calibration)

    assert np.isnan(holed[:, 1]).all()
    np.testing.assert_allclose(np.delete(holed, 1, axis=1), calibrate(full, calibration))


@pytest.mark.parametrize("kind", ["minmax", "rank"])
def test_a_row_without_any_score_stays_so_and_a_row_of_one_is_undefined(kind: str) -> None:
    calibration = Calibration.model_validate({"kind": kind})
    empty = np.array([[np.nan, np.nan], [2.0, 1.0]])
    lone = np.array([[np.nan, 7.0], [2.0, 1.0]])

    np.testing.assert_array_equal(calibrate(empty, calibration), [[np.nan, np.nan], [1.0, 0.0]])
    assert undefined_rows(empty, calibration).tolist() == [False, False]
    assert undefined_rows(lone, calibration).tolist() == [True, False]
    with pytest.raises(ValueError, match=f"1 of 2 rows have .*, for which {kind} is undefined"):
        calibrate(lone, calibration)


def test_a_query_of_a_single_candidate_has_no_order_and_keeps_its_score_elsewhere() -> None:
    single = np.array([[7.0], [5.0]])

    assert lone_rows(single).tolist() == constant_rows(single).tolist() == [True, True]
    with pytest.raises(ValueError, match="2 of 2 rows have one score only, for which rank is undefined"):
        rank(single, 1.0)
    assert zscore(single, 1.0).tolist() == [[1.0], [-1.0]]
    assert percentile(single, 1.0).tolist() == [[1.0], [0.5]]


def test_equal_scores_are_found_whatever_their_mean_rounds_to() -> None:
    equal = np.full((1, 3), 0.1)
    assert equal.std() > 0  # the mean of three 0.1 is not 0.1

    with pytest.raises(ValueError, match=r"all 3 scores of the teacher equal 0\.1"):
        zscore(equal, 1.0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zscore", "the teacher has scored none of 2 pairs; score them first"),
        ("percentile", "the teacher has scored none of 1 positives, for which percentile is undefined"),
    ],
)
def test_no_score_at_all_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(np.full((1, 2), np.nan), Calibration.model_validate({"kind": kind}))


def test_weights_are_shared_out_among_the_teachers_that_have_scored() -> None:
    first, second, third = np.array([[2.0, 4.0, 6.0]]), np.array([[10.0, np.nan, 0.0]]), np.array([[0.0, 8.0, np.nan]])

    combined = weighted_mean([first, second, third], [2.0, 1.0, 1.0])

    # (2·2 + 10 + 0) / 4, (2·4 + 8) / 3, (2·6 + 0) / 3
    np.testing.assert_allclose(combined, [[3.5, 16 / 3, 4.0]])


def test_a_pair_that_no_teacher_has_scored_has_no_mean() -> None:
    with pytest.raises(ValueError, match="1 of 2 pairs have no score by any teacher; score them first"):
        weighted_mean([np.array([[2.0, np.nan]]), np.array([[np.nan, np.nan]])], [1.0, 1.0])


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
        ({"kind": "rank", "scale": 9.0, "std": 2.0}, {"kind": "rank", "scale": 9.0}),
        ({"kind": "percentile", "scale": 9.0, "mean": 2.0}, {"kind": "percentile", "scale": 9.0}),
    ],
)
def test_only_settings_that_act_are_effective(settings: dict[str, object], acting: dict[str, object]) -> None:
    assert effective_calibration(Calibration.model_validate(settings)) == acting


def test_a_reference_is_named_by_the_key_of_its_identity() -> None:
    calibration = Calibration(kind="affine", reference="judge")

    assert effective_calibration(calibration, {"judge": "0123"}) == {"kind": "affine", "reference": "0123"}


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
