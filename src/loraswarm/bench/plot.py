"""Pictures of results: a PNG, or one HTML file that holds them as SVG.

Distributions of time to first token and of inter-token latency, throughput over concurrency, and
bars by adapter. Matplotlib is imported when a picture is made; it is in the extra `bench`.
"""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.bench.axes import (
    draw_adapters,
    draw_between_tokens,
    draw_first_token,
    draw_throughput,
)
from loraswarm.bench.reading import Result
from loraswarm.bench.table import table
from loraswarm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".html")
PNG_INCHES = (14.0, 9.5)
SVG_INCHES = (7.0, 4.6)
DOTS_PER_INCH = 120
Draw = Callable[["Axes", Sequence[Result]], None]
PICTURES: tuple[Draw, ...] = (
    draw_first_token,
    draw_between_tokens,
    draw_throughput,
    draw_adapters,
)
STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:1500px}"
    "pre{overflow-x:auto}svg{max-width:100%;height:auto}"
)


def check_plot(path: str | Path) -> None:
    """See that a picture can be made, before a long run is begun for it.

    Raises   ConfigError for another suffix than .png or .html, and without Matplotlib.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot is {str(path)!r}; it must end with {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs Matplotlib: pip install 'loraswarm[bench]'")


def plot(results: Result | Sequence[Result], path: str | Path) -> None:
    """Write pictures of one result or of several side by side to `path` (.png or .html).

    Distributions need the requests' records; a result without them is named where they would be.

    Raises   ConfigError as `check_plot` does.
    """
    check_plot(path)
    several = [results] if isinstance(results, dict) else list(results)
    if Path(path).suffix.lower() == ".png":
        _write_png(several, Path(path))
    else:
        _write_html(several, Path(path))


def _write_png(results: Sequence[Result], path: Path) -> None:
    figure = _figure(PNG_INCHES)
    for place, draw in enumerate(PICTURES, 1):
        draw(figure.add_subplot(2, 2, place), results)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _write_html(results: Sequence[Result], path: Path) -> None:
    tables = "\n".join(f"<pre>{html.escape(table(result))}</pre>" for result in results)
    pictures = "\n".join(_svg(draw, results) for draw in PICTURES)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>loraswarm bench</title><style>{STYLE}</style></head><body>\n"
        f"{pictures}\n{tables}\n</body></html>\n",
        encoding="utf-8",
    )


def _svg(draw: Draw, results: Sequence[Result]) -> str:
    """One picture as an <svg> element; what it refers to has names of its own."""
    import matplotlib

    figure = _figure(SVG_INCHES)
    draw(figure.add_subplot(), results)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(inches: tuple[float, float]) -> Figure:
    """A figure of its own, outside of pyplot: it needs no display and leaves no state."""
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained")
