"""Limits that a good request keeps, as written on the command line.

Knows nothing about how metrics are measured. Used by bench/metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraswarm.errors import ConfigError

FORM = 'for example "ttft:0.5 itl:0.05 latency:5" (seconds; any of the three, each once)'
FIELD_OF_KEY = {
    "ttft": "time_to_first_token_s",
    "itl": "inter_token_latency_s",
    "latency": "request_latency_s",
}


@dataclass(frozen=True, slots=True)
class Goodput:
    """The most that each metric of a good request may be; None: any. At least one is set."""

    time_to_first_token_s: float | None = None
    inter_token_latency_s: float | None = None
    request_latency_s: float | None = None


def parse_goodput(text: str) -> Goodput:
    """Read limits such as `ttft:0.5 itl:0.05 latency:5`, in seconds.

    Raises   ConfigError that names the part that cannot be read.
    """
    limits: dict[str, float] = {}
    for part in text.split():
        key, _, number = part.partition(":")
        field = FIELD_OF_KEY.get(key)
        limit = _positive(number)
        if field is None or limit is None or field in limits:
            raise ConfigError(f"goodput has {part!r}; write {FORM}")
        limits[field] = limit
    if not limits:
        raise ConfigError(f"goodput is {text!r}; write {FORM}")
    return Goodput(**limits)


def _positive(text: str) -> float | None:
    """A finite number above 0, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None
