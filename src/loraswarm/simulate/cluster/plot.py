"""A picture of policies on a cluster: a panel for each figure, a group of bars for each trace.

Matplotlib is imported when a picture is made; it is in the extra `bench`. Knows no runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraswarm.simulate.cluster.compare import Figures
from loraswarm.simulate.plot import Panel, draw

PANELS: Sequence[Panel] = (
    ("mean_latency_s", "Mean latency, s", True),
    ("p99_latency_s", "p99 latency, s", True),
    ("p99_first_token_s", "p99 time to the first token, s", True),
    ("output_tokens_per_s", "Output tokens/s", False),
    ("num_moves", "Requests moved", False),
    ("num_loads", "Adapters loaded from their store", False),
)


def plot(found: Sequence[Figures], path: str) -> None:
    """Write the picture."""
    draw(found, PANELS, path)
