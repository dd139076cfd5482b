"""Programs: operations that are recorded, and computed while others are still recorded.

Within `recording()` the kernels of this package only note what is to be computed; when the block
ends, or `finish()` returns, it is computed. Between the two nobody may read or write the tensors
involved but the kernels. Outside of it every kernel returns when it is done. So the threads are
woken once for a step of a model, and work while it is recorded (kernels/cpu/team).

    with programs.recording():
        h = kernels.linear(x, w)          noted; h is memory that holds nothing yet
        y = kernels.silu_multiply(h)      noted; h may be forgotten: later ones may overwrite it
    y is computed

Operations are done in the order of recording, so memory that nobody holds any more is given to the
next that asks: `buffer` reuses it. A thread has its own program.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from struct import Struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels.cpu.execute import FIRST_ARGUMENT, WORDS
from loraswarm.kernels.cpu.jit import threads
from loraswarm.kernels.cpu.team import (
    MAX_OPERATIONS,
    SCRATCH_FLOATS,
    WORD_BYTES,
    WORDS_AT,
    Slot,
    Team,
    publish,
    ticks_now,
)

__all__ = ["SCRATCH_FLOATS", "Profile", "Program", "programs"]

PUBLISHED_TOGETHER = 4
RECORDED_PRODUCTS = 1 << 18
"""Multiply-adds of an operation that take longer than recording it: others begin before the end of
the recording if there are so many on average, and do not wait for it in vain."""
CLOCK_SAMPLE_S = 0.05
MAX_KEPT_BYTES = 64 << 20
NOBODY_ELSE = 2  # references to a block: its tensor here and the storage beside it
_PACKERS = [
    Struct(f"{FIRST_ARGUMENT + count}q").pack_into for count in range(WORDS - FIRST_ARGUMENT + 1)
]


_teams: dict[torch.dtype, Team] = {}
_making = threading.Lock()


class Program(threading.local):
    """What has been recorded and is not yet done, all of one element type."""

    def __init__(self) -> None:
        self._team: Team | None = None
        self._slot: Slot | None = None
        self._dtype: torch.dtype | None = None
        self._num_operations = 0
        self._num_products = 0
        self._has_begun = False
        self._depth = 0
        self._held: list[Any] = []
        self._buffers = Buffers()
        self.last_dtype = torch.float32
        self.profile: Profile | None = None

    @property
    def is_recording(self) -> bool:
        return self._depth > 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Operations of this block are computed when it ends, or when `finish` returns."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.finish()

    def add(
        self,
        kind: int,
        num_items: int,
        arguments: tuple[int, ...],
        dtype: torch.dtype,
        num_products: int,
    ) -> None:
        """Record an operation over `num_items` items; returns when it is done unless recording.

        `arguments` are numbers and addresses; what lies there must stay in place until the program
        is done: `hold` it, unless it is a `buffer` or outlives the recording.
        """
        if dtype != self._dtype or self._num_operations == MAX_OPERATIONS:
            held, self._held = self._held, []  # what is held is for this operation too
            self.finish()
            self._held = held
        if self._slot is None:
            self._open(dtype)
        assert self._slot is not None
        place = WORD_BYTES * (WORDS_AT + self._num_operations * WORDS)
        _PACKERS[len(arguments)](self._slot.data, place, kind, num_items, *arguments)
        self._num_operations += 1
        self._num_products += num_products
        if self._depth == 0:
            self.finish()
        elif self._num_operations % PUBLISHED_TOGETHER == 0:
            publish(self._slot.address, self._num_operations, False)
            if self._num_products >= RECORDED_PRODUCTS * self._num_operations:
                self._begin()

    def hold(self, *objects: object) -> None:
        """Keep objects alive until the program is done."""
        self._held.extend(objects)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for what an operation writes.

        Within a recording it may be memory that an earlier operation still has to read or write:
        only later operations may touch it before `finish`.
        """
        if self._depth == 0:
            return torch.empty(shape, dtype=dtype)
        if prod(shape) * dtype.itemsize > MAX_KEPT_BYTES:
            large = torch.empty(shape, dtype=dtype)
            self._held.append(large)
            return large
        return self._buffers.take(shape, dtype)

    def finish(self) -> None:
        """Take part in what has been recorded; returns when it is done."""
        slot, team = self._slot, self._team
        if team is None:
            return
        try:
            if slot is not None:
                publish(slot.address, self._num_operations, True)
                self._begin()
                team.take_part(slot)
                if self.profile is not None:
                    self.profile.saw(slot, self._num_operations)
        except BaseException:
            if slot is not None:  # an interrupt: others may be at it, so it must come to its end
                publish(slot.address, self._num_operations, True)
                team.take_part(slot)
            raise
        finally:
            self._forget()
            team.lock.release()

    def _forget(self) -> None:
        self._held = []
        self._num_operations = self._num_products = 0
        self._has_begun = False
        self._slot = self._team = self._dtype = None

    def _open(self, dtype: torch.dtype) -> None:
        team = team_of(dtype)
        team.lock.acquire()
        self._team, self._dtype = team, dtype
        self.last_dtype = dtype
        self._slot = team.open_slot(is_timed=self.profile is not None)

    def _begin(self) -> None:
        """Wake the others, once there is enough to do."""
        assert self._slot is not None
        assert self._team is not None
        if not self._has_begun and (num_threads := threads.wake(self._num_products)) > 1:
            self._has_begun = True
            self._team.begin(self._slot, num_threads - 1)


