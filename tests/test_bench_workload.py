"""Workloads: which requests come of the options, and that each factor has a stream of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from chi_square import fits
from loraswarm.bench.workload import FIRST_TOKEN_ID, WorkloadSpec, build_requests
from loraswarm.errors import ConfigError

ADAPTERS = tuple(f"a{index}" for index in range(7))
SPEC = WorkloadSpec(
    num_requests=133,
    adapters=ADAPTERS,
    popularity="zipf:1.1",
    base_share=0.25,
    prompt_lengths="uniform:3:133",
    output_lengths="uniform:1:64",
    arrivals="poisson:4",
    shared_prefix_share=0.5,
    num_prefixes=3,
    seed=1,
)


def built(**changes):
    return build_requests(replace(SPEC, **changes))


def columns(requests):
    """What the factors decide, one by one."""
    return {
        "adapters": [request.adapter for request in requests],
        "prompt_lengths": [len(request.prompt_token_ids) for request in requests],
        "output_lengths": [request.max_tokens for request in requests],
        "arrivals": [request.arrival_s for request in requests],
        "prompts": [request.prompt_token_ids for request in requests],
    }


def common_length(first, second):
    """How many tokens two prompts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def test_equal_options_give_equal_requests_in_order():
    requests = built()
    assert requests == built()
    assert [request.index for request in requests] == list(range(133))


def test_another_seed_changes_every_factor():
    before, after = columns(built()), columns(built(seed=2))
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"popularity": "uniform"}, {"adapters", "prompts"}),
        ({"popularity": "zipf:1.1:drift=1"}, {"adapters", "prompts"}),
        ({"base_share": 0.5}, {"adapters", "prompts"}),
        ({"prompt_lengths": "normal:64:16"}, {"prompt_lengths", "prompts"}),
        ({"output_lengths": "lognormal:64:0.5"}, {"output_lengths"}),
        ({"arrivals": "gamma:4:2"}, {"arrivals"}),
        ({"arrivals": "closed"}, {"arrivals"}),
        ({"shared_prefix_share": 0.25}, {"prompts"}),
        ({"num_prefixes": 5}, {"prompts"}),
        ({"vocab_size": 133}, {"prompts"}),
    ],
)
def test_changing_one_factor_leaves_the_others_as_they_were(change, changed):
    before, after = columns(built()), columns(built(**change))
    assert {name for name in before if before[name] != after[name]} == changed


def test_factors_drawn_in_the_same_way_do_not_agree():
    lengths = columns(built(prompt_lengths="uniform:1:64", output_lengths="uniform:1:64"))
    assert lengths["prompt_lengths"] != lengths["output_lengths"]

    many = tuple(f"a{index:03}" for index in range(133))
    orders = {"adapters": many, "popularity": "distinct"}
    adapters = columns(built(**orders, base_share=0.0))["adapters"]
    with_base = columns(built(**orders, base_share=0.25))["adapters"]
    of_base = {index for index, name in enumerate(with_base) if name is None}
    assert {many.index(name) for name in adapters[: len(of_base)]} != of_base


