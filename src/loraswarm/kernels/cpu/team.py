"""Threads that walk through programs beside the thread that made them.

A team serves one element type. Its threads sleep in compiled code, without the GIL, and are woken
when a program begins; the thread that records it walks along once it has recorded all. Knows no
operations; used by kernels/cpu/program.

    ticket   number of the program that is current; it lies in slot `ticket % NUM_SLOTS`
    slot     words, counters and state of one program (kernels/cpu/execute)

A slot is used again when every thread that has entered it has left it. A thread that finds, after
it has entered, that the ticket is another touches nothing.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels.cpu.execute import (
    COUNTER_WORDS,
    DONE,
    IS_CLOSED,
    LINE_WORDS,
    NUM_ENTERED,
    NUM_LEFT,
    NUM_READY,
    STATE_WORDS,
    WORDS,
    Walk,
    wait_until,
    walk_program,
)
from loraswarm.kernels.cpu.jit import called, kernel
from loraswarm.kernels.cpu.memory import (
    add_atomically_at,
    float_at,
    int64_at,
    moved,
    read_atomically,
    read_clock,
    relax,
    swap_atomically,
    wait_at_pipe,
    wake_through_pipe,
    write_atomically,
)
from loraswarm.kernels.cpu.vectors import memory_of

SCRATCH_FLOATS = 1 << 16
MAX_OPERATIONS = 1024
NUM_SLOTS = 16
FACTS_AT = STATE_WORDS
NUM_WORKERS, IS_TIMED = FACTS_AT, FACTS_AT + 1
WORDS_AT = FACTS_AT + LINE_WORDS
COUNTERS_AT = WORDS_AT + MAX_OPERATIONS * WORDS
CLOCK_AT = COUNTERS_AT + MAX_OPERATIONS * COUNTER_WORDS
SLOT_WORDS = CLOCK_AT + MAX_OPERATIONS + LINE_WORDS
WORD_BYTES = 8
TICKET = 0
SLEEPS = LINE_WORDS
"""From this word of the board on, a line for each thread: whether it waits at its pipe."""
IDLE_SPINS = 2000
"""Tens of microseconds: what is between two programs often takes no longer."""
CALLER, NOBODY = -1, -2
MAX_WORKERS = 255
_LIKE = {
    torch.float32: np.zeros(1, np.float32),
    torch.bfloat16: np.zeros(1, np.uint16),
    torch.float16: np.zeros(1, np.int16),
}


@kernel
def work(index: int, board: int, slots: int, pipe: int, scratch: int, like: Any) -> None:
    """Thread `index` of the team: walk through each program as it begins, while tickets are given.

    CALLER walks through the one program at `slots` and returns; NOBODY only has this compiled.
    """
    if index == CALLER:
        slot = int64_at(slots)
        _walk_slot(slot, slot[IS_TIMED] != 0 and slot[NUM_WORKERS] == 0, scratch, like)
    if index < 0:
        return
    seen = 0
    while seen >= 0:
        _sleep(int64_at(board), index, seen, pipe)
        seen = read_atomically(int64_at(board), TICKET)
        slot = moved(int64_at(slots), seen % NUM_SLOTS * SLOT_WORDS)
        add_atomically_at(slot, NUM_ENTERED, 1)
        if read_atomically(int64_at(board), TICKET) == seen and index < slot[NUM_WORKERS]:
            _walk_slot(slot, slot[IS_TIMED] != 0 and index == 0, scratch, like)
        add_atomically_at(slot, NUM_LEFT, 1)


@called
def _sleep(board: Any, index: int, seen: int, pipe: int) -> None:
    """Return when the ticket is another than `seen`."""
    num_spins, sleeps = 0, SLEEPS + index * LINE_WORDS
    while read_atomically(board, TICKET) == seen:
        num_spins += 1
        if num_spins < IDLE_SPINS:
            relax()
            continue
        swap_atomically(board, sleeps, 1)
        # Whoever sets it back to 0 has written to the pipe, or is this thread.
        if read_atomically(board, TICKET) == seen or swap_atomically(board, sleeps, 0) == 0:
            wait_at_pipe(pipe)


@called
def _walk_slot(slot: Any, is_timed: bool, scratch: int, like: Any) -> None:
    walk = Walk(
        moved(slot, WORDS_AT), moved(slot, COUNTERS_AT), slot, moved(slot, CLOCK_AT), is_timed
    )
    walk_program(walk, float_at(scratch), memory_of(like, 0))


@kernel
def ticks_now() -> int:
    """The clock of programs."""
    return int(read_clock())


@kernel
def publish(slot: int, num_operations: int, is_closed: bool) -> None:
    """There are so many operations now; `is_closed`: and no more."""
    state = int64_at(slot)
    write_atomically(state, NUM_READY, num_operations)
    if is_closed:
        write_atomically(state, IS_CLOSED, 1)


@kernel
def clear(slot: int) -> None:
    """Make a slot ready for a program, as soon as nobody is in it."""
    state = int64_at(slot)
    wait_until(state, NUM_LEFT, read_atomically(state, NUM_ENTERED))
    counters = moved(state, COUNTERS_AT)
    for index in range(state[NUM_READY]):
        counters[index * COUNTER_WORDS] = 0
        counters[index * COUNTER_WORDS + DONE] = 0
    state[NUM_READY] = 0
    state[IS_CLOSED] = 0


@kernel
def begin(board: int, ticket: int, pipes: Any, num_workers: int) -> None:
    """Make a program current and wake the first `num_workers` threads."""
    write_atomically(int64_at(board), TICKET, ticket)
    for index in range(num_workers):
        if swap_atomically(int64_at(board), SLEEPS + index * LINE_WORDS, 0) != 0:
            wake_through_pipe(pipes[index])


class Team:
    """The threads for programs of one element type; one program at a time, held by `lock`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.lock = threading.Lock()
        self._like = _LIKE[dtype]
        self._slots = torch.zeros(NUM_SLOTS, SLOT_WORDS, dtype=torch.int64)
        self._board = torch.zeros(SLEEPS + MAX_WORKERS * LINE_WORDS, dtype=torch.int64)
        self._pipes = np.zeros(MAX_WORKERS, np.int64)
        self._scratch: list[Tensor] = [torch.zeros(SCRATCH_FLOATS)]
        self._ticket = 0
        # Threads of the team run until the process ends, and so does what they point to.
        for memory in (self._slots, self._board):
            _keep_for_ever(memory)
        begin(self._board.data_ptr(), 0, self._pipes, 0)
        work(NOBODY, 0, 0, 0, 0, self._like)

    def open_slot(self, is_timed: bool) -> Slot:
        """Where the next program goes; `lock` must be held."""
        number = (self._ticket + 1) % NUM_SLOTS
        slot = Slot(self._slots[number])
        clear(slot.address)
        slot.words[IS_TIMED], slot.words[NUM_WORKERS] = is_timed, 0
        if is_timed:
            slot.words[CLOCK_AT:] = 0
        return slot

    def begin(self, slot: Slot, num_workers: int) -> None:
        """Let so many threads walk through the program in the slot, from now on."""
        num_workers = min(num_workers, MAX_WORKERS)
        self._start(num_workers)
        slot.words[NUM_WORKERS] = num_workers
        self._ticket += 1
        begin(self._board.data_ptr(), self._ticket, self._pipes, num_workers)

    def take_part(self, slot: Slot) -> None:
        """Walk through the program, which is published as a whole; returns when it is done."""
        work(CALLER, 0, slot.address, 0, self._scratch[0].data_ptr(), self._like)

    def _start(self, num_workers: int) -> None:
        while len(self._scratch) <= num_workers:
            index = len(self._scratch) - 1
            scratch = torch.zeros(SCRATCH_FLOATS)
            _keep_for_ever(scratch)
            self._scratch.append(scratch)
            pipe, self._pipes[index] = os.pipe()
            addresses = self._board.data_ptr(), self._slots.data_ptr(), pipe, scratch.data_ptr()
            threading.Thread(
                target=work,
                args=(index, *addresses, self._like),
                name=f"kernels-{index}",
                daemon=True,
            ).start()


def _keep_for_ever(memory: Tensor) -> None:
    """Not even the interpreter's end frees it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


class Slot:
    """One program of a team; `words` is all its memory as int64, `data` the same as bytes."""

    __slots__ = ("address", "data", "words")

    def __init__(self, words: Tensor) -> None:
        self.address = words.data_ptr()
        self.words: Any = words.numpy()
        self.data = self.words.data.cast("B")

    def clock(self, num_operations: int) -> Any:
        """When a thread came to each operation and to the end; None if it did not see the end."""
        clock = self.words[CLOCK_AT : CLOCK_AT + num_operations + 1]
        return clock if clock[-1] != 0 else None
