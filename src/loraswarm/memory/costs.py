"""What it costs to bring back what has left memory, in seconds as measured on this machine.

Starts from plausible figures and follows what the engine reports. Knows no adapters and no pages.
Asked when something becomes evictable; told by the engine after loads, copies and prefill steps.
"""

from __future__ import annotations

from dataclasses import dataclass

KEPT_SHARE = 0.9
"""How much an average keeps of its past when it sees something new."""
LOAD_STEPS = 6
"""Steps that a request is taken to lose by a load, beside the copy: it joins a later step, and the
copy takes bandwidth from all others. A larger figure trades hits of prefixes for hits of adapters
(benchmarks/eviction.py)."""
ATTENTION_TOKENS = 8192
"""Position at which attention is taken to cost a token as much as everything else."""


@dataclass(slots=True)
class _Pace:
    """Seconds per unit, an exponential average in which every observation weighs by its amount."""

    seconds: float
    amount: float

    def saw(self, amount: int, seconds: float) -> None:
        assert amount > 0
        assert seconds >= 0
        self.seconds = KEPT_SHARE * self.seconds + seconds
        self.amount = KEPT_SHARE * self.amount + amount

    def seconds_for(self, amount: float) -> float:
        return self.seconds * amount / self.amount


class CostModel:
    """Seconds to read and pack an adapter, to copy it into pages, and to compute a prefix page.

    Before anything is seen: 500 MB/s from a store, 5 GB/s into pages, 1,000 prefill tokens a
    second, 50 ms a step, each worth one small observation.
    """

    def __init__(self) -> None:
        self._read = _Pace(0.002, 1e6)
        self._copy = _Pace(0.0002, 1e6)
        self._prefill = _Pace(0.016, 16)
        self._step = _Pace(0.05, 1.0)

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
        return self._prefill.seconds_for(page_tokens * (1.0 + position / ATTENTION_TOKENS))
