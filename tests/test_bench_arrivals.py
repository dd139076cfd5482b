"""Arrival processes against their distributions, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from chi_square import fits
from loraswarm.bench.arrivals import parse_arrivals
from loraswarm.errors import ConfigError

NUM_DRAWS = 20_000
NUM_CELLS = 13
EQUAL_CELLS = np.full(NUM_CELLS, 1 / NUM_CELLS)


def draw(text, num=NUM_DRAWS, seed=0):
    return parse_arrivals(text).draw(num, np.random.default_rng(seed))


def gaps(text):
    """Seconds between arrivals, and from the start to the first."""
    return np.diff(draw(text), prepend=0.0)


def counts_by_exponential_quantile(gaps_s, rate_per_s):
    """Counts in cells that gaps of a Poisson process of that rate fall into equally often."""
    positions = 1.0 - np.exp(-rate_per_s * gaps_s)
    return np.bincount((positions * NUM_CELLS).astype(int), minlength=NUM_CELLS)


@pytest.mark.parametrize("text", ["poisson:4.0", "gamma:4.0:1.0"])
def test_gaps_of_a_poisson_process_are_exponential(text):
    assert fits(counts_by_exponential_quantile(gaps(text), 4.0), EQUAL_CELLS)


@pytest.mark.parametrize("text", ["poisson:4.2", "gamma:4.0:1.1", "gamma:4.0:0.9", "gamma:4.0:2"])
def test_gaps_of_other_processes_are_told_from_it(text):
    assert not fits(counts_by_exponential_quantile(gaps(text), 4.0), EQUAL_CELLS)


def test_gamma_gaps_with_a_shape_of_four_are_sums_of_four_exponential_ones():
    drawn = np.sort(gaps("gamma:4.0:0.5"))
    summed = np.sort(gaps("poisson:16.0")[: NUM_DRAWS // 4 * 4].reshape(-1, 4).sum(axis=1))
    share_below = np.searchsorted(drawn, summed) / NUM_DRAWS
    spread = np.bincount((share_below * NUM_CELLS).astype(int).clip(max=NUM_CELLS - 1))
    assert fits(spread, EQUAL_CELLS)


@pytest.mark.parametrize("cv", [0.1, 0.5, 1.0, 2.0])
def test_the_rate_and_the_variation_are_those_that_were_asked_for(cv):
    gaps_s = gaps(f"gamma:3.0:{cv}")
    assert gaps_s.mean() == pytest.approx(1 / 3.0, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("text", ["poisson:1000000", "poisson:0.000001", "gamma:4:100"])
def test_arrivals_ascend_from_the_start_and_are_finite(text):
    arrivals_s = draw(text)
    assert arrivals_s.shape == (NUM_DRAWS,)
    assert np.isfinite(arrivals_s).all()
    assert (np.diff(arrivals_s, prepend=0.0) >= 0).all()
    assert arrivals_s[-1] > 0


@pytest.mark.parametrize("text", ["poisson:4", "gamma:4:2"])
def test_the_same_seed_draws_the_same_and_another_seed_does_not(text):
    assert draw(text, 133, seed=1).tolist() == draw(text, 133, seed=1).tolist()
    assert draw(text, 133, seed=1).tolist() != draw(text, 133, seed=2).tolist()


def test_a_closed_loop_has_no_arrivals():
    assert parse_arrivals("closed") is None


def test_a_trace_is_followed_from_its_first_request(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s\n100.5\n100.5\n103\n")
    assert draw(f"trace:{path}", 3).tolist() == [0.0, 0.0, 2.5]
    assert draw(f"trace:{path}", 1).tolist() == [0.0]
    with pytest.raises(ConfigError, match="has 3 requests, 4 are asked for"):
        draw(f"trace:{path}", 4)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not known"),
        ("closed:4", "takes 0 values, not 1"),
        ("poisson", "takes 1 values, not 0"),
        ("poisson:0", "must be from 1e-06 to 1,000,000.0"),
        ("poisson:inf", "must be from 1e-06 to 1,000,000.0"),
        ("poisson:fast", "'fast' is not a number"),
        ("gamma:4", "takes 2 values, not 1"),
        ("gamma:4:0", "must be from 0.01 to 100.0"),
        ("gamma:4:nan", "must be from 0.01 to 100.0"),
        ("trace:", "needs a file"),
    ],
)
def test_a_bad_option_is_refused_with_its_value_and_the_allowed_forms(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_arrivals(text)
    message = str(caught.value)
    assert message.startswith(f"arrivals is {text!r}: ")
    assert problem in message
    assert "gamma:PER_S:CV" in message
