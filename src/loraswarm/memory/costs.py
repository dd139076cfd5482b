"""What it costs to bring back what has left memory, in seconds as measured on this machine.

Starts from plausible figures, or from those that this machine was measured to have, and follows
what the engine reports. Knows no adapters and no pages. Asked when something becomes evictable;
told by the engine after loads, copies and prefill steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import ChunkWork, StepWork

KEPT_SHARE = 0.9
"""How much an average keeps of its past when it sees something new."""
LOAD_STEPS = 6
"""Steps that a request is taken to lose by a load, beside the copy: it joins a later step, and the
copy takes bandwidth from all others. A larger figure trades hits of prefixes for hits of adapters
(benchmarks/eviction.py)."""
ATTENTION_TOKENS = 8192.0
"""Position at which attention is taken to cost a token as much as everything else."""
MEASURED_WEIGHT = 10.0
"""Measured figures weigh as much as this many of the plausible ones: as an average's whole past."""
LEAST_S = 1e-15
TYPICAL_BYTES = 1e6
TYPICAL_CHUNK_TOKENS = 512
TYPICAL_DECODES = 16
TYPICAL_CONTEXT = 256


@dataclass(slots=True)
class _Pace:
    """Seconds that amounts take: `expected` of the amount, times how far that is off.

    How far is an exponential average in which every observation weighs by the seconds expected of
    it: `seconds` were seen where `expected_s` were expected.
    """

    expected: Callable[[float], float]
    seconds: float
    expected_s: float

    @classmethod
    def of(cls, expected: Callable[[float], float], amount: float, weight: float = 1.0) -> _Pace:
        """As if the expected had been seen of that amount, so many times."""
        seconds = weight * expected(amount)
        return cls(expected, seconds, seconds)

    def saw(self, amount: int, seconds: float) -> None:
        assert amount > 0
        assert seconds >= 0
        self.seconds = KEPT_SHARE * self.seconds + seconds
        self.expected_s = KEPT_SHARE * self.expected_s + self.expected(amount)

    def seconds_for(self, amount: float) -> float:
        return self.expected(amount) * self.seconds / self.expected_s


class CostModel:
    """Seconds to read and pack an adapter, to copy it into pages, and to compute a prefix page.

    Before anything is seen: what `figures` say, or else 500 MB/s from a store, 5 GB/s into pages,
    1,000 prefill tokens a second, 50 ms a step, each worth one small observation.
    """

    def __init__(self, figures: CostFigures | None = None) -> None:
        self._attention_tokens = ATTENTION_TOKENS
        if figures is None:
            self._read = _Pace.of(_proportional(2e-9), TYPICAL_BYTES)
            self._copy = _Pace.of(_proportional(2e-10), TYPICAL_BYTES)
            self._prefill = _Pace.of(_proportional(1e-3), 16)
            self._step = _Pace.of(_proportional(0.05), 1)
            return
        token_s, pair_s = _prefill_token_s(figures), figures.step.attention_pair_s
        if pair_s > 0:  # else the prompts were too short to tell
            self._attention_tokens = token_s / pair_s
        self._read = _measured(figures.load_s, TYPICAL_BYTES)
        self._copy = _measured(figures.copy_s, TYPICAL_BYTES)
        self._prefill = _measured(_proportional(token_s), 16)
        self._step = _measured(_proportional(_decode_s(figures)), 1)

    def saw_read(self, num_bytes: int, seconds: float) -> None:
        """An adapter of `num_bytes` packed bytes came from its store to the host."""
        self._read.saw(num_bytes, seconds)

    def saw_copy(self, num_bytes: int, seconds: float) -> None:
        """An adapter of `num_bytes` packed bytes came from the host to its pages."""
        self._copy.saw(num_bytes, seconds)

    def saw_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step computed `num_tokens` tokens of prompts."""
        self._prefill.saw(num_tokens, seconds)

    def saw_step(self, seconds: float) -> None:
        """A step of any kind took so long."""
        self._step.saw(1, seconds)

    def adapter_s(self, num_bytes: int, is_in_host: bool) -> float:
        """Seconds that a request loses if an adapter of `num_bytes` packed bytes has no pages."""
        seconds = self._step.seconds_for(LOAD_STEPS) + self._copy.seconds_for(num_bytes)
        return seconds if is_in_host else seconds + self._read.seconds_for(num_bytes)

    def prefix_page_s(self, page_tokens: int, position: int) -> float:
        """Seconds to compute a page of `page_tokens` tokens, the first at `position`, again."""
        return self._prefill.seconds_for(page_tokens * (1.0 + position / self._attention_tokens))


def _proportional(unit_s: float) -> Callable[[float], float]:
    return lambda amount: unit_s * amount


def _measured(expected: Callable[[float], float], amount: float) -> _Pace:
    """A fit may find that an amount costs nothing; an average is a ratio and needs something."""
    return _Pace.of(lambda some: expected(some) + LEAST_S * some, amount, MEASURED_WEIGHT)


def _prefill_token_s(figures: CostFigures) -> float:
    """Seconds of a token in a prefill chunk of usual size, at the beginning of a prompt."""
    chunk = ChunkWork(num_tokens=TYPICAL_CHUNK_TOKENS, num_computed=0)
    work = StepWork.of([chunk], figures.kv_token_bytes)
    return figures.step_s(work) / TYPICAL_CHUNK_TOKENS


def _decode_s(figures: CostFigures) -> float:
    """Seconds of a decode step of usual size."""
    chunk = ChunkWork(num_tokens=1, num_computed=TYPICAL_CONTEXT)
    return figures.step_s(StepWork.of([chunk] * TYPICAL_DECODES, figures.kv_token_bytes))