def team_of(dtype: torch.dtype) -> Team:
    """The one team of this process for an element type."""
    with _making:
        if dtype not in _teams:
            _teams[dtype] = Team(dtype)
        return _teams[dtype]


def _after_fork() -> None:
    """A child has none of the threads, and locks as they happened to be."""
    global _making
    _making = threading.Lock()
    _teams.clear()
    programs.__init__()  # type: ignore[misc]


class Profile:
    """Where the time of programs goes: set as `programs.profile`, it sees every one that runs.

    Seconds by kind of operation. What is between two programs is not in it. A program that was over
    before the thread with the clock came to it counts among `num_unseen` only.
    """

    def __init__(self) -> None:
        self.seconds: Counter[int] = Counter()
        self.counts: Counter[int] = Counter()
        self.num_programs = 0
        self.num_unseen = 0
        self._ns_per_tick = _ns_per_tick()

    def saw(self, slot: Slot, num_operations: int) -> None:
        """The program in a slot is done."""
        self.num_programs += 1
        clock = slot.clock(num_operations)
        if clock is None:
            self.num_unseen += 1
            return
        kinds = slot.words[WORDS_AT : WORDS_AT + num_operations * WORDS : WORDS]
        for kind, ticks in zip(kinds.tolist(), np.diff(clock).tolist(), strict=True):
            self.seconds[kind] += ticks * self._ns_per_tick * 1e-9
            self.counts[kind] += 1


@cache
def _ns_per_tick() -> float:
    """Nanoseconds of a tick of the clock that programs are timed with."""
    ticks_now()  # compiled now, not while it is measured
    began, began_ticks = time.perf_counter_ns(), ticks_now()
    time.sleep(CLOCK_SAMPLE_S)
    return (time.perf_counter_ns() - began) / max(ticks_now() - began_ticks, 1)


class Buffers:
    """Memory of recorded operations, given out again when no tensor refers to it."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, torch.dtype], list[tuple[Tensor, Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape whose memory nobody else has; in blocks of powers of two."""
        num_elements = prod(shape)
        size_class = (max(num_elements, 64) - 1).bit_length()
        blocks = self._blocks.setdefault((size_class, dtype), [])
        for block, storage in blocks:
            if torch._C._storage_Use_Count(storage._cdata) == NOBODY_ELSE:
                return torch.as_strided(block, shape, _strides(shape))
        with torch.inference_mode(False):  # or the block could be written to in that mode only
            new = torch.empty(1 << size_class, dtype=dtype)
        blocks.append((new, new.untyped_storage()))
        if torch._C._storage_Use_Count(blocks[-1][1]._cdata) != NOBODY_ELSE:
            raise RuntimeError(f"torch {torch.__version__} counts users of memory in another way")
        return torch.as_strided(new, shape, _strides(shape))


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


programs = Program()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
