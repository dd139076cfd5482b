"""A device that computes a step as late as it may, over pages that hold the tokens written there.

A step's page tables are those of its launch, and it writes and reads pages when it is waited for:
whatever has become of them in between shows. Results do not exist before. No torch.
"""

from __future__ import annotations

from loraswarm.core.events import ErrorInfo
from loraswarm.engine.step import ChunkResult, ScheduledChunk, Step
from loraswarm.memory.memory import Memory
from scheduler_cases import next_token

END = 0
FAILED = ErrorInfo("not finite", "engine_error", 500)


def drawn_after(token_ids: list[int]) -> int | None:
    """The stand-in model's next token, often the end token; None: the row is not finite."""
    token = next_token(token_ids)
    if token % 61 == 0:
        return None
    return END if token % 23 == 0 else token


class LateDevice:
    """Begins steps for LookAhead, and watches the pages of those under way."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.cells: dict[tuple[int, int], int] = {}
        self.under_way: list[LateStep] = []
        self.num_void_rows = 0
        free, allocate = memory.pool.free, memory.pool.allocate

        def watched_free(owner):
            self._require_unused(memory.pool.pages_of(owner))
            return free(owner)

        def watched_allocate(num_pages, owner):
            pages = allocate(num_pages, owner)
            self._require_unused(pages)
            return pages

        memory.pool.free, memory.pool.allocate = watched_free, watched_allocate

    def launch(self, step: Step, kv_cache, before: LateStep | None = None) -> LateStep:
        assert all(each is before for each in self.under_way), "more than one step ahead"
        launched = LateStep(self, step, kv_cache, before)
        self.under_way.append(launched)
        return launched

    def _require_unused(self, pages) -> None:
        for launched in self.under_way:
            assert not launched.pages & set(pages), "pages of a step under way change hands"


class LateStep:
    """A step under way, and what it was launched with."""

    def __init__(self, device: LateDevice, step: Step, kv_cache, before: LateStep | None):
        self._device, self._step, self._before = device, step, before
        self._rows = [
            (
                chunk.begin,
                chunk.end,
                chunk.sequence.token_ids[chunk.begin : chunk.end],
                list(kv_cache.pages_of(chunk.sequence.request_id)),
                chunk.samples,
            )
            for chunk in step.chunks
        ]
        self._page_tokens = kv_cache.page_tokens
        assert all(len(row[3]) * self._page_tokens >= row[1] for row in self._rows)
        self.pages = {page for row in self._rows for page in row[3]}
        self._drawn: list[int | None] | None = None

    def wait(self) -> list[ChunkResult]:
        drawn, samples = self.drawn(), [row[4] for row in self._rows]
        self._device.under_way.remove(self)
        return [
            ChunkResult(token, error=FAILED if is_sampled and token is None else None)
            for token, is_sampled in zip(drawn, samples, strict=True)
        ]

    def drawn(self) -> list[int | None]:
        """The token of each chunk: computed now, once."""
        if self._drawn is None:
            before = [] if self._before is None else self._before.drawn()
            self._before = None
            self._drawn = [
                self._compute(chunk, row, before[index] if before else None)
                for index, (chunk, row) in enumerate(
                    zip(self._step.chunks, self._rows, strict=True)
                )
            ]
        return self._drawn

    def _compute(self, chunk: ScheduledChunk, row, token_before: int | None) -> int | None:
        begin, end, known, pages, samples = row
        adapters = self._device.memory.adapters
        assert all(adapters.is_ready(key) for key in chunk.sequence.adapter_keys)
        cells = [(pages[i // self._page_tokens], i % self._page_tokens) for i in range(end)]
        tokens = known or [1 if token_before is None else token_before]
        assert len(tokens) == end - begin
        self._device.cells.update(zip(cells[begin:], tokens, strict=True))
        context = [self._device.cells[cell] for cell in cells]
        expected = chunk.sequence.token_ids[:end]
        assert context[: len(expected)] == expected, "pages were written under a running step"
        return drawn_after(context) if samples else None
