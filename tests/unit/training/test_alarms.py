"""A collapsed student stops the run, with the side, what was measured, the band and what to change."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from sparsekd.training.alarms import CollapseAlarm, CollapseError

STEPS, PATIENCE = 90, 5
ARGUMENTS: Any = SimpleNamespace()
HEALTHY = {"active_dims": 50.0, "zero_rows": 0.0, "full_share": 0.0}


def make_alarm(**settings: Any) -> tuple[CollapseAlarm, Any]:
    regularizers = {f"{name}_regularizer": SimpleNamespace(**HEALTHY) for name in ("query", "document")}
    loss: Any = SimpleNamespace(**regularizers, query_regularizer_weight=0.1, document_regularizer_weight=0.08)
    return CollapseAlarm(loss, vocabulary_size=1000, patience=PATIENCE, **settings), loss


def steps(alarm: CollapseAlarm, first: int, last: int) -> None:
    for step in range(first, last + 1):
        alarm.on_step_end(ARGUMENTS, TrainerState(max_steps=STEPS, global_step=step), TrainerControl())


@pytest.mark.parametrize(
    ("side", "name", "measured", "message"),
    [
        ("query", "zero_rows", 0.75, "75% of the rows are all-zero, expected at most 50%"),
        ("passage", "active_dims", 0.4, r"0.4 active dims, expected at least 1 \(\[training\] min_active_dims\)"),
        ("passage", "active_dims", 501.0, r"501 active dims, expected at most 500, 0.5 of 1000 \(\[training\] max_active_share\)"),
        ("query", "full_share", 0.6, "60% of the rows have every dim active, expected at most 50%"),
    ],
)
def test_the_run_stops_after_patience_steps_and_says_why(side: str, name: str, measured: float, message: str) -> None:
    alarm, loss = make_alarm()
    steps(alarm, 1, 40)
    setattr(loss.query_regularizer if side == "query" else loss.document_regularizer, name, measured)
    steps(alarm, 41, 40 + PATIENCE - 1)

    expected = f"step 45: {side} vectors have left the healthy band: {message}, for 5 steps in a row"
    with pytest.raises(CollapseError, match=expected) as caught:
        steps(alarm, 45, 45)

    weight = {"query": "0.1", "passage": "0.08"}[side]
    assert f"lambda_{side} is {weight} now. Try: " in str(caught.value)
    direction = "lower" if measured < 1 and name != "full_share" else "raise"
    assert f"Try: {direction} lambda_{side}" in str(caught.value)


def test_one_healthy_step_starts_the_count_anew() -> None:
    alarm, loss = make_alarm()

    for step in range(1, STEPS + 1):
        loss.query_regularizer.active_dims = 50.0 if step % PATIENCE == 0 else 0.0
        steps(alarm, step, step)

    assert alarm.steps_outside == {}


@pytest.mark.parametrize(("name", "measured"), [("active_dims", 999.0), ("full_share", 1.0)])
def test_a_full_vector_is_no_collapse_before_lambda_is_warm(name: str, measured: float) -> None:
    alarm, loss = make_alarm()
    setattr(loss.document_regularizer, name, measured)

    steps(alarm, 1, STEPS // 3 + PATIENCE - 1)
    with pytest.raises(CollapseError, match="step 35: passage"):
        steps(alarm, 35, 35)


def test_a_side_that_is_not_watched_never_stops_the_run() -> None:
    alarm, loss = make_alarm(sides=("passage",))
    loss.query_regularizer.active_dims = 0.0

    steps(alarm, 1, STEPS)

    assert alarm.steps_outside == {}


def test_the_count_survives_resume() -> None:
    alarm, loss = make_alarm()
    loss.query_regularizer.active_dims = 0.0
    steps(alarm, 1, PATIENCE - 1)
    saved = json.loads(json.dumps({"CollapseAlarm": alarm.state()}))

    resumed, loss = make_alarm()
    loss.query_regularizer.active_dims = 0.0
    state = TrainerState(max_steps=STEPS, global_step=PATIENCE - 1, stateful_callbacks=saved)
    resumed.on_train_begin(ARGUMENTS, state, TrainerControl())

    with pytest.raises(CollapseError, match="step 5: query vectors have left the healthy band: 0 active dims"):
        steps(resumed, PATIENCE, PATIENCE)
