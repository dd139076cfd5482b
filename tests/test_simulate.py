"""The simulator: its traces, its machine, that every request is served, and the best schedule."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.engine.policies.merging import MergeDecision, make_policy
from loraswarm.errors import ConfigError
from loraswarm.simulate.compare import POLICIES, check_policies, figures_of, run_policy
from loraswarm.simulate.machine import GEOMETRY, Machine, Switcher, default_figures, make_info
from loraswarm.simulate.oracle import adapter_bytes, best_schedule, cheapest_path
from loraswarm.simulate.replay import NUM_PAGES, Replay
from loraswarm.simulate.traces import (
    NAMES,
    UTILIZATION,
    Trace,
    TraceRequest,
    make_trace,
    request_s,
)

FIGURES = default_figures()
MACHINE = Machine(FIGURES)


def heavy_machine(times=8.0):
    """One whose adapters cost so many times as much, so that merging is worth more."""
    step = FIGURES.step
    names = ("lora_s", "adapter_s", "adapted_token_s", "tile_byte_s", "lora_product_s")
    dearer = replace(step, **{name: times * getattr(step, name) for name in names})
    return Machine(replace(FIGURES, step=dearer))


def small_trace(*rows):
    """Requests of (second, adapter, prompt, outputs)."""
    return Trace.of("small", [TraceRequest(*row) for row in rows])


@pytest.mark.parametrize("name", NAMES)
def test_traces_ascend_from_zero_and_keep_the_machine_busy_as_said(name):
    trace = make_trace(name, FIGURES, 133, 3)
    times = [one.arrival_s for one in trace.requests]
    assert len(times) == 133
    assert times[0] == 0.0
    assert times == sorted(times)
    assert min(min(one.prompt_tokens, one.output_tokens) for one in trace.requests) >= 1
    busy_s = sum(request_s(one, FIGURES) for one in trace.requests)
    assert busy_s / times[-1] == pytest.approx(UTILIZATION)
    assert trace == make_trace(name, FIGURES, 133, 3)
    assert trace.requests != make_trace(name, FIGURES, 133, 4).requests


def test_streams_of_traces_are_independent():
    drawn = [make_trace(name, FIGURES, 133, 0).requests for name in ("one", "uniform")]
    gaps = [np.diff([one.arrival_s for one in requests]) for requests in drawn]
    assert abs(np.corrcoef(*gaps)[0, 1]) < 0.3
    lengths = [[one.prompt_tokens for one in requests] for requests in drawn]
    assert abs(np.corrcoef(*lengths)[0, 1]) < 0.3
    assert abs(np.corrcoef(gaps[0], lengths[0][1:])[0, 1]) < 0.3


def test_traces_have_the_adapters_that_they_are_named_for():
    def adapters(name):
        return [one.adapter for one in make_trace(name, FIGURES, 300, 0).requests]

    assert set(adapters("one")) == {"a00"}
    assert 0.85 < adapters("mostly-one").count("a00") / 300 < 0.95
    assert None in adapters("mostly-one")
    runs = {name: [len(list(g)) for _, g in itertools.groupby(adapters(name))] for name in NAMES}
    assert set(runs["flapping"]) == {6}
    assert set(runs["square"]) == {50}
    assert np.mean(runs["bursts"]) > 5 > np.mean(runs["uniform"])
    first, later = (Counter(adapters("drifting-zipf")[at : at + 40]) for at in (0, 160))
    assert first.most_common(1) != later.most_common(1)


def test_an_unknown_trace_or_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'nothing'.*flapping"):
        make_trace("nothing", FIGURES, 10, 0)
    with pytest.raises(ConfigError, match=r"'best'.*oracle"):
        check_policies(["never", "best"])
    with pytest.raises(ConfigError, match="twice"):
        check_policies(["never", "never"])


def test_a_request_that_can_never_fit_is_refused():
    trace = small_trace((0.0, "a", 10**6, 1))
    with pytest.raises(ConfigError, match="1,000,001 tokens"):
        Replay(trace, MACHINE, make_policy("never"))


def test_adapters_that_never_fit_the_pool_together_are_served_in_turn():
    trace = small_trace(*[(0.0, f"x{index:03}", 8, 2) for index in range(300)])
    machine_bytes = sum(adapter_bytes(trace, MACHINE).values())
    assert machine_bytes > NUM_PAGES * GEOMETRY.page_bytes
    assert len(run_policy(trace, MACHINE, "never").served) == 300


def decode_of(names):
    size = MACHINE.bytes_of(make_info("a", 16))
    return StepWork.of(
        [
            ChunkWork(num_tokens=1, num_computed=9, adapter=name, adapter_bytes=size)
            for name in names
        ],
        FIGURES.kv_token_bytes,
    ), size


def test_the_machine_takes_what_its_cost_model_says():
    work, size = decode_of("aaab")
    assert MACHINE.step_s(work, 3, size, 0.0) == pytest.approx(FIGURES.step_s(work))
    work, size = decode_of("aaa")
    plain = replace(work, num_adapters=0, num_adapted_tokens=0, tile_bytes=0, lora_products=0)
    assert MACHINE.step_s(work, 3, size, 1.0) == pytest.approx(FIGURES.step_s(plain))
    assert MACHINE.step_s(work, 0, size, 1.0) > MACHINE.step_s(work, 0, 0, 0.0)


def test_a_switch_goes_on_within_its_budget_and_restoring_is_at_once():
    switcher = Switcher(merge_s=1.0)
    switcher.set_target(("a", "0"))
    for share in (0.3, 0.3, 0.3, 0.1):
        assert switcher.advance(0.3) == pytest.approx((share, share))
    assert switcher.advance(0.3) == (0.0, 0.0)
    assert (switcher.merged, switcher.share) == (("a", "0"), 1.0)
    switcher.set_target(("b", "0"))
    assert (switcher.merged, switcher.share) == (None, 0.0)
    assert switcher.total == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_once_with_all_its_tokens(policy):
    trace = make_trace("mostly-one", FIGURES, 40, 1)
    run = run_policy(trace, MACHINE, policy)
    assert Counter(served.request for served in run.served) == Counter(trace.requests)
    num_tokens = sum(one.prompt_tokens + one.output_tokens - 1 for one in trace.requests)
    assert sum(step.work.num_tokens for step in run.steps) == num_tokens
    for served in run.served:
        assert served.request.arrival_s < served.first_token_s <= served.end_s
    assert run == run_policy(trace, MACHINE, policy)


def test_nothing_merged_takes_the_seconds_of_its_steps():
    run = run_policy(make_trace("uniform", FIGURES, 30, 0), MACHINE, "never")
    for step in run.steps:
        assert step.end_s - step.start_s == pytest.approx(FIGURES.step_s(step.work))
    assert (run.merged_s, run.num_switches, run.switch_s) == (0.0, 0, 0.0)


def test_a_policy_that_excludes_is_obeyed_and_stalls_nothing():
    trace = make_trace("mostly-one", FIGURES, 60, 1)
    run = run_policy(trace, MACHINE, "always-head")
    assert all(len(step.hot_tokens) <= 1 for step in run.steps)
    mixed = run_policy(trace, MACHINE, "never")
    assert any(len(step.hot_tokens) > 1 for step in mixed.steps)


def test_peft_style_a_request_waits_for_those_before_it_alone():
    flood = [(0.05 * place, "hot", 8, 20) for place in range(120)]
    trace = small_trace(*flood[:30], (1.49, "cold", 8, 4), *flood[30:])
    run = run_policy(trace, MACHINE, "always-head")
    cold = next(served for served in run.served if served.request.adapter == "cold")
    earlier_s = [one.end_s for one in run.served if one.request.arrival_s < 1.49]
    later_s = [one.end_s for one in run.served if one.request.arrival_s > 1.49]
    step_s = max(step.end_s - step.start_s for step in run.steps)
    assert max(earlier_s) < cold.first_token_s <= max(earlier_s) + 2.0 * step_s
    assert cold.end_s < max(later_s)


class Stubborn:
    """Lets one request run alone, though it cannot have a seat."""

    def decide(self, view):
        return MergeDecision(None, frozenset({"39"}))

    def saw_step(self, seen):
        pass


def test_those_who_hold_all_seats_run_when_nobody_else_can():
    trace = small_trace(*[(0.0, "a", 4, 8)] * 40)
    assert len(Replay(trace, MACHINE, Stubborn()).run().served) == 40


def test_budgets_bound_what_a_step_takes():
    trace = make_trace("square", FIGURES, 120, 0)
    run = run_policy(trace, heavy_machine(), "cost")
    assert run.num_switches > 0
    total_s = sum(step.end_s - step.start_s for step in run.steps)
    assert run.switch_s <= 0.1 * total_s


def test_the_cheapest_path_is_the_best_of_all_paths():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost, switch = rng.random((6, 3)), rng.random(6)

        def total(path, cost=cost, switch=switch):
            before, seconds = 0, 0.0
            for k, state in enumerate(path):
                seconds += cost[k, state] + (switch[k] if state not in (0, before) else 0.0)
                before = state
            return seconds

        best = min(total(path) for path in itertools.product(range(3), repeat=6))
        assert total(cheapest_path(cost, switch)) == pytest.approx(best)


def test_a_schedule_merges_what_there_is_and_changes_with_it():
    rows = [(0.0, "a", 8, 200)] * 8 + [(60.0, "b", 8, 200)] * 8
    trace, machine = small_trace(*rows), heavy_machine()
    run = run_policy(trace, machine, "never")
    schedule = best_schedule(run, machine, adapter_bytes(trace, machine))
    assert [state and state[0] for _, state in schedule] == ["a", "b"]


@pytest.mark.parametrize("name", ["mostly-one", "flapping", "bursts"])
def test_the_oracle_is_no_worse_than_nothing_merged(name):
    trace, machine = make_trace(name, FIGURES, 60, 2), heavy_machine()
    means = [
        figures_of(name, policy, run_policy(trace, machine, policy)).mean_latency_s
        for policy in ("oracle", "never")
    ]
    assert means[0] <= means[1]


class TestCostPolicyOnTraces:
    """What the policy is for: it gains where one adapter dominates, and loses little elsewhere."""

    @staticmethod
    def mean_s(name, policy, machine, num=150):
        run = run_policy(make_trace(name, FIGURES, num, 0), machine, policy)
        return figures_of(name, policy, run).mean_latency_s

    @pytest.mark.parametrize("name", ["one", "mostly-one", "square"])
    def test_it_gains_where_an_adapter_dominates(self, name):
        assert self.mean_s(name, "cost", MACHINE) < 0.97 * self.mean_s(name, "never", MACHINE)

    @pytest.mark.parametrize("name", ["uniform", "slora", "flapping", "drifting-zipf"])
    def test_it_loses_little_on_mixes(self, name):
        assert self.mean_s(name, "cost", MACHINE) < 1.02 * self.mean_s(name, "never", MACHINE)

    def test_the_cold_wait_no_longer_than_with_nothing_merged(self):
        trace, machine = make_trace("mostly-one", FIGURES, 200, 0), heavy_machine(3.0)
        worst = {
            policy: max(
                served.latency_s
                for served in run_policy(trace, machine, policy).served
                if served.request.adapter != "a00"
            )
            for policy in ("cost", "never", "always-head")
        }
        assert worst["cost"] < 1.1 * worst["never"]
        assert worst["always-head"] > 1.1 * worst["never"]
