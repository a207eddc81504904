"""What an engine keeps of a weight."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.engines.quantisation import QuantisationLoss, as_feature_values, as_float16, as_impacts

FLOATS = st.floats(min_value=2.0**-20, max_value=2.0**15, width=32)


def test_loss_is_the_hand_worked_one() -> None:
    loss = QuantisationLoss()

    loss.add(np.array([1.0, 2.0], dtype=np.float32), np.array([1.0, 1.5]))
    loss.add(np.array([4.0, 0.5], dtype=np.float32), np.array([5.0, 0.0]))
    loss.add(np.array([0.25], dtype=np.float32), np.array([0.0]))
    loss.add(np.array([], dtype=np.float32), np.array([]))

    assert loss.summary() == {
        "passages": 4,
        "empty_passages": 2,
        "weights": 5,
        "lost_to_zero": 0.4,
        "mean_relative_error": pytest.approx((0.25 + 0.25 + 1 + 1) / 5),
        "max_relative_error": 1.0,
    }


def test_no_weights_lose_nothing() -> None:
    assert set(QuantisationLoss().summary().values()) == {0}


def test_impacts_round_to_the_nearest_integer() -> None:
    weights = np.array([0.0049, 0.0051, 1.0, 2.3449, 3.14159], dtype=np.float32)

    assert as_impacts(weights).tolist() == [0, 1, 100, 234, 314]


@given(FLOATS)
def test_feature_values_are_those_of_java_bits(value: float) -> None:
    (bits,) = struct.unpack(">I", struct.pack(">f", value))

    (expected,) = struct.unpack(">f", struct.pack(">I", (bits >> 15) << 15))

    assert as_feature_values(np.array([value], dtype=np.float32)).tolist() == [expected]
    assert 0 <= (value - expected) / value < 2**-8


def test_weights_below_the_smallest_normal_float_are_lost() -> None:
    weights = np.array([1e-39, 1.1754944e-38], dtype=np.float32)

    assert as_feature_values(weights).tolist() == [0.0, np.float32(1.1754944e-38)]


def test_a_weight_above_half_precision_is_refused() -> None:
    assert as_float16(np.array([65504], dtype=np.float32)).tolist() == [65504]
    with pytest.raises(ValueError, match="weight 70000: the engine holds half-precision weights, at most 65504"):
        as_float16(np.array([1, 70000], dtype=np.float32))
