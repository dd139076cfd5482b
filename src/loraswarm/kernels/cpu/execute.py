"""Walks through a program: operations one after another, each spread over the threads.

Every thread that takes part walks through the whole program. It takes items of an operation until
none is left, and goes on when all of them are done, whoever did them; a thread that the machine has
put aside between two items holds up nobody, and one that comes late joins where the others are. A
program may still grow while it is walked through. Called by kernels/cpu/team.

    words     [operations, WORDS] int64: kind, number of items, then the operation's own arguments
    counters  [operations, COUNTER_WORDS] int64 of zeros: the next item, and the items done
    state     int64: how many operations there are, whether that is all, who is in
    clock     [operations + 1] int64, when a thread came to an operation, and to the end
"""

from __future__ import annotations

from typing import Any, NamedTuple

from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import (
    add_atomically_at,
    moved,
    read_atomically,
    read_clock,
    relax,
    yield_thread,
)
from loraswarm.kernels.cpu.operations import run_item

LINE_WORDS = 8
"""int64 in a cache line; what different threads write lies in lines of its own."""
WORDS = 32
FIRST_ARGUMENT = 2
DONE = LINE_WORDS
COUNTER_WORDS = 2 * LINE_WORDS
NUM_READY, IS_CLOSED, NUM_ENTERED, NUM_LEFT = (LINE_WORDS * line for line in range(4))
STATE_WORDS = 4 * LINE_WORDS
SPINS = 4096


class Walk(NamedTuple):
    """Bare pointers to a program and to what all its threads share; `clock` is not shared."""

    words: Any
    counters: Any
    state: Any
    clock: Any
    is_timed: bool


@called
def walk_program(walk: Walk, scratch: Any, like: Any) -> None:
    """One thread's share of every operation; `scratch` is its own memory, `like` points to elements
    of the program's type."""
    index = 0
    while _comes(walk.state, index):
        if walk.is_timed:
            walk.clock[index] = read_clock()
        operation = moved(walk.words, index * WORDS)
        counter = moved(walk.counters, index * COUNTER_WORDS)
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
        wait_until(counter, DONE, num_items)
        index += 1
    if walk.is_timed:
        walk.clock[index] = read_clock()


@called
def _comes(state: Any, index: int) -> bool:
    """Whether there is an operation with this number, as soon as that is known."""
    num_spins = 0
    while read_atomically(state, NUM_READY) <= index:
        if read_atomically(state, IS_CLOSED) != 0:
            return bool(read_atomically(state, NUM_READY) > index)
        num_spins += 1
        _pause(num_spins)
    return True


@called
def wait_until(memory: Any, word: int, least: int) -> None:
    """Return when a number in memory is at least `least`."""
    num_spins = 0
    while read_atomically(memory, word) < least:
        num_spins += 1
        _pause(num_spins)


@called
def _pause(num_spins: int) -> None:
    """Wait a little; if it has taken long, let others have the core."""
    if num_spins < SPINS:
        relax()
    else:
        yield_thread()
