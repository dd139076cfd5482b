"""What each picture of a result shows, drawn into axes that plot gives.

One line for each result and concurrency: a single result's concurrencies are shades of one scale,
several results are colours and their concurrencies dashes, the least the palest. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loraswarm.adapters.printable import one_line
from loraswarm.bench.figures import (
    FIRST_TOKEN,
    OUTPUT_TOKENS,
    Loop,
    by_adapter,
    by_loop,
    last_loop,
    loop_of,
)
from loraswarm.bench.reading import Point, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 24
MAX_BAR_NAME = 24
MAX_NOTED = 2
MAX_INSIDE = 6  # labels of a legend that covers no lines
MAX_NAME = 40
DASHES = ("solid", "dashed", "dotted", "dashdot")
ValueOf = Callable[[dict[str, Any]], float | None]


class Line(NamedTuple):
    """The runs of one result at one concurrency, and how they are drawn."""

    label: str
    points: list[Point]
    color: Any
    dashes: str


def draw_first_token(axes: Axes, results: Sequence[Result]) -> None:
    """The share of requests whose first token came within so many ms."""
    _draw_distribution(axes, results, first_token_s)
    axes.set_title("Time to first token")


def draw_between_tokens(axes: Axes, results: Sequence[Result]) -> None:
    """The share of requests whose inter-token latency is at most so many ms."""
    _draw_distribution(axes, results, between_tokens_s)
    axes.set_title("Inter-token latency, per request")


def draw_throughput(axes: Axes, results: Sequence[Result]) -> None:
    """Output tokens per second over requests in flight: every run, and a line of medians."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, result in enumerate(results):
        color = colors[number % len(colors)]
        runs = {key: found for key, found in by_loop(result["points"]).items() if key.is_complete}
        closed = {key.concurrency or 0: runs[key] for key in runs if not key.is_open}
        loops = sorted(closed)
        name = f"{_label(number, result)}, " if len(results) > 1 else ""
        if loops:
            medians = [OUTPUT_TOKENS.median_of(closed[key]) or 0.0 for key in loops]
            axes.plot(loops, medians, color=color, marker="o", label=f"{name}median")
            places = [key for key in loops for _ in closed[key]]
            rates = [row[OUTPUT_TOKENS.field] for key in loops for row in closed[key]]
            axes.scatter(places, rates, color=color, s=14, alpha=0.5)
        for key in filter(lambda one: one.is_open, runs):
            rate = OUTPUT_TOKENS.median_of(runs[key]) or 0.0
            label = f"{name}{_title(key)}"
            axes.axhline(rate, color=color, linestyle="dashed", label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _finish(axes, "requests in flight", OUTPUT_TOKENS.label)
    axes.set_title("Throughput")


def draw_adapters(axes: Axes, results: Sequence[Result]) -> None:
    """Time to first token by adapter, at the last concurrency of the first result."""
    runs = by_loop(results[0]["points"])
    loop = last_loop(runs)
    rows = by_adapter(runs[loop])
    names = list(rows)[:MAX_BARS]
    title = "Time to first token by adapter"
    title += f", {_title(loop)}"
    if len(rows) > len(names):
        title += f"\n{len(names)} of {len(rows):,} adapters: those with most requests"
    places = range(len(names))
    for figure, color in ((FIRST_TOKEN[-1], "#a6c8e4"), (FIRST_TOKEN[0], "#1f77b4")):
        values = [figure.median_of(rows[name]) or 0.0 for name in names]
        axes.bar(places, values, color=color, label=figure.label.rpartition(" ")[2])
    labels = [one_line(name, MAX_BAR_NAME).replace("$", r"\$") for name in names]
    axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor")
    _finish(axes, "", "ms")
    axes.grid(visible=False, axis="x")
    axes.set_title(title if len(results) == 1 else f"{title}\n{_label(0, results[0])}")


def first_token_s(record: dict[str, Any]) -> float | None:
    """As bench/metrics defines it, of a record in a result's JSON form; None if it failed."""
    if record["error"] is not None:
        return None
    return float(record["response_s"][0] - record["start_s"])


def between_tokens_s(record: dict[str, Any]) -> float | None:
    """Likewise; None also for an answer of one token."""
    if record["error"] is not None or record["num_output"] < 2:
        return None
    times = record["response_s"]
    return float((times[-1] - times[0]) / (record["num_output"] - 1))


def _draw_distribution(axes: Axes, results: Sequence[Result], value_of: ValueOf) -> None:
    missing = []
    for line in _lines(results):
        if not any("records" in point for point in line.points):
            missing.append(line.label)
            continue
        records = [record for point in line.points for record in point.get("records", [])]
        values = sorted(
            value * 1e3 for record in records if (value := value_of(record)) is not None
        )
        if values:
            axes.ecdf(values, color=line.color, linestyle=line.dashes, label=line.label)
    axes.set_ylim(0, 1.01)
    axes.set_xlim(left=0)
    _finish(axes, "\n".join(["ms", *_note(missing)]), "share of requests")


def _note(labels: Sequence[str]) -> list[str]:
    """Which lines could not be drawn, in a line below the axis."""
    if not labels:
        return []
    rest = f" and {len(labels) - MAX_NOTED} more" if len(labels) > MAX_NOTED else ""
    return [f"no records of {'; '.join(labels[:MAX_NOTED])}{rest}"]


def _lines(results: Sequence[Result]) -> Iterator[Line]:
    import matplotlib

    for number, result in enumerate(results):
        points: dict[Loop, list[Point]] = {}
        for point in result["points"]:
            points.setdefault(loop_of(point), []).append(point)
        for place, (loop, runs) in enumerate(points.items()):
            name = _title(loop)
            if len(results) == 1:
                shade = 0.9 * (place + 0.5) / len(points)
                yield Line(name, runs, matplotlib.colormaps["viridis"](shade), DASHES[0])
            else:
                share = (place + 1) / len(points)
                color = matplotlib.colormaps["tab10"](number % 10, alpha=0.3 + 0.7 * share)
                dashes = DASHES[place % len(DASHES)]
                yield Line(f"[{number + 1}] {name}", runs, color, dashes)


def _title(loop: Loop) -> str:
    return one_line(loop.title, MAX_NAME).replace("$", r"\$")


def _label(number: int, result: Result) -> str:
    """What a legend calls a result, counted from 1 as in comparisons; `$` would begin a formula."""
    return f"[{number + 1}] {one_line(result['target'], MAX_NAME)}".replace("$", r"\$")


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if num_labels := len(axes.get_legend_handles_labels()[1]):
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        place = beside if num_labels > MAX_INSIDE else {"loc": "best"}
        axes.legend(frameon=False, fontsize="small", **place)
