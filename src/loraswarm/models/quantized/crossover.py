"""Measures up to how many rows torch's integer kernels beat dequantizing, on this machine.

One measurement for each kind of matrix: both ways take time in proportion to the elements, so that
one speaks for all. Called by models/quantized/loading.
"""

from __future__ import annotations

import time

import torch

from loraswarm.models.quantized.weight import IntegerMatrix, QuantizedWeight

FEW_ROWS = 32
MANY_ROWS = 128
MEASURED_RUNS = 5
# Dequantizing touches every element once, the kernel once a few rows: below this it cannot lose,
# and a machine that is busy while it measures must not say otherwise.
MIN_KERNEL_ROWS = 8
NO_LIMIT = 1 << 20


class Crossover:
    """Remembers what was measured; `limits` has, for each kind of matrix, the most rows that the
    kernel is faster for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.limits: dict[str, int] = {}

    def max_rows(self, matrix: IntegerMatrix) -> int:
        """The limit for matrices of this kind; measured with the first."""
        if not matrix.has_kernel(self._dtype):
            return 0
        if matrix.kind not in self.limits:
            self.limits[matrix.kind] = self._measured(matrix)
        return self.limits[matrix.kind]

    def _measured(self, matrix: IntegerMatrix) -> int:
        """Where the lines of two costs meet: kernel a * rows, floats b + c * rows.

        Runs of both alternate, so that other work on the machine meets both, and use one thread:
        both divide alike, and several would wait for whichever of them is kept from running.
        """
        few_TI = torch.ones(FEW_ROWS, matrix.size[1], dtype=self._dtype)
        many_TI = torch.ones(MANY_ROWS, matrix.size[1], dtype=self._dtype)
        kernel = QuantizedWeight(matrix, self._dtype, FEW_ROWS)
        floats = QuantizedWeight(matrix, self._dtype, 0)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runs = [
                (_time_s(kernel, few_TI), _time_s(floats, few_TI), _time_s(floats, many_TI))
                for _ in range(MEASURED_RUNS)
            ]
        finally:
            torch.set_num_threads(num_threads)
        kernel_s, few_s, many_s = map(min, zip(*runs, strict=True))
        row_s = max(0.0, (many_s - few_s) / (MANY_ROWS - FEW_ROWS))
        fixed_s = max(0.0, few_s - FEW_ROWS * row_s)
        gain_s = kernel_s / FEW_ROWS - row_s
        if fixed_s >= NO_LIMIT * gain_s:
            return NO_LIMIT
        return max(MIN_KERNEL_ROWS, int(fixed_s / gain_s))


def _time_s(weight: QuantizedWeight, x_TI: torch.Tensor) -> float:
    """Seconds of one product."""
    start = time.perf_counter()
    weight.multiply(x_TI)
    return time.perf_counter() - start
