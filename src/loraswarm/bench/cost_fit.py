"""Finds the figures of a cost model from timed steps and timed transfers.

Least squares on relative errors, no figure negative: a cost that is negative is noise, and would
make more work cheaper. Knows nothing about engines; numpy only. Called by bench/calibrate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loraswarm.core.cost_model import Residuals, TransferCosts
from loraswarm.core.step_cost import StepCosts, StepWork, amounts_of

BRACKETS = (0, 4, 16, 32, 64)
"""Where the price of a step's next token may change: few tokens wait for the base's weights, many
for products, and kernels change with the number of rows in between."""
TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step that took `seconds`. Steps of one `label` are measurements of one thing."""

    label: str
    work: StepWork
    seconds: float


def typical(steps: Iterable[TimedStep]) -> list[TimedStep]:
    """One step for each label: the work in the middle, and the lower quartile of the seconds, as
    what else runs on a machine only ever adds to them."""
    groups: dict[str, list[TimedStep]] = defaultdict(list)
    for step in steps:
        groups[step.label].append(step)
    found = []
    for label, group in groups.items():
        ordered = sorted(group, key=lambda step: (step.work.kv_bytes, step.work.attention_pairs))
        seconds = float(np.quantile([step.seconds for step in group], 0.25))
        found.append(TimedStep(label, ordered[len(ordered) // 2].work, seconds))
    return found


def fit_step_costs(steps: Sequence[TimedStep], brackets: tuple[int, ...] = BRACKETS) -> StepCosts:
    """The figures with the least sum of squared relative errors over the steps.

    A figure that no step depends on is 0; the last bracket whose tokens were seen goes on for more
    tokens than were seen, so that no token is free for want of a measurement.
    """
    most = max(step.work.num_tokens for step in steps)
    brackets = tuple(begin for begin in brackets if begin < most) or (0,)
    amounts = np.array([amounts_of(step.work, brackets) for step in steps])
    return StepCosts.of(_fit_relative(amounts, [step.seconds for step in steps]), brackets)


def fit_transfer(num_bytes: Sequence[float], seconds: Sequence[float]) -> TransferCosts:
    """A fixed cost and one per byte, from transfers of so many bytes that took so long."""
    amounts = np.stack([np.ones(len(num_bytes)), np.array(num_bytes, dtype=float)], axis=1)
    fixed_s, byte_s = _fit_relative(amounts, seconds)
    return TransferCosts(fixed_s=float(fixed_s), byte_s=float(byte_s))


def residuals(costs: StepCosts, steps: Sequence[TimedStep]) -> Residuals:
    """How far the costs are from these steps."""
    errors = [relative_error(costs, step) for step in steps]
    return Residuals(
        num_points=len(steps),
        median_error=float(np.median(np.abs(errors))),
        worst_error=float(np.max(np.abs(errors))),
    )


def relative_error(costs: StepCosts, step: TimedStep) -> float:
    """Predicted over measured, less 1: positive where the step took less than predicted."""
    return costs.step_s(step.work) / step.seconds - 1.0


def _fit_relative(amounts_MN: np.ndarray, seconds: Sequence[float]) -> np.ndarray:
    shares_MN = amounts_MN / np.array(seconds, dtype=float)[:, None]
    return non_negative_least_squares(shares_MN, np.ones(len(seconds)))


def non_negative_least_squares(a_MN: np.ndarray, b_M: np.ndarray) -> np.ndarray:
    """x [N] >= 0 with the least |a x - b|; 0 where a column of `a` is 0.

    Columns may differ by many orders of magnitude.
    Source   the active set method of Lawson and Hanson, Solving Least Squares Problems (1974), 23.
    """
    norms_N = np.linalg.norm(a_MN, axis=0)
    scaled_MN = a_MN / np.where(norms_N > 0, norms_N, 1.0)
    size = a_MN.shape[1]
    x_N, is_free_N = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        gradient_N = scaled_MN.T @ (b_M - scaled_MN @ x_N)
        gradient_N[is_free_N] = 0.0
        best = int(np.argmax(gradient_N))
        if gradient_N[best] <= TOLERANCE * np.linalg.norm(b_M):
            break
        is_free_N[best] = True
        x_N = _solve_free(scaled_MN, b_M, x_N, is_free_N)
    return x_N / np.where(norms_N > 0, norms_N, 1.0)


def _solve_free(
    a_MN: np.ndarray, b_M: np.ndarray, x_N: np.ndarray, is_free_N: np.ndarray
) -> np.ndarray:
    """The best x whose free parts are positive, coming from `x_N`; those that end at 0 are bound
    again (`is_free_N` is written to)."""
    while True:
        target_N = np.zeros_like(x_N)
        target_N[is_free_N] = np.linalg.lstsq(a_MN[:, is_free_N], b_M, rcond=None)[0]
        is_crossing_N = is_free_N & (target_N <= 0)
        if not is_crossing_N.any():
            return target_N
        steps = x_N[is_crossing_N] / (x_N[is_crossing_N] - target_N[is_crossing_N] + 1e-300)
        x_N = x_N + float(steps.min()) * (target_N - x_N)
        is_free_N &= ~(is_crossing_N & (x_N <= TOLERANCE))
        x_N[~is_free_N] = 0.0
        if not is_free_N.any():
            return x_N
