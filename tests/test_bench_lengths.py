"""Lengths of prompts and outputs against their distributions, and what is refused."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from chi_square import fits
from loraswarm.bench.lengths import parse_lengths
from loraswarm.bench.quantiles import TABLES
from loraswarm.bench.traces import MAX_TOKENS
from loraswarm.errors import ConfigError

NUM_DRAWS = 20_000
NUM_CELLS = 13


def draw(text, num=NUM_DRAWS, seed=0):
    return parse_lengths(text).draw(num, np.random.default_rng(seed))


def cells(cumulative, low, high):
    """Edges and probabilities of about `NUM_CELLS` cells of lengths, the last without an end.

    `cumulative(n)` is the probability of a length of at most n.
    """
    edges = np.unique(np.linspace(low, high, NUM_CELLS).astype(int))
    at_most = np.array([0.0, *(cumulative(edge) for edge in edges), 1.0])
    return edges, np.diff(at_most)


def counts(drawn, edges):
    """How many lengths are in each cell (up to an edge, and above the last)."""
    return np.bincount(np.searchsorted(edges, drawn, side="left"), minlength=len(edges) + 1)


def rounded_normal(mean, deviation, of=float):
    """Cumulative probabilities of rounded draws, given that they are at least 1."""
    normal = NormalDist(mean, deviation)
    below_one = normal.cdf(of(0.5))

    def cumulative(length):
        return (normal.cdf(of(length + 0.5)) - below_one) / (1 - below_one)

    return cumulative


def uniform(low, high):
    return lambda length: (length - low + 1) / (high - low + 1)


DISTRIBUTIONS = {
    "uniform:64:192": (uniform(64, 192), 70, 186),
    "uniform:64:190": (uniform(64, 190), 70, 184),
    "normal:128:32": (rounded_normal(128, 32), 70, 190),
    "normal:3:7": (rounded_normal(3, 7), 1, 18),
    "lognormal:128:0.5": (rounded_normal(math.log(128), 0.5, math.log), 50, 400),
    "lognormal:1:1": (rounded_normal(0, 1, math.log), 1, 9),
}


@pytest.mark.parametrize("text", DISTRIBUTIONS)
def test_lengths_fit_their_distribution(text):
    edges, probabilities = cells(*DISTRIBUTIONS[text])
    assert fits(counts(draw(text), edges), probabilities)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("uniform:64:192", "uniform:64:190"),
        ("normal:128:34", "normal:128:32"),
        ("normal:130:32", "normal:128:32"),
        ("lognormal:132:0.5", "lognormal:128:0.5"),
        ("lognormal:128:0.53", "lognormal:128:0.5"),
    ],
)
def test_lengths_do_not_fit_another_distribution(text, other):
    edges, probabilities = cells(*DISTRIBUTIONS[other])
    assert not fits(counts(draw(text), edges), probabilities)


@pytest.mark.parametrize("text", ["1", "133", str(MAX_TOKENS)])
def test_a_number_is_a_fixed_length(text):
    assert draw(text, 7).tolist() == [int(text)] * 7


def test_a_uniform_length_takes_both_ends():
    assert set(draw("uniform:3:5", 133).tolist()) == {3, 4, 5}
    assert draw("uniform:7:7", 3).tolist() == [7, 7, 7]


@pytest.mark.parametrize("text", ["normal:1:16777216", "lognormal:1:10", "lognormal:16777216:10"])
def test_even_the_widest_distributions_stay_within_the_allowed_lengths(text):
    drawn = draw(text)
    assert len(drawn) == NUM_DRAWS
    assert drawn.min() >= 1
    assert drawn.max() <= MAX_TOKENS
    assert drawn.max() > 1000 * drawn.min()


def test_a_deviation_of_zero_is_a_fixed_length():
    assert set(draw("normal:128:0", 133).tolist()) == {128}
    assert set(draw("lognormal:128:0", 133).tolist()) == {128}


@pytest.mark.parametrize("text", ["uniform:1:1000", "normal:128:32", "azure-code-prompt"])
def test_the_same_seed_draws_the_same_and_another_seed_does_not(text):
    assert draw(text, 133, seed=1).tolist() == draw(text, 133, seed=1).tolist()
    assert draw(text, 133, seed=1).tolist() != draw(text, 133, seed=2).tolist()


def write_quantiles(path, *rows):
    path.write_text("".join(f"{probability},{length}\n" for probability, length in rows))
    return f"quantiles:{path}"


def test_quantiles_are_interpolated_between_the_points(tmp_path):
    text = write_quantiles(tmp_path / "q.csv", (0, 100.5), (0.25, 110.5), (1, 210.5))
    edges, probabilities = cells(
        lambda n: (n - 100) / 40 if n <= 110 else 0.25 + (n - 110) * 0.0075, 103, 205
    )
    assert fits(counts(draw(text), edges), probabilities)
    assert not fits(counts(draw("uniform:101:210"), edges), probabilities)


def test_a_quantile_file_may_have_a_header(tmp_path):
    text = write_quantiles(tmp_path / "q.csv", ("probability", "length"), (0, 7), (1, 7))
    assert draw(text, 3).tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "begin with 0 and end with 1"),
        ([(0, 1)], "begin with 0 and end with 1"),
        ([(0.1, 1), (1, 9)], "begin with 0 and end with 1"),
        ([(0, 1), (0.9, 9)], "begin with 0 and end with 1"),
        ([(0, 1), (0.5, 3), (0.5, 4), (1, 9)], "above the one before"),
        ([(0, 1), ("nan", 3), (1, 9)], "above the one before"),
        ([(0, 1), (0.5, 9), (1, 3)], "below the one before"),
        ([(0, 1), (0.5, "nan"), (1, 3)], "below the one before"),
        ([(0, 0), (1, 9)], "lengths must be from 1"),
        ([(0, 1), (1, "inf")], "lengths must be from 1"),
        ([(0, 1), ("half", 3), (1, 9)], "is not a probability and a length"),
        ([(0, "1,2"), (1, 9)], "is not a probability and a length"),
    ],
)
def test_a_bad_quantile_file_is_refused_by_name(tmp_path, rows, problem):
    text = write_quantiles(tmp_path / "q.csv", *rows)
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_lengths(text)
    assert "q.csv" in str(caught.value)


def test_a_quantile_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_lengths(f"quantiles:{tmp_path / 'none.csv'}")


@pytest.mark.parametrize(
    ("name", "mean", "median"),
    [
        ("azure-conv-prompt", 1155, 1020),
        ("azure-conv-output", 211, 129),
        ("azure-code-prompt", 2048, 1469),
        ("azure-code-output", 28, 13),
    ],
)
def test_the_tables_have_the_means_and_medians_of_their_traces(name, mean, median):
    drawn = draw(name)
    assert drawn.mean() == pytest.approx(mean, rel=0.05)
    assert np.median(drawn) == pytest.approx(median, rel=0.05)
    assert drawn.max() == TABLES[name][-1]


def test_a_trace_gives_prompt_and_output_lengths_in_order(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt_tokens,output_tokens\n133,7\n1,3\n9,5\n")
    assert draw(f"trace-prompt:{path}", 2).tolist() == [133, 1]
    assert draw(f"trace-output:{path}", 3).tolist() == [7, 3, 5]
    with pytest.raises(ConfigError, match="has 3 requests, 4 are asked for"):
        draw(f"trace-output:{path}", 4)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not known"),
        ("0", "must be from 1 to 16,777,216"),
        ("16777217", "must be from 1 to 16,777,216"),
        ("-3", "'-3' is not known"),
        ("1.5", "'1.5' is not known"),
        ("uniform:3", "takes 2 values, not 1"),
        ("uniform:0:3", "must be from 1"),
        ("uniform:7:3", "'3' must be from 7"),
        ("uniform:3:7.5", "'7.5' is not an integer"),
        ("normal:0.5:1", "must be from 1.0"),
        ("normal:128:-1", "must be from 0.0"),
        ("normal:128:nan", "must be from 0.0"),
        ("lognormal:128:11", "must be from 0.0 to 10.0"),
        ("azure-conv-prompt:3", "takes 0 values, not 1"),
        ("quantiles:", "needs a file"),
    ],
)
def test_a_bad_option_is_refused_with_its_value_and_the_allowed_forms(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_lengths(text, "prompt_lengths")
    message = str(caught.value)
    assert message.startswith(f"prompt_lengths is {text!r}: ")
    assert problem in message
    assert "lognormal:MEDIAN:SIGMA" in message
    assert "azure-code-output" in message
