"""What the cost policy learns: step costs with a confidence, rates and their changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.engine.policies.merging import MergeCosts
from loraswarm.engine.policies.merging.cost import CostPolicy
from loraswarm.engine.policies.merging.effect import lora_s, merged_work, shared_lora_s
from loraswarm.engine.policies.merging.forecast import Forecast
from loraswarm.engine.policies.merging.learned import LearnedCosts
from loraswarm.engine.policies.merging.outlook import BOUNDS, SPANS, Outlook
from merge_cases import COSTS, MEASURED, MEGABYTE, STEP_S, key, requests_of, seen, view_of

A = key("a")


def work_of(names, num_bytes=20 * MEGABYTE):
    """A decode step of these rows."""
    chunks = [
        ChunkWork(
            num_tokens=1,
            num_computed=7,
            adapter=None if name == "." else name,
            adapter_bytes=0 if name == "." else num_bytes,
        )
        for name in names
    ]
    return StepWork.of(chunks, kv_token_bytes=0)


@pytest.mark.parametrize("names", ["aaa", "aab", "a..", "bcd", "..."])
def test_other_rows_have_the_merged_adapters_tiles_beside_their_own(names):
    merged = merged_work(work_of(names), names.count("a"), 20 * MEGABYTE)
    others = [name for name in names if name != "a"]
    assert merged.num_adapted_tokens == len(others)
    assert merged.num_adapters == (len(set(others) - {"."}) + 1 if others else 0)
    assert merged.tile_bytes == merged.num_adapters * 20 * MEGABYTE
    own = sum(name != "." for name in others)
    assert merged.lora_products == (own + len(others)) * 20 * MEGABYTE


def test_half_merged_costs_half_of_each():
    work = work_of("aab")
    merged = merged_work(work, 2, 20 * MEGABYTE)
    half_s = shared_lora_s(COSTS, work, merged, 0.5)
    assert half_s == pytest.approx((lora_s(COSTS, work) + lora_s(COSTS, merged)) / 2)
    assert shared_lora_s(COSTS, work, merged, 1.0) == pytest.approx(lora_s(COSTS, merged))


@pytest.mark.parametrize("names", ["a" * 9, "a" * 8 + "b", "aab.", "bcd", "abcd.."])
def test_the_forecasts_gain_is_the_difference_that_merging_makes(names):
    policy = CostPolicy(MEASURED)
    policy.learned._lora_variance = 0.0
    view = view_of("", requests=requests_of(names, outputs=10**6))
    outlook = Outlook.of(view, Forecast(), lambda num_tokens: STEP_S)
    work = work_of(names)
    merged = merged_work(work, names.count("a"), 20 * MEGABYTE)
    gain_s = lora_s(COSTS, work) - lora_s(COSTS, merged)
    found_s = policy._gain_s(A, 20 * MEGABYTE, outlook, 0)
    assert found_s == pytest.approx(gain_s * BOUNDS[1])


def random_steps(num, rng, base=1.0, lora=1.0):
    for _ in range(num):
        work = work_of("".join(rng.choice("ab..") for _ in range(rng.randrange(1, 30))))
        base_s = COSTS.step_s(work) - lora_s(COSTS, work)
        seconds = base * base_s + lora * lora_s(COSTS, work)
        yield seen(work, seconds * rng.uniform(0.95, 1.05))


def test_factors_of_base_and_lora_are_found_apart():
    learned = LearnedCosts.of(MEASURED)
    first = learned.lora_deviation
    for step in random_steps(400, random.Random(1), base=1.5, lora=0.5):
        learned.saw_step(step)
    assert learned.base == pytest.approx(1.5, rel=0.1)
    assert learned.lora == pytest.approx(0.5, abs=0.2)
    assert learned.lora_deviation < 0.6 * first


def test_nothing_is_sure_until_something_was_seen():
    learned = LearnedCosts.of(MergeCosts())
    assert learned.surely_lora == 0.0
    assert CostPolicy(MergeCosts()).decide(view_of("a" * 16)).target is None


def test_a_machine_that_was_not_measured_is_learned():
    policy, rng = CostPolicy(MergeCosts(merge_s=0.1)), random.Random(2)
    for step in random_steps(600, rng, lora=3.0):
        policy.saw_step(step)
    assert policy.learned.surely_lora > 0.0
    assert policy.decide(view_of("a" * 16)).target == A


def test_where_adapters_cost_nothing_nothing_is_merged():
    policy, rng = CostPolicy(MEASURED), random.Random(4)
    for step in random_steps(400, rng, lora=0.0):
        policy.saw_step(step)
    assert policy.learned.lora < 0.25
    assert policy.decide(view_of("a" * 8)).target is None


def test_one_step_that_stalled_moves_little():
    learned = LearnedCosts.of(MEASURED)
    for step in random_steps(200, random.Random(6)):
        learned.saw_step(step)
    before = learned.base
    stalled = next(random_steps(1, random.Random(7)))
    learned.saw_step(replace(stalled, seconds=100.0))
    assert learned.base < 1.2 * before


def test_seconds_of_switching_are_learned_by_share():
    learned = LearnedCosts.of(MEASURED)
    for _ in range(60):
        learned.saw_step(seen(work_of("a"), 0.03, switch_s=0.02, switched_share=0.05))
    assert learned.merge_s == pytest.approx(0.4, rel=0.01)
    learned.saw_step(seen(work_of("a"), 0.03, switch_s=9.0, switched_share=0.0))
    assert learned.merge_s == pytest.approx(0.4, rel=0.01)


def arriving(forecast, counts):
    """A view each step, with that many new requests of `a`; earlier ones stay."""
    requests = ()
    for step, count in enumerate(counts):
        place = len(requests)
        new = requests_of("a" * (place + count))[place:]
        requests += new
        forecast.saw(requests, step * STEP_S, STEP_S)
    return forecast.arrivals[A]


def test_a_steady_rate_is_found():
    arrivals = arriving(Forecast(), ([1] + [0] * 9) * 60)
    assert arrivals.slow == pytest.approx(1 / (10 * STEP_S), rel=0.25)


def test_a_burst_resets_the_slow_average_and_chance_does_not():
    quiet = arriving(Forecast(), ([1] + [0] * 39) * 12)
    window_s = quiet.slow_window_s
    assert window_s > 100 * STEP_S
    forecast = Forecast()
    burst = arriving(forecast, ([1] + [0] * 39) * 12 + [3] * 8)
    assert burst.slow_window_s < window_s / 2
    assert burst.slow > 5 * quiet.slow


def test_answers_that_end_early_are_expected_to():
    forecast = Forecast()
    for step in range(40):
        request = requests_of("a", outputs=100)[0]
        request = replace(request, request_id=str(step))
        forecast.saw((request,), 2 * step * STEP_S, STEP_S)
        late = replace(request, output_tokens=76)
        forecast.saw((late,), (2 * step + 1) * STEP_S, STEP_S)
    assert forecast.outputs_of(requests_of("a", outputs=100)[0]) == pytest.approx(25, abs=3)


def test_waiting_requests_are_expected_when_a_seat_is_free():
    running = requests_of("a" * 2, outputs=20)
    waiting = requests_of("..b", outputs=5, num_running=0)[2:]
    view = view_of("", requests=running + waiting, num_seats=2)
    loads = Outlook.of(view, Forecast(), lambda num_tokens: STEP_S).loads
    assert sum(loads[A].tokens) == pytest.approx(40)
    tokens = loads[key("b")].tokens
    assert sum(tokens) == pytest.approx(5)
    assert [place for place in range(len(SPANS)) if tokens[place]] == [2]


def test_prompts_are_expected_one_after_the_other_as_chunks_allow():
    requests = requests_of("ab", outputs=3, prefill=2032)
    view = view_of("", requests=requests, num_seats=2, max_step_tokens=256)
    outlook = Outlook.of(view, Forecast(), lambda num_tokens: num_tokens)
    first, second = (outlook.loads[key(name)] for name in "ab")
    assert first.tokens == pytest.approx([1016, 1019, 0, 0, 0, 0])  # 254 tokens in each of 8 steps
    assert second.tokens == pytest.approx([0, 1016, 1019, 0, 0, 0])
    assert outlook.step_s[0] == pytest.approx(254)