def test_other_lengths_cut_or_continue_the_same_texts():
    short = built(prompt_lengths="32", shared_prefix_share=0.0)
    long = built(prompt_lengths="133", shared_prefix_share=0.0)
    for one, other in zip(short, long, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids[:32]


@pytest.mark.parametrize(("share", "num_base"), [(0.0, 0), (0.25, 33), (0.5, 66), (1.0, 133)])
def test_the_base_gets_exactly_its_share(share, num_base):
    adapters = [request.adapter for request in built(base_share=share)]
    assert adapters.count(None) == num_base


def test_base_requests_replace_adapters_and_leave_the_rest_of_the_mix():
    without = [request.adapter for request in built(base_share=0.0)]
    with_base = [request.adapter for request in built(base_share=0.25)]
    kept = [pair for pair in zip(without, with_base, strict=True) if pair[1] is not None]
    assert all(one == other for one, other in kept)
    first_base = [index for index, name in enumerate(with_base) if name is None][:7]
    assert first_base != list(range(7))


def test_adapters_are_asked_for_as_the_popularity_says():
    requests = built(num_requests=20_000, base_share=0.0, prompt_lengths="1", output_lengths="1")
    counted = Counter(request.adapter for request in requests)
    weights = [rank**-1.1 for rank in range(1, 8)]
    counts = [counted[name] for name in ADAPTERS]
    assert fits(counts, [weight / sum(weights) for weight in weights])
    assert not fits(counts, [1 / 7] * 7)


def test_base_alone_needs_no_adapters():
    requests = built(adapters=(), base_share=1.0)
    assert [request.adapter for request in requests] == [None] * 133
    with pytest.raises(ConfigError, match=r"base_share is 0\.5 and there are no adapters"):
        built(adapters=(), base_share=0.5)


def test_token_ids_cover_the_vocabulary_and_stay_within_it():
    ids = Counter(
        token_id
        for request in built(vocab_size=40, shared_prefix_share=0.0)
        for token_id in request.prompt_token_ids
    )
    assert sorted(ids) == list(range(FIRST_TOKEN_ID, 40))
    assert fits([ids[token_id] for token_id in sorted(ids)], [1 / 37] * 37)


def test_prompts_share_the_given_part_with_their_adapter_and_prefix_only():
    requests = built(base_share=0.25, prompt_lengths="64", shared_prefix_share=0.5)
    by_prefix = {}
    for request in requests:
        prefix = request.prompt_token_ids[:32]
        by_prefix.setdefault(prefix, []).append(request)
    for group in by_prefix.values():
        assert len({request.adapter for request in group}) == 1
        own = [request.prompt_token_ids[32:] for request in group]
        assert len(set(own)) == len(own)
        assert max((common_length(own[0], text) for text in own[1:]), default=0) <= 1
    of_base = {prefix for prefix, group in by_prefix.items() if group[0].adapter is None}
    of_first = {prefix for prefix, group in by_prefix.items() if group[0].adapter == "a0"}
    assert len(of_base) == len(of_first) == 3


def test_prompts_of_two_lengths_share_as_much_as_the_shorter_shares():
    requests = built(
        popularity="identical", base_share=0.0, num_prefixes=1, shared_prefix_share=0.5
    )
    for one, other in pairwise(requests):
        shorter = min(len(one.prompt_token_ids), len(other.prompt_token_ids))
        shared = common_length(one.prompt_token_ids, other.prompt_token_ids)
        assert round(shorter * 0.5) <= shared <= round(shorter * 0.5) + 1


def test_a_share_of_one_repeats_whole_prompts_and_of_zero_none():
    same = built(prompt_lengths="64", shared_prefix_share=1.0, num_prefixes=1, base_share=1.0)
    assert len({request.prompt_token_ids for request in same}) == 1
    own = built(prompt_lengths="64", shared_prefix_share=0.0, num_prefixes=1, base_share=1.0)
    assert len({request.prompt_token_ids[:3] for request in own}) == 133


def test_a_trace_can_give_every_factor(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,adapter,prompt_tokens,output_tokens\n5,a2,9,7\n5.5,,1,3\n7,a0,3,1\n")
    requests = built(
        num_requests=3,
        base_share=0.0,
        popularity=f"trace:{path}",
        arrivals=f"trace:{path}",
        prompt_lengths=f"trace-prompt:{path}",
        output_lengths=f"trace-output:{path}",
    )
    rows = [
        (request.arrival_s, request.adapter, len(request.prompt_token_ids), request.max_tokens)
        for request in requests
    ]
    assert rows == [(0.0, "a2", 9, 7), (0.5, None, 1, 3), (2.0, "a0", 3, 1)]


def test_a_base_share_on_top_of_a_traces_own_base_requests_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"adapter": "a0"}\n{"adapter": null}\n')
    spec = {"num_requests": 2, "popularity": f"trace:{path}"}
    assert [request.adapter for request in built(**spec, base_share=0.0)] == ["a0", None]
    with pytest.raises(ConfigError, match=r"base_share is 0\.5, but .* give 0"):
        built(**spec, base_share=0.5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_requests": 0}, "num_requests is 0, it must be from 1"),
        ({"num_requests": 2.5}, "num_requests is 2.5, it must be an integer"),
        ({"num_requests": True}, "num_requests is True, it must be an integer"),
        ({"base_share": 1.01}, "base_share is 1.01, it must be from 0.0 to 1.0"),
        ({"base_share": float("nan")}, "base_share is nan"),
        ({"shared_prefix_share": -0.1}, "shared_prefix_share is -0.1"),
        ({"num_prefixes": 0}, "num_prefixes is 0"),
        ({"vocab_size": 4}, "vocab_size is 4, it must be from 5"),
        ({"seed": -1}, "seed is -1"),
        ({"adapters": ("a0", "a1", "a0")}, "adapters: 'a0' is listed twice"),
        ({"popularity": "zip"}, "popularity is 'zip'"),
        ({"prompt_lengths": "x"}, "prompt_lengths is 'x'"),
        ({"output_lengths": "0"}, "output_lengths is '0'"),
        ({"arrivals": "open"}, "arrivals is 'open'"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(change, problem):
    with pytest.raises(ConfigError) as caught:
        built(**change)
    assert str(caught.value).startswith(problem)
