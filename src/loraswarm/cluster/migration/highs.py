"""A mixed integer program, built row by row and solved by HiGHS on one thread.

The only module that imports highspy, and only to solve. Knows nothing of migration; `ilp` and
`pairs` build programs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loraswarm.errors import ConfigError

NO_LIMIT = float("inf")


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """Values of all columns, or None if none were found in time; what no solution is below."""

    values: Sequence[float] | None
    bound: float
    is_optimal: bool
    seconds: float


@dataclass(slots=True)
class Program:
    """Columns are variables with bounds and a cost each, rows are limits of sums; minimised."""

    _cost: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _is_integer: list[bool] = field(default_factory=list)
    _row_lower: list[float] = field(default_factory=list)
    _row_upper: list[float] = field(default_factory=list)
    _starts: list[int] = field(default_factory=lambda: [0])
    _columns: list[int] = field(default_factory=list)
    _weights: list[float] = field(default_factory=list)

    def add_binary(self, upper: float = 1.0) -> int:
        """A column of 0 or 1, or of 0 alone; returns its index."""
        return self._add(0.0, upper, is_integer=True)

    def add_amount(self, upper: float = NO_LIMIT, cost: float = 0.0) -> int:
        """A column of any number from 0 to `upper`."""
        return self._add(cost, upper, is_integer=False)

    def add_row(
        self, weights: Mapping[int, float], lower: float = -NO_LIMIT, upper: float = NO_LIMIT
    ) -> None:
        """lower <= sum of weight * column <= upper."""
        self._columns += weights.keys()
        self._weights += weights.values()
        self._starts.append(len(self._columns))
        self._row_lower.append(lower)
        self._row_upper.append(upper)

    def solve(self, time_limit_s: float, start: Sequence[float] | None = None) -> ProgramResult:
        """Minimise, from the values of `start` on, which must hold every row.

        Raises   ConfigError if HiGHS is not installed; ValueError if the program has no solution.
        """
        highspy = _import_highspy()
        began_s = time.perf_counter()
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("time_limit", max(0.0, time_limit_s))
        highs.setOptionValue("mip_rel_gap", 0.0)
        highs.passModel(self._model(highspy))
        if start is not None:
            first = highspy.HighsSolution()
            first.col_value = list(start)
            first.value_valid = True
            highs.setSolution(first)
        highs.run()
        return _result(highspy, highs, time.perf_counter() - began_s)

    def _add(self, cost: float, upper: float, *, is_integer: bool) -> int:
        self._cost.append(cost)
        self._lower.append(0.0)
        self._upper.append(upper)
        self._is_integer.append(is_integer)
        return len(self._cost) - 1

    def _model(self, highspy: Any) -> Any:
        model = highspy.HighsLp()
        model.num_col_ = len(self._cost)
        model.num_row_ = len(self._row_lower)
        model.col_cost_ = np.array(self._cost)
        model.col_lower_ = np.array(self._lower)
        model.col_upper_ = np.array(self._upper)
        model.row_lower_ = np.array(self._row_lower)
        model.row_upper_ = np.array(self._row_upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self._starts)
        model.a_matrix_.index_ = np.array(self._columns)
        model.a_matrix_.value_ = np.array(self._weights)
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        model.integrality_ = [kinds[each] for each in self._is_integer]
        return model


def _import_highspy() -> Any:
    try:
        import highspy
    except ImportError:
        raise ConfigError(
            "the integer programs of migration need HiGHS: pip install 'loraswarm[cluster]'"
        ) from None
    return highspy


def _result(highspy: Any, highs: Any, seconds: float) -> ProgramResult:
    status = highs.getModelStatus()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnbounded):
        raise ValueError(f"the program has no solution: {highs.modelStatusToString(status)}")
    info = highs.getInfo()
    is_optimal = status == highspy.HighsModelStatus.kOptimal
    solution = highs.getSolution()
    is_known = info.primal_solution_status == highspy.kSolutionStatusFeasible
    values = list(solution.col_value) if is_known else None
    return ProgramResult(values, max(0.0, info.mip_dual_bound), is_optimal, seconds)
