"""Runs a program: operations one after another, each spread over the threads.

One parallel region for a whole program. A thread takes items of the current operation until none is
left, and goes on when all of them are done, whoever did them; a thread that the machine has put
aside between two items holds up nobody. Called by kernels/cpu/program only.

    program   [operations, WORDS] int64: kind, number of items, then the operation's own arguments
    counters  [operations, 16] int64 of zeros: word 0 the next item, word 8 the items done
    clock     [operations + 1] int64, the clock when the first thread came to an operation, and at
              the end; empty if nobody wants to know
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import prange

from loraswarm.kernels.cpu.jit import called, kernel
from loraswarm.kernels.cpu.memory import (
    add_atomically_at,
    moved,
    read_atomically,
    read_clock,
    relax,
    yield_thread,
)
from loraswarm.kernels.cpu.operations import run_item
from loraswarm.kernels.cpu.vectors import memory_of

WORDS = 32
FIRST_ARGUMENT = 2
COUNTER_WORDS = 16
DONE = 8
SPINS = 4096


class Shared(NamedTuple):
    """Bare pointers to what all threads use."""

    program: Any
    num_operations: int
    counters: Any
    clock: Any


@kernel
def execute(
    program: Any, counters: Any, clock: Any, scratch: Any, like: Any, num_threads: int
) -> None:
    """Run all operations of `program`; `scratch` [threads, floats] is each thread's own memory.

    `like` is an array of the element type, of any size.
    """
    shared = Shared(
        memory_of(program, 0), program.shape[0], memory_of(counters, 0), memory_of(clock, 0)
    )
    is_timed = clock.size > 0
    for thread in prange(num_threads):
        _work(
            shared,
            is_timed and thread == 0,
            memory_of(scratch, thread * scratch.shape[1]),
            memory_of(like, 0),
        )


@called
def _work(shared: Shared, is_timed: bool, scratch: Any, like: Any) -> None:
    """One thread's share of every operation."""
    for index in range(shared.num_operations):
        if is_timed:
            shared.clock[index] = read_clock()
        operation = moved(shared.program, index * WORDS)
        counter = moved(shared.counters, index * COUNTER_WORDS)
        kind, num_items = operation[0], operation[1]
        arguments = moved(operation, FIRST_ARGUMENT)
        num_done = 0
        item = add_atomically_at(counter, 0, 1)
        while item < num_items:
            run_item(kind, arguments, item, scratch, like)
            num_done += 1
            item = add_atomically_at(counter, 0, 1)
        if num_done > 0:
            add_atomically_at(counter, DONE, num_done)
        _wait_until(counter, num_items)
    if is_timed:
        shared.clock[shared.num_operations] = read_clock()


@called
def _wait_until(counter: Any, num_items: int) -> None:
    num_spins = 0
    while read_atomically(counter, DONE) < num_items:
        num_spins += 1
        if num_spins < SPINS:
            relax()
        else:
            yield_thread()
