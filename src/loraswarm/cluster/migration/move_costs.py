"""What a move costs its target, as measured: K and V over the link, or a prompt computed again.

Starts from figures and follows what is seen. Knows no requests. Asked by `from_view`; told by
whoever moves requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.cost_model import CostFigures, TransferCosts
from loraswarm.core.step_cost import ChunkWork, StepWork

KEPT_SHARE = 0.9
"""How much an average keeps of its past when it sees something new."""
FIRST_WEIGHT = 10.0
"""Figures weigh as much as this many observations of usual size."""
USUAL_BYTES = 64e6
USUAL_TOKENS = 512
LEAST_S = 1e-15


@dataclass(slots=True)
class _Pace:
    """Seconds seen where others were expected; both fade alike."""

    seconds: float
    expected_s: float

    def saw(self, expected_s: float, seconds: float) -> None:
        self.seconds = KEPT_SHARE * self.seconds + seconds
        self.expected_s = KEPT_SHARE * self.expected_s + expected_s

    @property
    def factor(self) -> float:
        return self.seconds / self.expected_s


class MoveCosts:
    """`link` is expected of K and V between two replicas, `message_s` is what any move takes."""

    def __init__(
        self, figures: CostFigures, link: TransferCosts | None = None, message_s: float = 0.001
    ) -> None:
        """Without a link's figures, replicas are taken to share a machine: its rate of copying."""
        self._link = link or link_within(figures, message_s)
        self._message_s = message_s
        self._token_s = prefill_token_s(figures, USUAL_TOKENS) + LEAST_S
        link_s = FIRST_WEIGHT * (self._link.seconds_for(USUAL_BYTES) + LEAST_S)
        token_s = FIRST_WEIGHT * self._token_s * USUAL_TOKENS
        self._link_pace = _Pace(link_s, link_s)
        self._token_pace = _Pace(token_s, token_s)

    def kv_s(self, num_bytes: int) -> float:
        """Seconds to bring K and V of so many bytes."""
        return self._message_s + self._link_pace.factor * self._link.seconds_for(num_bytes)

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds to compute so many tokens again."""
        return self._message_s + self._token_pace.factor * self._token_s * num_tokens

    def saw_kv(self, num_bytes: int, seconds: float) -> None:
        """K and V of so many bytes took so long from one replica's pages to the other's."""
        _check_seen("num_bytes", num_bytes, seconds)
        self._link_pace.saw(self._link.seconds_for(num_bytes) + LEAST_S, seconds)

    def saw_prefill(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of a moved request took so long to compute again."""
        _check_seen("num_tokens", num_tokens, seconds)
        self._token_pace.saw(self._token_s * num_tokens, seconds)


def link_within(figures: CostFigures, fixed_s: float) -> TransferCosts:
    """Between two processes of one machine."""
    return TransferCosts(fixed_s=fixed_s, byte_s=1.0 / figures.machine.copy_bytes_per_s)


def prefill_token_s(figures: CostFigures, num_tokens: int) -> float:
    """Seconds of a token in a chunk of so many, at the beginning of a prompt."""
    chunk = ChunkWork(num_tokens=num_tokens, num_computed=0)
    return figures.step_s(StepWork.of([chunk], figures.kv_token_bytes)) / num_tokens


def _check_seen(name: str, amount: int, seconds: float) -> None:
    if amount <= 0 or not seconds >= 0.0:
        raise ValueError(f"{name} is {amount} in {seconds} s; both must be positive")
