"""What this machine's disk and memory do by themselves, to compare loads with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SAMPLE_BYTES = 256 << 20
NUM_TRIES = 3


def forget_cached(path: Path) -> None:
    """Drop an adapter's files from the page cache, so that reading them means the disk."""
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_file_speed(path: Path) -> float:
    """GB/s at which this machine reads an adapter's weights into memory, best of three."""
    file = path / "adapter_model.safetensors"
    target = np.zeros(file.stat().st_size, np.uint8)

    def read() -> None:
        with file.open("rb", buffering=0) as handle:
            view = target.data
            while view and (num_read := handle.readinto(view)):
                view = view[num_read:]

    return target.size / _least_s(read, lambda: forget_cached(path)) / 1e9


def copy_speed() -> float:
    """GB/s at which one thread copies memory, best of three."""
    source, target = np.ones(SAMPLE_BYTES, np.uint8), np.zeros(SAMPLE_BYTES, np.uint8)
    return SAMPLE_BYTES / _least_s(lambda: np.copyto(target, source), lambda: None) / 1e9


def _least_s(work: Callable[[], None], prepare: Callable[[], None]) -> float:
    times = []
    for _ in range(NUM_TRIES):
        prepare()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
