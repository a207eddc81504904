"""A Python function as a Scorer: ``module:function`` from the working directory or installed, under the identity its owner states.

What it returns is checked, pair by pair, before anything is banked; what it raises is its own and ends the run. Imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sparsekd.recipe import CallableTeacher
from sparsekd.teachers.finite import require_finite
from sparsekd.teachers.identity import teacher_identity


class FunctionScorer:
    """Scores pairs by calling a function; implements Scorer."""

    def __init__(self, teacher: CallableTeacher) -> None:
        self.identity: dict[str, Any] = teacher_identity(teacher)
        self.num_truncated = 0  # what the function cuts is its own
        self._teacher = teacher
        self._function: Callable[[list[tuple[str, str]]], Any] | None = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n] in input order.

        Raises ValueError if the function is not there, or does not return one finite number for each pair.
        """
        if not pairs:
            return np.empty(0, dtype=np.float32)
        if self._function is None:
            self._function = self._load()
        returned = self._function(list(pairs))
        gold_sim_N = self._numbers(returned)
        if gold_sim_N.shape != (len(pairs),):
            self._refuse(
                f"returned an array of shape {gold_sim_N.shape} for {len(pairs)} pairs", f"{len(pairs)} floats in their order"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused so
            gold_sim_N = gold_sim_N.astype(np.float32)
        require_finite(self._teacher.name, pairs, gold_sim_N, f"a finite float32 from {self._teacher.function} for each")
        return gold_sim_N

    def _numbers(self, returned: Any) -> NDArray[Any]:
        try:
            numbers = np.asarray(returned.tolist() if hasattr(returned, "tolist") else list(returned))
        except (TypeError, ValueError):  # no sequence, or one of ragged lists
            numbers = np.array(None, dtype=object)
        if numbers.dtype.kind not in "fiu":  # None would become NaN, a bool 1 and a numeral a number
            self._refuse(f"returned {str(returned)[:80]!r}", "a sequence of floats, one for each pair")
        return numbers

    def _load(self) -> Callable[[list[tuple[str, str]]], Any]:
        module_name, _, function_name = self._teacher.function.partition(":")
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # last: a file of yours hides no installed package. A stage script's own folder stands first
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, and what it imports is not
            self._refuse(f"there is no module {module_name} in {here} or installed", "module:function")
        function: Callable[[list[tuple[str, str]]], Any] | None = getattr(module, function_name, None)
        if not callable(function):
            self._refuse(f"{module.__file__} has no function {function_name}", "module:function")
        return function

    def _refuse(self, found: str, expected: str) -> NoReturn:
        raise ValueError(f"teacher {self._teacher.name!r}: function = {self._teacher.function!r}: {found}; expected {expected}")
