"""One step ahead: a step is launched while the one before it runs, whose tokens stay on the device.

Else a device is idle while the host plans, prepares and commits. What is launched ahead is exactly
the step that would be planned, unless a sequence ends with a token that was not known: its row is
void then and dropped. Knows no tensors. Called by the engine.

    host      launch N+1 | wait N, commit N, send | launch N+2 | wait N+1, commit N+1 ...
    device    N ................. | N+1 ......................... | N+2 ...

Until the step ahead has been waited for, the scheduler releases no page of its sequences and plans
nothing else: no page is given away under a running step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.step import ChunkResult, ScheduledChunk, Step
from loraswarm.memory.kv_cache import KVCache


class Launched(Protocol):
    """A step under way."""

    def wait(self) -> list[ChunkResult]:
        """Its results, in the order of its chunks."""
        ...


T = TypeVar("T", bound=Launched)


class Launcher(Protocol[T]):
    """What begins steps: engine/model_runner, or a stand-in for it."""

    def launch(self, step: Step, kv_cache: KVCache, before: T | None = None) -> T:
        """Begin a step; the tokens of one that was foreseen are those that `before` draws."""
        ...


@dataclass(frozen=True, slots=True)
class _Flight(Generic[T]):
    step: Step
    launched: T
    start_s: float


class LookAhead(Generic[T]):
    """The steps of one engine, at most one of them ahead."""

    def __init__(
        self, launcher: Launcher[T], scheduler: Scheduler, kv_cache: KVCache, is_on: bool
    ) -> None:
        """`is_on`: where the device computes beside the host; else nothing is gained."""
        self._launcher = launcher
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._flight: _Flight[T] | None = None
        self._landed_s = 0.0
        self.is_on = is_on
        self.num_ahead = 0

    @property
    def step(self) -> Step | None:
        """The step ahead, which must be run next."""
        return None if self._flight is None else self._flight.step

    def run(self, step: Step, may_look_ahead: bool) -> tuple[list[ChunkResult], float]:
        """Results of a step, and the seconds it took; the next one may be under way then.

        They must be committed before anything else is asked of the scheduler.
        """
        flight = self._flight or self._launch(step, None)
        assert flight.step is step, "another step is under way"
        self._flight = None
        if self.is_on and may_look_ahead:
            self._try_launch_next(flight)
        results = flight.launched.wait()
        if self._flight is None:
            self._scheduler.settle()
        begun_s, self._landed_s = max(flight.start_s, self._landed_s), time.perf_counter()
        return results, self._landed_s - begun_s

    def drop_void(self) -> None:
        """Wait for the step ahead and forget it, if all its sequences have ended."""
        if self._flight is not None and not self._scheduler.num_running:
            self._flight.launched.wait()
            self._flight = None
            self._scheduler.settle()

    def _try_launch_next(self, flight: _Flight[T]) -> None:
        following = foresee(flight.step)
        if following is not None and self._scheduler.try_extend(following):
            self._flight = self._launch(following, flight.launched)
            self.num_ahead += 1

    def _launch(self, step: Step, before: T | None) -> _Flight[T]:
        start_s = time.perf_counter()
        return _Flight(step, self._launcher.launch(step, self._kv_cache, before), start_s)


def foresee(step: Step) -> Step | None:
    """The step after one that has not been committed, as far as its sequences tell; None if it
    depends on more than the tokens that are drawn."""
    if not all(map(_goes_on, step.chunks)):
        return None
    return Step(tuple([ScheduledChunk(chunk.sequence, 1, chunk.end) for chunk in step.chunks]))


def _goes_on(chunk: ScheduledChunk) -> bool:
    """Whether it decodes, is not the last of its sequence for certain, and the next token is
    computed with the same adapters."""
    sequence = chunk.sequence
    is_decode = chunk.num_tokens == 1 and chunk.samples
    has_more = sequence.num_output + 1 < sequence.max_tokens
    return is_decode and has_more and sequence.first_adapted <= chunk.begin
