"""Programs: operations that are recorded first and run together, in their order.

Within `recording()` the kernels of this package only note what is to be computed; leaving it, or
`finish()`, computes it. Between the two nobody may read or write the tensors involved but the
kernels. Outside of it every kernel runs at once. So a step of a model is one parallel region, and
its threads are woken once.

    with programs.recording():
        h = kernels.linear(x, w)          noted; h is memory that holds nothing yet
        y = kernels.silu_multiply(h)      noted; h may be forgotten: later ones may overwrite it
    y is computed

Operations run in the order of recording, so memory that nobody holds any more is given to the next
that asks: `buffer` reuses it. A thread has its own program.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels.cpu.execute import COUNTER_WORDS, FIRST_ARGUMENT, WORDS, execute
from loraswarm.kernels.cpu.jit import threads

SCRATCH_FLOATS = 1 << 16
NOBODY_ELSE = 2  # references to a block: its tensor here and the storage beside it
_NO_CLOCK = np.zeros(0, np.int64)
_PADDING = tuple([0] * WORDS)
_LIKE = {
    torch.float32: np.zeros(1, np.float32),
    torch.bfloat16: np.zeros(1, np.uint16),
    torch.float16: np.zeros(1, np.int16),
}


class Program(threading.local):
    """What has been recorded and not yet run, all of one element type."""

    def __init__(self) -> None:
        self._words = array("q")
        self._num_operations = 0
        self._num_products = 0
        self._dtype: torch.dtype | None = None
        self._depth = 0
        self._held: list[Any] = []
        self._scratch = _scratch(0)
        self._buffers = Buffers()
        self.profile: Profile | None = None

    @property
    def is_recording(self) -> bool:
        return self._depth > 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Operations of this block run at its end, or when `finish` is called.

        After an exception nothing of them is run.
        """
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self.finish()
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._forget()

    def add(
        self,
        kind: int,
        num_items: int,
        arguments: tuple[int, ...],
        dtype: torch.dtype,
        num_products: int,
    ) -> None:
        """Record an operation over `num_items` items; run it now unless recording.

        `arguments` are numbers and addresses; what lies there must stay in place until the program
        has run: `hold` it, unless it is a `buffer` or outlives the recording.
        """
        if dtype != self._dtype:
            self.finish()
            self._dtype = dtype
        self._words.extend((kind, num_items, *arguments))
        self._words.extend(_PADDING[FIRST_ARGUMENT + len(arguments) :])
        self._num_operations += 1
        self._num_products += num_products
        if self._depth == 0:
            self.finish()

    def hold(self, *objects: object) -> None:
        """Keep objects alive until the program has run."""
        self._held.extend(objects)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for what an operation writes.

        Within a recording it may be memory that an earlier operation still has to read or write:
        only later operations may touch it before `finish`.
        """
        if self._depth == 0:
            return torch.empty(shape, dtype=dtype)
        return self._buffers.take(shape, dtype)

    def finish(self) -> None:
        """Run what has been recorded; returns when it is done."""
        if self._num_operations == 0:
            return
        words = np.frombuffer(self._words, np.int64).reshape(self._num_operations, WORDS)
        counters = np.zeros((self._num_operations, COUNTER_WORDS), np.int64)
        clock = _NO_CLOCK if self.profile is None else np.zeros(len(words) + 1, np.int64)
        num_threads = threads.wake(self._num_products)
        if self._scratch.shape[0] < num_threads:
            self._scratch = _scratch(num_threads)
        assert self._dtype is not None
        try:
            execute(words, counters, clock, self._scratch, _LIKE[self._dtype], num_threads)
            if self.profile is not None:
                self.profile.saw(words[:, 0], clock)
        finally:
            del words
            self._forget()

    def _forget(self) -> None:
        self._words = array("q")
        self._num_operations = 0
        self._num_products = 0
        self._held.clear()


def _scratch(num_threads: int) -> Any:
    """[threads, floats], each thread's at the start of a cache line as torch's memory is."""
    return torch.zeros(num_threads, SCRATCH_FLOATS).numpy()


class Profile:
    """Where the time of programs goes: set as `programs.profile`, it sees every one that runs.

    Seconds by kind of operation. What is between two programs is not in it.
    """

    def __init__(self) -> None:
        self.seconds: Counter[int] = Counter()
        self.counts: Counter[int] = Counter()
        self.num_programs = 0
        self._began = time.perf_counter_ns()
        self._began_clock: int | None = None

    def saw(self, kinds: Any, clock: Any) -> None:
        """A program of operations of these kinds ran; `clock` as kernels/cpu/execute has it."""
        self.num_programs += 1
        now, now_clock = time.perf_counter_ns(), int(clock[-1])
        if self._began_clock is None:
            self._began, self._began_clock = now, now_clock
            return
        ns_per_tick = (now - self._began) / max(now_clock - self._began_clock, 1)
        for kind, ticks in zip(kinds.tolist(), np.diff(clock).tolist(), strict=True):
            self.seconds[kind] += ticks * ns_per_tick * 1e-9
            self.counts[kind] += 1


class Buffers:
    """Memory of recorded operations, given out again when no tensor refers to it."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, torch.dtype], list[tuple[Tensor, Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape whose memory nobody else has; in blocks of powers of two."""
        num_elements = prod(shape)
        size_class = max(num_elements, 64).bit_length()
        blocks = self._blocks.setdefault((size_class, dtype), [])
        for block, storage in blocks:
            if torch._C._storage_Use_Count(storage._cdata) == NOBODY_ELSE:
                return torch.as_strided(block, shape, _strides(shape))
        new = torch.empty(1 << size_class, dtype=dtype)
        blocks.append((new, new.untyped_storage()))
        return torch.as_strided(new, shape, _strides(shape))


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


programs = Program()
