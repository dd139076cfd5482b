"""Times single steps of an engine whose work is known.

Requests are arranged so that there is only one step the scheduler can make of them; how many tokens
came out says whether it did. Knows nothing about fits. Called by bench/step_grid, in the engine's
thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.bench.cost_fit import TimedStep
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.errors import EngineError

if TYPE_CHECKING:
    from loraswarm.core.events import SequenceEvent
    from loraswarm.engine.engine import Engine

Clock = Callable[[], float]
SKIPPED_STEPS = 1  # the first of a batch makes the tables of its adapters
PROMPT_STRIDE = 7919


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoding rows, and prompts that come in one step: adapters (None: base) and lengths.

    Each row has read about `context` tokens.
    """

    label: str
    rows: tuple[str | None, ...] = ()
    context: int = 0
    prompts: tuple[tuple[str | None, int], ...] = ()


class StepTimer:
    """Runs batches on an engine without other requests or a prefix cache, whose steps have at most
    `max_step_tokens` tokens. `adapter_bytes` are those of adapters in pages, all of them there."""

    def __init__(
        self,
        engine: Engine,
        adapter_bytes: Mapping[str, int],
        max_step_tokens: int,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._bytes = adapter_bytes
        self._max_step_tokens = max_step_tokens
        self._clock = clock
        self._ids = itertools.count()
        self._num_tokens: dict[str, int] = {}  # of each open request, prompt and output
        self._adapters: dict[str, str | None] = {}

    def time(self, batch: Batch, num_steps: int) -> list[TimedStep]:
        """A batch's steps: `num_steps` of a batch that only decodes, else those that read its
        prompts, one if they fit a step."""
        rows = self._start_rows(batch)
        try:
            if not batch.prompts:
                timed = [self._decode(batch, rows) for _ in range(SKIPPED_STEPS + num_steps)]
                return timed[SKIPPED_STEPS:]
            return self._prefill(batch, rows)
        finally:
            self._engine.abort_all()
            self._num_tokens.clear()

    def _start_rows(self, batch: Batch) -> list[str]:
        """Requests that have all read their prompts, the last just now."""
        rows = [self._add(adapter, batch.context) for adapter in batch.rows]
        waiting = set(rows)
        while waiting:
            waiting -= {event.request_id for event in self._step()[1]}
        return rows

    def _decode(self, batch: Batch, rows: Sequence[str]) -> TimedStep:
        return self._timed(batch.label, [self._row_work(row) for row in rows])

    def _prefill(self, batch: Batch, rows: Sequence[str]) -> list[TimedStep]:
        prompts = [self._add(adapter, length) for adapter, length in batch.prompts]
        if len(prompts) > 1 or rows:
            lengths = [length for _, length in batch.prompts]
            assert len(rows) + sum(lengths) <= self._max_step_tokens, "prompts must fit a step"
        if len(prompts) == 1:
            return self._read_prompt(batch, rows, prompts[0])
        work = [self._row_work(row) for row in rows]
        work += [self._prompt_work(prompt, 0, self._num_tokens[prompt]) for prompt in prompts]
        return [self._timed(batch.label, work)]

    def _read_prompt(self, batch: Batch, rows: Sequence[str], prompt: str) -> list[TimedStep]:
        """Steps that read one prompt, each as much as fits."""
        timed: list[TimedStep] = []
        length, num_read = self._num_tokens[prompt], 0
        while num_read < length:
            count = min(length - num_read, self._max_step_tokens - len(rows))
            work = [self._row_work(row) for row in rows]
            work.append(self._prompt_work(prompt, num_read, count))
            timed.append(self._timed(f"{batch.label} from {num_read}", work))
            num_read += count
        return timed

    def _row_work(self, name: str) -> ChunkWork:
        adapter = self._adapters[name]
        return ChunkWork(
            num_tokens=1,
            num_computed=self._num_tokens[name] - 1,
            adapter=adapter,
            adapter_bytes=0 if adapter is None else self._bytes[adapter],
        )

    def _prompt_work(self, name: str, num_read: int, count: int) -> ChunkWork:
        adapter = self._adapters[name]
        return ChunkWork(
            num_tokens=count,
            num_computed=num_read,
            adapter=adapter,
            adapter_bytes=0 if adapter is None else self._bytes[adapter],
            samples=num_read + count == self._num_tokens[name],
        )

    def _timed(self, label: str, chunks: Sequence[ChunkWork]) -> TimedStep:
        """The next step, which must be these chunks."""
        info = self._engine.info
        work = StepWork.of(chunks, info.page_bytes // info.page_tokens)
        seconds, events = self._step()
        if len(events) != work.num_logit_rows:
            raise EngineError(
                f"a step of {label!r} gave {len(events)} tokens where {work.num_logit_rows} were "
                "expected: what it did is not known"
            )
        return TimedStep(label, work, seconds)

    def _step(self) -> tuple[float, list[SequenceEvent]]:
        begin_s = self._clock()
        events = self._engine.step()
        seconds = self._clock() - begin_s
        for event in events:
            if event.error is not None:
                raise EngineError(f"a step could not be timed: {event.error.message}")
            self._num_tokens[event.request_id] += len(event.token_ids)
        return seconds, events

    def _add(self, adapter: str | None, num_prompt: int) -> str:
        number = next(self._ids)
        name = f"calibrate-{number}"
        num_ids = self._engine.info.vocab_size
        prompt = tuple((number * PROMPT_STRIDE + i * 31) % num_ids for i in range(num_prompt))
        params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        self._num_tokens[name] = num_prompt
        self._adapters[name] = adapter
        self._engine.add(
            Request(request_id=name, prompt_token_ids=prompt, params=params, adapter=adapter)
        )
        return name
