"""Pictures of results: what is drawn is what was measured, and files are what they say."""

from __future__ import annotations

import importlib.util
import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from bench_cases import point, record, result, steady_point
from loraswarm.bench.axes import (
    MAX_BARS,
    between_tokens_s,
    draw_adapters,
    draw_between_tokens,
    draw_first_token,
    draw_throughput,
    first_token_s,
)
from loraswarm.bench.metrics import metrics_of, summarize
from loraswarm.bench.plot import check_plot, plot
from loraswarm.bench.report import point_of, without_records
from loraswarm.errors import ConfigError


def drawn(draw, *results):
    axes = Figure().add_subplot()
    draw(axes, results)
    return axes


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def uneven():
    """Seven requests, of which the fourth failed: first tokens after 0.1 to 0.7 s."""
    records = [record(n, 0.1 * (n + 1), 0.01 * (n + 1)) for n in range(7)]
    records[3] = record(3, error="gone")
    return records


def test_distributions_are_those_of_the_requests_that_succeeded():
    axes = drawn(draw_first_token, result(point(uneven())))
    (line,) = axes.get_lines()
    values = [x for x in line.get_xdata() if x > float("-inf")]
    assert sorted(set(values)) == pytest.approx([100, 200, 300, 500, 600, 700])
    assert line.get_ydata()[-1] == 1.0
    axes = drawn(draw_between_tokens, result(point(uneven())))
    values = [x for x in axes.get_lines()[0].get_xdata() if x > float("-inf")]
    assert sorted(set(values)) == pytest.approx([10, 20, 30, 50, 60, 70], abs=1e-6)


def test_repeats_are_one_distribution_and_concurrencies_are_several():
    runs = [steady_point(0.1), steady_point(0.2), steady_point(0.3, concurrency=8)]
    axes = drawn(draw_first_token, result(*runs))
    assert labels(axes) == ["3 in flight", "8 in flight"]
    first = axes.get_lines()[0].get_xdata()
    assert sorted({round(x) for x in first if x > float("-inf")}) == [100, 200]


def test_a_request_has_the_metrics_that_summaries_are_made_of():
    for one in [*uneven(), record(0, 0.3, 0.0)]:
        found = metrics_of(one)
        stored = point_of(1, summarize([one]), [one])["records"][0]
        assert first_token_s(stored) == (found and found.time_to_first_token_s)
        expected = found and found.inter_token_latency_s
        assert between_tokens_s(stored) == (
            expected if expected is None else pytest.approx(expected)
        )


def test_results_without_records_are_named_where_their_distribution_would_be():
    whole, short = result(steady_point()), without_records(result(steady_point(), target="bare"))
    axes = drawn(draw_first_token, whole, short)
    assert len(axes.get_lines()) == 1
    assert axes.get_xlabel() == "ms\nno records of [2] 3 in flight"
    assert drawn(draw_first_token, whole).get_xlabel() == "ms"


def test_lines_of_several_results_are_told_apart():
    many = result(*(steady_point(0.1, concurrency) for concurrency in (1, 2, 4, 8, 16)))
    axes = drawn(draw_first_token, many, many)
    styles = [(line.get_color(), line.get_linestyle()) for line in axes.get_lines()]
    assert len(set(styles)) == 10
    assert labels(axes)[::5] == ["[1] 1 in flight", "[2] 1 in flight"]


def test_throughput_is_a_line_of_medians_and_every_run():
    runs = [steady_point(0.2), steady_point(0.9), steady_point(0.3), steady_point(0.5, 8)]
    axes = drawn(draw_throughput, result(*runs))
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [3, 8]
    assert list(line.get_ydata()) == pytest.approx([35 / 6.7, 35 / 6.9])
    (scatter,) = axes.collections
    assert len(scatter.get_offsets()) == 4


def test_throughput_of_an_open_loop_is_a_level():
    axes = drawn(draw_throughput, result(steady_point(0.5, concurrency=None)))
    assert labels(axes) == ["open loop"]
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([35 / 6.9] * 2)


def test_bars_are_by_adapter_at_the_last_concurrency():
    axes = drawn(draw_adapters, result(steady_point(0.9, 1), point(uneven(), 3)))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["sql", "(base)", "pirate"]
    p99, p50 = axes.containers
    # sql: first tokens after 0.1 and 0.7 s, its third request failed.
    assert [bar.get_height() for bar in p50] == pytest.approx([400, 450, 350])
    assert p99[0].get_height() == pytest.approx(694)
    assert axes.get_title().endswith("3 in flight")


def test_bars_of_more_adapters_than_fit_say_so():
    run = steady_point()
    run["summary"]["per_adapter"] = {
        f"a{number}": run["summary"]["per_adapter"]["sql"] for number in range(133)
    }
    axes = drawn(draw_adapters, result(run))
    assert len(axes.containers[0]) == MAX_BARS
    assert f"{MAX_BARS} of 133 adapters" in axes.get_title()


def test_a_png_is_written(tmp_path):
    plot(result(point(uneven())), tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG\r\n")


def test_names_that_mean_something_to_a_picture_are_drawn_as_they_are(tmp_path):
    run = steady_point()
    rows = run["summary"]["per_adapter"]
    rows |= {r"$\frac{": rows["sql"], "_a": rows["sql"], "<b>&": rows["sql"], "\x1b": rows["sql"]}
    hostile = result(run, target=r"http://$\nonsense{<script>")
    for name in ("a.png", "a.html"):
        plot([hostile, hostile], tmp_path / name)
    assert "<script>" not in (tmp_path / "a.html").read_text()


def test_an_html_page_holds_four_pictures_and_needs_nothing_else(tmp_path):
    plot([result(steady_point(0.2)), result(steady_point(0.3))], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    pictures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4
    meant = {}  # what an id refers to must be the same in all pictures of the page
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        texts = {one.get("id"): ElementTree.tostring(one).strip() for one in root.iter()}
        for name in set(re.findall(r'(?:href="|url\()#([^")]+)', picture)):
            assert meant.setdefault(name, texts[name]) == texts[name]
    assert meant
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "TTFT, ms p50" in page


def test_the_result_is_not_changed_by_drawing_it(tmp_path):
    whole = result(steady_point())
    before = repr(whole)
    plot(whole, tmp_path / "a.html")
    assert repr(whole) == before


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, tmp_path):
    check_plot("a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'loraswarm\[bench\]'"):
        plot(result(steady_point()), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_other_kinds_of_files_are_refused(name):
    with pytest.raises(ConfigError, match=r"must end with \.png or \.html"):
        check_plot(name)


def test_throughput_leaves_out_interrupted_runs_and_keeps_bounded_open_loops_apart():
    cut = steady_point(9.0) | {"is_complete": False}
    bounded = steady_point(0.5, concurrency=8) | {"arrivals": "poisson:4"}
    axes = drawn(draw_throughput, result(steady_point(0.1), cut, bounded))
    assert labels(axes) == ["median", "open loop, poisson:4, at most 8"]
    assert list(axes.get_lines()[0].get_xdata()) == [3]
    assert axes.get_lines()[0].get_ydata()[0] == pytest.approx(35 / 6.5)
