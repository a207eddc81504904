"""What becomes of workers, whoever starts them: done, refused, failed, killed now and then, killed for ever."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import pytest

from sparsekd.bank.sharing import DEATHS, QuarantineError
from sparsekd.runners import Ended, WorkersError, supervise


class Scripted:
    """Workers that end as they are told to, one after another."""

    def __init__(self, ends: Iterable[Ended]) -> None:
        self.ends: Iterator[Ended] = iter(ends)
        self.started: list[int] = []
        self.left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.left = True

    def start(self, number: int) -> None:
        self.started.append(number)

    def next_end(self) -> Ended:
        return next(self.ends)


def killed(number: int) -> Ended:
    return Ended(number, killed=True, message="SIGKILL")


def always_new() -> object:
    return object()


def test_every_worker_is_started_once_and_followed_to_its_end() -> None:
    workers = Scripted([Ended(1), Ended(0), Ended(2)])

    supervise(workers, 3, lambda: ())

    assert workers.started == [0, 1, 2]
    assert workers.left


def test_who_was_killed_is_started_again_with_its_number() -> None:
    workers = Scripted([killed(1), Ended(0), killed(1), Ended(1)])

    supervise(workers, 2, lambda: ())

    assert workers.started == [0, 1, 1, 1]


def test_deaths_that_leave_no_trace_in_the_bank_end_the_run() -> None:
    workers = Scripted([killed(0)] * DEATHS)

    with pytest.raises(WorkersError, match=r"worker 0 was killed \(SIGKILL\); 3 so far, and the work does not go on"):
        supervise(workers, 1, lambda: ())

    assert workers.started == [0] * DEATHS
    assert workers.left


def test_deaths_that_the_bank_has_counted_do_not() -> None:
    workers = Scripted([killed(0)] * 20 + [Ended(0)])

    supervise(workers, 1, always_new)

    assert workers.started == [0] * 21


def test_there_is_an_end_to_deaths_all_the_same() -> None:
    workers = Scripted(killed(0) for _ in range(1_000))

    with pytest.raises(WorkersError, match="200 so far"):
        supervise(workers, 1, always_new)


def test_a_refusal_is_raised_as_if_there_were_no_workers_and_ends_the_others() -> None:
    workers = Scripted([Ended(1, "ValueError", "recipe: that is none")])

    with pytest.raises(ValueError, match=r"^recipe: that is none$"):
        supervise(workers, 2, lambda: ())

    assert workers.left


def test_quarantine_is_told_when_the_others_are_done() -> None:
    workers = Scripted([Ended(0, "QuarantineError", "one pair"), Ended(1)])

    with pytest.raises(QuarantineError, match="one pair"):
        supervise(workers, 2, lambda: ())

    assert next(workers.ends, None) is None


def test_an_error_that_nobody_foresaw_names_the_worker() -> None:
    with pytest.raises(WorkersError, match="worker 0 failed: exit: code 1"):
        supervise(Scripted([Ended(0, "exit", "code 1")]), 1, lambda: ())
