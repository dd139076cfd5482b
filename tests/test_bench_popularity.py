"""Popularity mixes against their distributions, exact orders, drift and traces."""

from __future__ import annotations

import numpy as np
import pytest

from chi_square import fits, survival
from loraswarm.bench.popularity import BASE, DRIFT_REQUESTS, parse_popularity
from loraswarm.errors import ConfigError

NUM_DRAWS = 60_000


def draw(text, num_adapters, num_requests, seed=0):
    rng = np.random.default_rng(seed)
    return parse_popularity(text).draw(num_adapters, num_requests, rng)


def counts(drawn, num_adapters):
    assert drawn.min() >= 0
    assert drawn.max() < num_adapters
    return np.bincount(drawn, minlength=num_adapters)


def zipf_probabilities(alpha, num_adapters):
    weights = [rank**-alpha for rank in range(1, num_adapters + 1)]
    return np.array(weights) / sum(weights)


def skew_probabilities(num_hot, request_share, num_adapters):
    num_cold = num_adapters - num_hot
    cold = [(1 - request_share) / num_cold] * num_cold
    return np.array([request_share / num_hot] * num_hot + cold)


def expected_probabilities(num_adapters, num_hot):
    return {
        "uniform": np.full(num_adapters, 1 / num_adapters),
        "zipf:0.8": zipf_probabilities(0.8, num_adapters),
        "zipf:1.1": zipf_probabilities(1.1, num_adapters),
        "skew:0.2:0.8": skew_probabilities(num_hot, 0.8, num_adapters),
        "skew:0.2:0.7": skew_probabilities(num_hot, 0.7, num_adapters),
    }


@pytest.mark.parametrize(
    ("num_freedoms", "critical"),
    [(1, 10.828), (2, 13.816), (7, 24.322), (10, 29.588), (31, 61.098), (100, 149.449)],
)
def test_the_test_itself_has_the_critical_values_of_the_tables(num_freedoms, critical):
    assert survival(critical, num_freedoms) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(("num_adapters", "num_hot"), [(7, 1), (32, 6), (133, 27)])
def test_each_mix_fits_its_own_distribution_and_no_other(num_adapters, num_hot):
    expected = expected_probabilities(num_adapters, num_hot)
    for drawn_as in expected:
        drawn = counts(draw(drawn_as, num_adapters, NUM_DRAWS), num_adapters)
        fitting = [text for text, probabilities in expected.items() if fits(drawn, probabilities)]
        assert fitting == [drawn_as]


def test_zipf_with_exponent_zero_is_uniform():
    assert fits(counts(draw("zipf:0", 7, NUM_DRAWS), 7), np.full(7, 1 / 7))


@pytest.mark.parametrize("text", ["uniform", "zipf:1.1", "skew:0.2:0.8"])
def test_neighbouring_requests_are_independent(text):
    drawn = draw(text, 3, NUM_DRAWS)
    alone = counts(drawn, 3) / NUM_DRAWS
    pairs = counts(drawn[::2] * 3 + drawn[1::2], 9)
    assert fits(pairs, np.outer(alone, alone).ravel())
    assert not fits(counts(np.sort(drawn)[::2] * 3 + np.sort(drawn)[1::2], 9), [1 / 9] * 9)


@pytest.mark.parametrize("text", ["uniform", "zipf:1.1", "zipf:1.1:drift=0.5", "distinct"])
def test_the_same_seed_draws_the_same_and_another_seed_does_not(text):
    first = draw(text, 7, 133, seed=1)
    assert first.tolist() == draw(text, 7, 133, seed=1).tolist()
    assert first.tolist() != draw(text, 7, 133, seed=2).tolist()


@pytest.mark.parametrize(
    "text",
    ["uniform", "round-robin", "zipf:1.1", "zipf:1.1:drift=1", "skew:0.2:0.8", "distinct"],
)
def test_a_single_adapter_gets_every_request(text):
    assert draw(text, 1, 133).tolist() == [0] * 133


@pytest.mark.parametrize("share", ["0", "0.2", "0.9", "1"])
def test_skew_over_two_adapters_has_one_of_each_kind(share):
    assert set(draw(f"skew:{share}:1", 2, 133).tolist()) == {0}
    assert set(draw(f"skew:{share}:0", 2, 133).tolist()) == {1}


def test_skew_can_starve_the_first_adapters():
    assert set(draw("skew:0.5:0", 4, 133).tolist()) == {2, 3}


