"""Seconds of what runs on a CUDA device, with its cache emptied before each run.

Used by the other scripts here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20
"""Several times the second cache of an H100 or H200."""
SLEEP_CYCLES = 10_000_000
"""About 5 ms."""


def median_s(run: Callable[[], object], num_runs: int = 20, num_warm: int = 3) -> float:
    """Median of single runs, each between two events, behind a read that fills the cache with
    other bytes.

    A read, since what a write leaves in the cache has to be written back during the run. The device
    sleeps first, until all of a run is queued: launching is not in the time.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    for _ in range(num_warm):
        run()
    pairs = []
    for _ in range(num_runs):
        torch.cuda._sleep(SLEEP_CYCLES)
        flush.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def step_s(run: Callable[[], object], num_runs: int = 20, num_warm: int = 3) -> float:
    """Seconds of one of `num_runs` runs that follow each other, as steps of an engine do."""
    for _ in range(num_warm):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(num_runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / num_runs
