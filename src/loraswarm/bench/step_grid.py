"""Which steps are timed to know what any step costs: rows x distinct adapters x context, prompts.

Those that figures are fitted to vary one thing at a time where they can; those that the figures are
checked with are none of them, and mix everything. Plain data. Called by bench/calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loraswarm.bench.cost_fit import TimedStep, typical
from loraswarm.bench.step_times import SKIPPED_STEPS, Batch, StepTimer

ROWS = (1, 2, 4, 8, 16, 32, 48, 64)
FEW_ADAPTERS = 4
SHORT_CONTEXT = 32
CONTEXTS = ((1, 512), (1, 2048), (4, 512), (16, 256), (32, 256))  # rows, tokens of each
PROMPTS = (16, 32, 48, 128, 256, 500)
LONG_PROMPT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can run at once: rows, tokens of a step, of a sequence, and of all.

    A sequence takes whole pages of `page_tokens`.
    """

    num_sequences: int
    max_step_tokens: int
    max_model_len: int
    pool_tokens: int
    page_tokens: int

    def allow(self, batch: Batch, num_steps: int) -> bool:
        """Whether the batch can be run without preempting or ending any of it."""
        num_rows = len(batch.rows)
        lengths = [length for _, length in batch.prompts]
        read_steps = 1 + num_rows * batch.context // max(1, self.max_step_tokens - num_rows)
        context = batch.context + read_steps + SKIPPED_STEPS + num_steps + 1
        longest = max([context if num_rows else 0, *(length + 1 for length in lengths)])
        held = [context] * num_rows + [length + 1 for length in lengths]
        is_step = len(lengths) == 1 and not num_rows
        return (
            num_rows + len(lengths) <= self.num_sequences
            and longest <= self.max_model_len
            and sum(map(self._paged, held)) <= self.pool_tokens
            and (is_step or num_rows + sum(lengths) <= self.max_step_tokens)
        )

    def _paged(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens) * self.page_tokens


def fitted_batches(adapters: Sequence[str]) -> list[Batch]:
    """What figures are fitted to; `adapters` should be of several sizes."""
    batches = []
    for place, num_rows in enumerate(ROWS):
        for num_adapters in sorted({0, 1, min(FEW_ADAPTERS, num_rows), num_rows}):
            if num_adapters > len(adapters):
                continue
            rows = rotated(adapters, num_rows, num_adapters, place)
            label = f"{num_rows} rows, {num_adapters} adapters"
            batches.append(Batch(label, rows, SHORT_CONTEXT))
    for num_rows, context in CONTEXTS:
        batches.append(Batch(f"{num_rows} rows of {context}", (None,) * num_rows, context))
    for length in PROMPTS:
        for adapter in (None, adapters[0], adapters[-1]):
            label = f"prompt of {length}, {adapter or 'base'}"
            batches.append(Batch(label, prompts=((adapter, length),)))
    batches.append(Batch(f"prompt of {LONG_PROMPT}", prompts=((None, LONG_PROMPT),)))
    return batches


def checked_batches(adapters: Sequence[str]) -> list[Batch]:
    """What figures are checked with: other sizes, and decodes beside prompts."""

    def mix(num_rows: int, num_adapters: int, place: int) -> tuple[str | None, ...]:
        return rotated(adapters, num_rows, min(num_adapters, len(adapters)), place)

    several = tuple((adapter, 100) for adapter in mix(3, 3, 5))
    return [
        Batch("3 rows of 133, 2 adapters", mix(3, 2, 1), 133),
        Batch("7 rows of 100, 7 adapters", mix(7, 7, 2), 100),
        Batch("12 rows of 200, 12 adapters", mix(12, 12, 3), 200),
        Batch("24 rows of 133, 5 adapters", mix(24, 5, 4), 133),
        Batch("24 rows of 64, base", (None,) * 24, 64),
        Batch("40 rows of 64, 16 adapters", mix(40, 16, 1), 64),
        Batch("prompt of 200", prompts=((mix(1, 1, 2)[0], 200),)),
        Batch("3 prompts of 100, 3 adapters", prompts=several),
        Batch("15 rows and a prompt of 128", (None,) * 15, 64, ((None, 128),)),
        Batch("8 rows and a prompt of 256, 8 adapters", mix(8, 8, 3), 64, ((adapters[0], 256),)),
    ]


def rotated(
    adapters: Sequence[str], num_rows: int, num_distinct: int, place: int
) -> tuple[str | None, ...]:
    """An adapter for each row, of so many in turn from `place` on; the base if of none."""
    if num_distinct == 0:
        return (None,) * num_rows
    return tuple(adapters[(place + i % num_distinct) % len(adapters)] for i in range(num_rows))


def time_batches(
    timer: StepTimer,
    batches: Sequence[Batch],
    num_rounds: int,
    num_steps: int,
    report: Callable[[str], None],
) -> list[TimedStep]:
    """Each step once, from rounds of all batches, so that a change of the machine's speed meets all
    alike."""
    timed: list[TimedStep] = []
    for number in range(num_rounds):
        report(f"timing steps round={number + 1} of {num_rounds}")
        for batch in batches:
            timed += timer.time(batch, num_steps)
    return typical(timed)


def possible(
    batches: Iterable[Batch], limits: Limits, num_steps: int, report: Callable[[str], None]
) -> list[Batch]:
    """Those that the engine can run; the others are reported."""
    found = []
    for batch in batches:
        if limits.allow(batch, num_steps):
            found.append(batch)
        else:
            report(f"left out, since this engine cannot run it at once: {batch.label}")
    return found
