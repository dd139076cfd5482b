"""Pure decisions of the scheduler: who is next, who gives way. No torch, no clock.

A policy sees sequences and answers; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from loraswarm.core.sequence import Sequence


class Policy(Protocol):
    """What the scheduler asks."""

    def next_waiting(self, waiting: Seq[Sequence]) -> Sequence:
        """The sequence to admit next; `waiting` is not empty, oldest first."""
        ...

    def victim(self, running: Seq[Sequence]) -> Sequence:
        """The sequence to preempt when pages run out; `running` is not empty, oldest first."""
        ...


class FirstComeFirstServed:
    """Oldest first; the youngest running sequence gives way, so the oldest always finishes."""

    def next_waiting(self, waiting: Seq[Sequence]) -> Sequence:
        return waiting[0]

    def victim(self, running: Seq[Sequence]) -> Sequence:
        return running[-1]