def test_round_robin_goes_around_in_the_order_of_the_list():
    assert draw("round-robin", 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_identical_asks_for_the_first_adapter_only():
    assert draw("identical", 7, 133).tolist() == [0] * 133


def test_distinct_never_repeats_an_adapter_within_as_many_requests_as_there_are():
    drawn = draw("distinct", 7, 133)
    for start in range(133 - 7):
        assert len(set(drawn[start : start + 7].tolist())) == 7
    assert drawn[:7].tolist() != list(range(7))


def test_drift_changes_nothing_before_its_time_and_the_mix_after_it():
    still = draw("zipf:1.1", 7, 3 * DRIFT_REQUESTS)
    moving = draw("zipf:1.1:drift=1", 7, 3 * DRIFT_REQUESTS)
    assert moving[:DRIFT_REQUESTS].tolist() == still[:DRIFT_REQUESTS].tolist()
    assert moving[DRIFT_REQUESTS:].tolist() != still[DRIFT_REQUESTS:].tolist()


def test_drift_keeps_the_popularities_and_moves_who_has_them():
    drawn = draw("zipf:1.1:drift=1", 7, NUM_DRAWS)
    still = draw("zipf:1.1", 7, NUM_DRAWS)
    assert not fits(counts(drawn, 7), zipf_probabilities(1.1, 7))
    assert sorted_by_block(drawn).tolist() == sorted_by_block(still).tolist()


def sorted_by_block(drawn):
    """The counts of each block between two drifts, the largest first."""
    blocks = drawn.reshape(-1, DRIFT_REQUESTS)
    return np.array([np.sort(counts(block, 7))[::-1] for block in blocks])


# With this exponent a million draws are all of rank 1: they show who has it.
ONLY_RANK_ONE = "zipf:20"


def holders_of_rank_one(share, num_adapters, num_blocks):
    drawn = draw(f"{ONLY_RANK_ONE}:drift={share}", num_adapters, num_blocks * DRIFT_REQUESTS)
    blocks = drawn.reshape(num_blocks, DRIFT_REQUESTS)
    leaders = [np.bincount(block).argmax() for block in blocks]
    assert (blocks == np.array(leaders)[:, None]).mean() > 0.999
    return np.array(leaders)


def test_two_adapters_change_places_at_every_drift_however_small_the_share():
    assert holders_of_rank_one("0.01", 2, 7).tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_a_share_of_one_moves_every_adapter_at_every_drift():
    leaders = holders_of_rank_one("1", 7, 133)
    assert (leaders[1:] != leaders[:-1]).all()


def test_the_drift_share_is_the_share_of_adapters_that_move():
    leaders = holders_of_rank_one("0.2", 20, 2000)
    num_moved = int((leaders[1:] != leaders[:-1]).sum())
    assert fits([num_moved, 1999 - num_moved], [0.2, 0.8])
    assert not fits([num_moved, 1999 - num_moved], [0.25, 0.75])


def test_a_share_of_zero_never_drifts():
    assert holders_of_rank_one("0", 7, 133).tolist() == [0] * 133


def write_trace(path, names):
    path.write_text("adapter\n" + "".join(f'"{name}"\n' for name in names))
    return path


def test_a_trace_is_followed_by_name(tmp_path):
    path = write_trace(tmp_path / "a.csv", ["sql", "poem", "", "sql"])
    popularity = parse_popularity(f"trace:{path}", ["poem", "idle", "sql"])
    drawn = popularity.draw(3, 4, np.random.default_rng(0))
    assert drawn.tolist() == [2, 0, BASE, 2]
    assert popularity.draw(3, 3, np.random.default_rng(0)).tolist() == [2, 0, BASE]


def test_a_renamed_trace_gives_its_names_to_the_adapters_in_order(tmp_path):
    path = write_trace(tmp_path / "a.csv", ["f9", "", "f2", "f9", "f5"])
    popularity = parse_popularity(f"trace:{path}:renamed", ["a", "b", "c"])
    assert popularity.draw(3, 5, np.random.default_rng(0)).tolist() == [0, BASE, 1, 0, 2]


def test_a_trace_with_a_name_that_is_not_served_is_refused(tmp_path):
    path = write_trace(tmp_path / "a.csv", ["sql", "poem"])
    popularity = parse_popularity(f"trace:{path}", ["sql", "other"])
    with pytest.raises(ConfigError, match=r"asks for 'poem'.*':renamed'"):
        popularity.draw(2, 2, np.random.default_rng(0))
    assert popularity.draw(2, 1, np.random.default_rng(0)).tolist() == [0]


def test_a_renamed_trace_with_more_names_than_adapters_is_refused(tmp_path):
    path = write_trace(tmp_path / "a.csv", ["f9", "f2"])
    with pytest.raises(ConfigError, match="asks for 2 adapters, there are 1"):
        draw(f"trace:{path}:renamed", 1, 2)


def test_a_trace_is_not_repeated_to_fill_a_longer_run(tmp_path):
    path = write_trace(tmp_path / "a.csv", ["a", "a"])
    with pytest.raises(ConfigError, match="has 2 requests, 3 are asked for"):
        draw(f"trace:{path}:renamed", 1, 3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not known"),
        ("zip:1", "'zip' is not known"),
        ("uniform:3", "takes 0 values, not 1"),
        ("zipf", "'' is not a number"),
        ("zipf:x", "'x' is not a number"),
        ("zipf:nan", "must be from 0.0 to 20.0"),
        ("zipf:-1", "must be from 0.0 to 20.0"),
        ("zipf:1:0.5", "only drift=SHARE"),
        ("zipf:1:drift=2", "must be from 0.0 to 1.0"),
        ("zipf:1:drift=0.1:drift=0.2", "only drift=SHARE"),
        ("skew:0.2", "takes 2 values, not 1"),
        ("skew:0.2:1.1", "must be from 0.0 to 1.0"),
        ("trace:", "needs a file"),
    ],
)
def test_a_bad_option_is_refused_with_its_value_and_the_allowed_forms(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_popularity(text)
    message = str(caught.value)
    assert message.startswith(f"popularity is {text!r}: ")
    assert problem in message
    assert "zipf:ALPHA:drift=SHARE" in message
