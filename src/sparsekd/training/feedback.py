"""One side's feedback from active dims to lambda: a filter, a path and a PI controller. Plain numbers, no torch, no trainer.

What it controls: a student under Adam whose learning rates are known beforehand (``Plan``). What it promises: the same inputs give
the same lambdas, and its whole state is a flat dataclass of numbers (``Feedback``) that survives JSON to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Adam and gradient clipping turn lambda's size into a direction only: log active dims answer log pressure like an integrator, some
# 15 steps late. Chosen on a small model (200 active dims to 40 .. 100 in 120 .. 400 steps, two losses, first guesses 100 times off)
# by the mean distance from the budget at the end, which was 3%, 8% at most; and tried on nfcorpus. There with a gain of 2.5, or
# looking 20 ahead, or with a smoothing of .2: 4 to 6%, 10 to 20% at most, and swings on the way. A Kalman filter that
# learns the response did no better there and swung more on nfcorpus.
_GAIN = 2.0  # in log pressure, per e-fold of active dims above the path
_INTEGRAL_STEPS = 40.0  # steps after which a constant error has counted once more
_AHEAD_STEPS = 25  # Adam's first moment carries a change for 10 steps, the smoothing hides it for 10 more
SMOOTHING = 0.2
"""Share of a new measurement in the smoothed active dims: log dims of 32 passages vary by .05 from batch to batch."""
_SCALE_SMOOTHING = 0.1  # of main loss / penalty
_LARGEST_ERROR = 1.0  # more says no more than "far off", and would wind the integral up
# Of log pressure in one step. Dims are lost within few steps, sooner than the smoothing shows, and come back slowly.
_LARGEST_RISE = 0.15
_LARGEST_FALL = 0.5
_LEAST_RATE = 0.3  # the gain grows as the learning rate falls, down to this share of its peak
# Pressure is lambda · penalty / main loss. Above 3 the main loss has no say in the direction any more and dims fall no faster;
# below .003 the penalty has none.
_PRESSURES = (math.log(3e-3), math.log(3.0))
_FIRST_PRESSURES = (math.log(0.01), math.log(0.3))  # a first guess outside of these is moved to the nearer
MEMORY = 3
"""Calibrations that count: the level of noisy batches, which a calibration is compared with, is further off than that is."""


class Plan:
    """What a run knows before its first step: its learning rates, and when the path reaches the budget."""

    def __init__(self, rates: Sequence[float], warmup_steps: int) -> None:
        """``rates``: learning rate of each step divided by their peak; ``warmup_steps``: where the path ends."""
        self.num_steps = len(rates)
        self.first = min(max(2, self.num_steps // 50), max(warmup_steps - 1, 0))
        """The last step whose batch decides where the path starts."""
        self._rates = list(rates)
        self._spent = [0.0, *itertools.accumulate(rates)]
        self._end = max(warmup_steps, self.first + 1)

    def rate(self, step: int) -> float:
        """Relative learning rate of ``step``; 0 outside the run."""
        return self._rates[step] if 0 <= step < self.num_steps else 0.0

    def rate_between(self, step: int, later: int) -> float:
        """Sum of the relative learning rates of ``step`` to ``later`` − 1."""
        return self._spent[min(later, self.num_steps)] - self._spent[min(step, self.num_steps)]

    def progress(self, step: int) -> float:
        """Share of the path that lies behind at ``step``: of the learning rate spent on it, since dims move only as that allows."""
        if step >= self._end:
            return 1.0
        whole = self.rate_between(self.first, self._end)
        return self.rate_between(self.first, step) / whole if step > self.first and whole else 0.0


@dataclass
class Feedback:
    """Steers one side's lambda so that its active dims go down to ``budget`` and stay there. y is the log of active dims.

    An alpha-beta filter (Benedict and Bordner 1962) follows y and how fast it changes per unit of relative learning rate. The error
    is the y expected 25 steps ahead at this speed, minus the path's there; learning rates to come are known, so the look ahead
    shrinks as they do. A PI controller turns it into log pressure, pressure = lambda · penalty / main loss: unlike lambda it means
    the same for every loss, label scale and sparsity, so that a first guess of lambda that is wrong by any factor costs little.
    """

    budget: float
    guess: float
    """Lambda of the first step; then only where pressure starts."""
    pressure: float | None = None
    """Log of lambda · penalty / main loss; None before the first batch."""
    integral: float = 0.0
    """Log pressure where the error is 0."""
    scale: float | None = None
    """Smoothed log(main loss / penalty), from log pressure to log lambda."""
    level: float = 0.0
    """Smoothed y, corrected."""
    slope: float = 0.0
    """Change of y per step at the peak learning rate."""
    correction: float = 0.0
    """log(probe / batch): what is added to y of a batch."""
    start: float = 0.0
    """Where the path starts."""
    smoothing: float = SMOOTHING
    """Share of a new measurement in ``level``."""
    memory: int = MEMORY
    """Calibrations whose mean corrects; 1 where measurements have no noise."""
    last: int = 0
    """The step before whose update active dims were last measured; ``level`` is theirs."""
    num_seen: int = 0
    num_probed: int = 0

    @property
    def weight(self) -> float:
        """Lambda now."""
        return self.guess if self.pressure is None or self.scale is None else math.exp(self.pressure + self.scale)

    @property
    def active_dims(self) -> float | None:
        """Smoothed, corrected active dims; None before the first batch."""
        return math.exp(self.level) if self.num_seen else None

    @property
    def is_idle(self) -> bool:
        """Whether lambda is so low that it hardly counts."""
        return self.pressure is not None and self.pressure <= _PRESSURES[0] / 2

    def observe(self, active_dims: float | None, main: float, penalty: float, step: int, plan: Plan) -> None:
        """Take in what ``step`` (from 0) found before its update, and move lambda.

        ``active_dims``: None where they were not measured in this step. ``main``: the main loss; ``penalty``: the regularizer
        without lambda. Where one of these is not positive the last known ratio stands.
        """
        if active_dims is not None:
            self._follow(_log(active_dims) + self.correction, step, plan)
        if main > 0 and penalty > 0:
            ratio = math.log(main / penalty)
            self.scale = ratio if self.scale is None else self.scale + _SCALE_SMOOTHING * (ratio - self.scale)
        if self.scale is None or not self.num_seen:
            return
        if self.pressure is None:
            self.integral = self.pressure = _clipped(math.log(self.guess) - self.scale, *_FIRST_PRESSURES)
        if step <= plan.first:
            self.start = self.level
        ahead = min(step + _AHEAD_STEPS, plan.num_steps)
        error = self._expected(ahead, plan) - self._path(ahead, plan)
        self._steer(self.pressure, _clipped(error, -_LARGEST_ERROR, _LARGEST_ERROR), max(plan.rate(step + 1), _LEAST_RATE))

    def calibrate(self, active_dims: float, step: int, plan: Plan) -> None:
        """Take in the probe's active dims, measured after the update of ``step``: later measurements are corrected to them."""
        self.num_probed += 1
        change = (_log(active_dims) - self._expected(step + 1, plan)) / min(self.num_probed, self.memory)
        self.correction += change
        self.level += change
        self.start += change

    def _expected(self, step: int, plan: Plan) -> float:
        """Return y before the update of ``step``, drawn out from the last measurement."""
        return self.level + self.slope * plan.rate_between(self.last, step)

    def _steer(self, pressure: float, error: float, rate: float) -> None:
        # Late in the run the same pressure moves dims less. Not so in the warm-up, where nothing is known yet.
        gain = _GAIN / rate if self.num_seen > _INTEGRAL_STEPS / 2 else _GAIN
        wanted = self.integral + gain * error
        allowed = _clipped(wanted, *_PRESSURES)
        if wanted == allowed or (wanted > allowed) == (error < 0):  # at a limit the integral moves away from it only
            self.integral += gain * error / _INTEGRAL_STEPS
        self.pressure = pressure + _clipped(allowed - pressure, -_LARGEST_FALL, _LARGEST_RISE)

    def _follow(self, y: float, step: int, plan: Plan) -> None:
        expected, moved = self._expected(step, plan), plan.rate_between(self.last, step)
        self.num_seen, self.last = self.num_seen + 1, step
        if self.num_seen == 1:
            self.level = y
            return
        self.level = expected + max(self.smoothing, 1 / self.num_seen) * (y - expected)
        # beta = alpha² / (2 − alpha), divided by the rates in between; but for small ones, where slopes are noise, less.
        beta = self.smoothing**2 / (2 - self.smoothing)
        self.slope += beta * (y - expected) * moved / (moved**2 + 0.05)

    def _path(self, step: int, plan: Plan) -> float:
        share = plan.progress(step)
        return (1 - share) * self.start + share * math.log(self.budget)


def _log(active_dims: float) -> float:
    """Log of active dims; of none, minus infinity, that of half a dim: as far from one as two are."""
    return math.log(max(active_dims, 0.5))


def _clipped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
