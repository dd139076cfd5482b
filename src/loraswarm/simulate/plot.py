"""A picture of policies side by side: a panel for each figure, a group of bars for each trace.

Matplotlib is imported when a picture is made; it is in the extra `bench`. Knows no runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loraswarm.errors import ConfigError
from loraswarm.simulate.compare import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIX = ".png"
INCHES = (15.0, 13.0)
DOTS_PER_INCH = 110
WIDTH = 0.8
Panel = tuple[str, str, bool]
"""A figure's name, its title, and whether its axis is logarithmic."""
PANELS: Sequence[Panel] = (
    ("mean_latency_s", "Mean latency, s", True),
    ("p99_latency_s", "p99 latency, s", True),
    ("output_tokens_per_s", "Output tokens/s", False),
    ("merged_share", "Share merged", False),
    ("switches_per_minute", "Switches a minute", False),
)


class OnTrace(Protocol):
    """Figures of one policy on one trace."""

    @property
    def trace(self) -> str: ...

    @property
    def policy(self) -> str: ...


def check_plot(path: str) -> None:
    """See that a picture can be made, before the runs are begun for it.

    Raises   ConfigError for another suffix than .png, and without Matplotlib.
    """
    if Path(path).suffix.lower() != SUFFIX:
        raise ConfigError(f"--plot is {path!r}; it must end with {SUFFIX}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs Matplotlib: pip install 'loraswarm[bench]'")


def plot(found: Sequence[Figures], path: str) -> None:
    """Write the picture."""
    draw(found, PANELS, path)


def draw(found: Sequence[OnTrace], panels: Sequence[Panel], path: str) -> None:
    """Write a picture of these panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    for place, (name, title, is_logarithmic) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, place)
        draw_panel(axes, found, name)
        axes.set_title(title, loc="left", fontsize=10)
        if is_logarithmic:
            axes.set_yscale("log")
    figure.axes[0].legend(ncols=len(figure.axes), fontsize=8)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def draw_panel(axes: Axes, found: Sequence[OnTrace], name: str) -> None:
    """One figure: traces along the axis, a bar for each policy."""
    traces = list(dict.fromkeys(one.trace for one in found))
    policies = list(dict.fromkeys(one.policy for one in found))
    for number, policy in enumerate(policies):
        values = {one.trace: getattr(one, name) for one in found if one.policy == policy}
        shift = (number - (len(policies) - 1) / 2) * WIDTH / len(policies)
        places = [traces.index(trace) + shift for trace in values]
        axes.bar(places, list(values.values()), WIDTH / len(policies), label=policy)
    axes.set_xticks(range(len(traces)), traces, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
