"""The simulator of a cluster: what must hold of any run, and small runs worked by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loraswarm.cluster.migration.problem import Move, Objective, Solution
from loraswarm.cluster.view import ReplicaLimits
from loraswarm.core.cost_model import TransferCosts
from loraswarm.core.step_cost import ChunkWork, StepCosts, StepWork
from loraswarm.errors import ConfigError
from loraswarm.simulate.cluster.cluster import Cluster, Setup
from loraswarm.simulate.cluster.compare import figures_of
from loraswarm.simulate.cluster.policies import GREEDY_PERIOD_S, NAMES, Policy, check_policies
from loraswarm.simulate.cluster.replica import Replica
from loraswarm.simulate.cluster.stock import Stock
from loraswarm.simulate.cluster.traces import BASE, busy_s, make_trace, of_columns, scaled
from loraswarm.simulate.machine import Machine, default_figures

FIGURES = default_figures()
MACHINE = Machine(FIGURES)
PAGE_BYTES = 16 * FIGURES.kv_token_bytes
LIMITS = ReplicaLimits(
    num_seats=32,
    max_step_tokens=512,
    num_pages=4096,
    page_tokens=16,
    page_bytes=PAGE_BYTES,
    host_bytes=1 << 30,
)
LINK = TransferCosts(fixed_s=0.001, byte_s=1e-9)
NO_STEPS = StepCosts(
    fixed_s=0.0,
    brackets=(0,),
    token_s=(0.0,),
    logit_row_s=0.0,
    lora_s=0.0,
    adapter_s=0.0,
    adapted_token_s=0.0,
    tile_byte_s=0.0,
    lora_product_s=0.0,
    kv_byte_s=0.0,
    attention_pair_s=0.0,
)
SMALL_LIMITS = replace(LIMITS, num_seats=2, max_step_tokens=4, page_tokens=4)


def policy(name):
    return check_policies([name])[0]


def setup_of(num_replicas, limits=LIMITS, costs=FIGURES):
    return Setup(num_replicas=num_replicas, limits=limits, costs=costs, link=LINK)


def rows_trace(*rows):
    """Requests of (second, adapter, prompt, outputs)."""
    return of_columns("small", tuple(zip(*rows, strict=True)), MACHINE, 0)


def busy_trace(name, num_replicas, num_requests, seed=0, share=0.9):
    trace = make_trace(name, MACHINE, num_requests, 40, seed)
    return scaled(trace, FIGURES, num_replicas, share, LIMITS.max_step_tokens)


def plain_costs(fixed_s, token_s):
    """Steps of `fixed_s` and `token_s` a token; a load takes 3 s, a copy half a second."""
    step = replace(NO_STEPS, fixed_s=fixed_s, token_s=(token_s,))
    load, copy = (TransferCosts(fixed_s=seconds, byte_s=0.0) for seconds in (3.0, 0.5))
    return replace(FIGURES, step=step, load=load, copy=copy)


def times_of(run):
    return [(each.first_s, each.end_s) for each in run.requests]


def check_all(cluster):
    """Nobody idles who could run; pages, sums and the view are right."""
    for replica in cluster.replicas.values():
        assert not replica.can_run()
        if not replica.is_stepping:
            replica.check()
        if not cluster.open_requests():
            replica.stock.check(0)
    views = cluster.view.replicas.values()
    assert sum(len(each.requests) for each in views) <= len(cluster.open_requests())
    for each in views:
        assert all(each.replica_id in cluster.view.holders[name] for name in each.tiers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trace_name", ["code", "conversation"])
def test_every_request_is_served_once_with_all_its_tokens(name, trace_name):
    trace = busy_trace(trace_name, 4, 120)
    run = Cluster(trace, setup_of(4), policy(name)).run(check_all)
    assert [each.order for each in run.requests] == list(range(120))
    assert [each.num_given for each in run.requests] == trace.outputs.tolist()
    for each in run.requests:
        alone_s = each.output_tokens * FIGURES.step_s(StepWork.of([], 0))
        assert each.arrival_s < each.first_s <= each.end_s
        assert each.end_s - each.arrival_s >= alone_s
    assert run.busy_s <= 4 * run.duration_s
    again = Cluster(trace, setup_of(4), policy(name)).run()
    assert times_of(again) == times_of(run)


@pytest.mark.parametrize("name", ["round-robin", "ours"])
def test_no_policy_is_faster_than_a_request_alone(name):
    trace = busy_trace("code", 3, 60)
    run = Cluster(trace, setup_of(3), policy(name)).run()
    for row, each in enumerate(run.requests[:12]):
        columns = (
            [0.0],
            [trace.names[trace.adapters[row]]],
            [each.prompt_tokens],
            [each.output_tokens],
        )
        single = replace(of_columns("one", columns, MACHINE, 0), num_bytes=np.array([1]))
        alone = Cluster(single, setup_of(1), policy("round-robin")).run().requests[0]
        assert each.end_s - each.arrival_s >= alone.end_s - 1e-9


def test_with_one_replica_all_policies_are_one():
    trace = busy_trace("code", 1, 50, share=0.7)
    found = {name: times_of(Cluster(trace, setup_of(1), policy(name)).run()) for name in NAMES}
    assert all(times == found["round-robin"] for times in found.values())


def test_policies_differ_where_there_is_something_to_choose():
    trace = busy_trace("code", 4, 120)
    found = {name: times_of(Cluster(trace, setup_of(4), policy(name)).run()) for name in NAMES[:4]}
    assert len({tuple(times) for times in found.values()}) == 4


def test_a_steps_work_is_that_of_its_chunks(monkeypatch):
    plan, num_compared = Replica.plan, Counter()

    def chunk(request, num_tokens, num_computed):
        return ChunkWork(
            num_tokens=num_tokens,
            num_computed=num_computed,
            adapter=request.adapter,
            adapter_bytes=request.num_bytes,
            samples=num_computed + num_tokens >= request.num_known,
        )

    def compare(replica):
        seconds = plan(replica)
        if seconds is not None:
            ticks = replica.rows.tick
            rows = [
                (each, each.num_computed + ticks - each.joined) for each in replica.rows.members
            ]
            chunks = [chunk(each, 1, computed) for each, computed in rows]
            chunks += [chunk(each, count, each.num_computed) for each, count in replica._chunks]
            num_compared["rows"] += len(rows) > 1
            num_compared["chunks"] += len(chunks) > len(rows)
            work = StepWork.of(chunks, FIGURES.kv_token_bytes)
            assert min(each.num_tokens for each in chunks) >= 1
            assert work.num_tokens <= LIMITS.max_step_tokens
            assert seconds == pytest.approx(FIGURES.step_s(work))
        return seconds

    monkeypatch.setattr(Replica, "plan", compare)
    Cluster(busy_trace("conversation", 2, 60), setup_of(2), policy("ours")).run()
    assert min(num_compared["rows"], num_compared["chunks"]) > 50


def test_pages_that_are_short_make_the_youngest_give_way_and_nothing_is_lost():
    limits = replace(LIMITS, num_pages=30, page_tokens=4, num_seats=8)
    rows = [(0.1 * place, None, 9 + place % 5, 40) for place in range(12)]
    trace = rows_trace(*rows)
    run = Cluster(trace, setup_of(2, limits), policy("least-loaded")).run(check_all)
    assert run.num_preemptions > 0
    assert [each.num_given for each in run.requests] == [40] * 12
    ends = [each.end_s for each in run.requests]
    assert ends[0] == min(ends)


def test_two_replicas_and_four_requests_by_hand():
    """Steps take 1 s and 0.25 s a token.

    r0   0-2 prompt 0       2-3.75 its last token, and prompt 2
    r1   0-2 prompt 1       2-4 prompt 3
    """
    rows = [(0.0, None, 4, 2), (0.0, None, 4, 1), (0.0, None, 2, 1), (0.0, None, 4, 1)]
    setup = setup_of(2, SMALL_LIMITS, plain_costs(1.0, 0.25))
    run = Cluster(rows_trace(*rows), setup, policy("round-robin")).run(check_all)
    assert times_of(run) == [(2.0, 3.75), (2.0, 2.0), (3.75, 3.75), (4.0, 4.0)]
    assert (run.busy_s, run.num_steps) == (7.75, 4)
    found = figures_of("small", "round-robin", run, 2)
    assert found.mean_latency_s == pytest.approx((3.75 + 2.0 + 3.75 + 4.0) / 4)
    assert found.utilization == pytest.approx(7.75 / 8)
    assert found.output_tokens_per_s == pytest.approx(5 / 4)


def test_cold_adapters_come_one_after_the_other_by_hand():
    """`a` is everywhere, `b` and `d` on r1 alone; r0 needs both: 3 s a load, half a second a copy,
    a second a step. Requests without adapters are not held up."""
    rows = [(0.0, "b", 1, 1), (0.0, "a", 1, 1), (0.0, "d", 1, 1), (0.0, "c", 1, 1)]
    rows += [(0.0, None, 1, 1), (0.0, "b", 1, 1)]
    setup = setup_of(2, SMALL_LIMITS, plain_costs(1.0, 0.0))
    run = Cluster(rows_trace(*rows), setup, policy("round-robin")).run(check_all)
    # r0: b, d, None; r1: a, c, b, of which c is on r0
    assert [end_s for _, end_s in times_of(run)] == [4.5, 1.0, 7.5, 4.5, 1.0, 1.0]
    assert run.num_loads == 3


def test_adapters_leave_a_small_host_memory_and_come_again():
    rows = [(0.5 * place, "abcdefgh"[place * 5 % 8], 20, 3) for place in range(48)]
    trace = rows_trace(*rows)
    num_bytes = max(int(trace.num_bytes.max()), int(trace.num_bytes.sum()) // 3)
    for host_bytes, least, most in ((num_bytes, 9, 48), (1 << 30, 0, 0)):
        limits = replace(LIMITS, host_bytes=host_bytes, num_pages=num_bytes // PAGE_BYTES + 8)
        run = Cluster(trace, setup_of(1, limits), policy("least-loaded")).run(check_all)
        assert least <= run.num_loads <= most
        assert [each.num_given for each in run.requests] == [3] * 48


def test_arrival_rates_keep_replicas_busy_as_said():
    trace = busy_trace("on-off", 5, 133, share=0.4)
    total_s = busy_s(trace, FIGURES, LIMITS.max_step_tokens).sum()
    assert total_s / 5 / trace.arrivals_s[-1] == pytest.approx(0.4)


class TestMoves:
    """Requests of 4 + 20 tokens, steps of 0.25 s; moves are decided at GREEDY_PERIOD_S, 1 s."""

    SENT_S = 0.001 + LINK.seconds_for(2 * PAGE_BYTES)  # 4 + 4 - 1 tokens, in pages of 4

    @staticmethod
    def run_with(how, moved=("0",), max_step_tokens=16, **options):
        limits = replace(SMALL_LIMITS, max_step_tokens=max_step_tokens)
        rows = [(0.0, None, 4, 20), (0.0, None, 4, 2), (0.0, None, 4, 20)]
        setup = replace(setup_of(2, limits, plain_costs(0.25, 0.0)), **options)
        mover = Policy(name="moved", router="round-robin", migration="greedy")
        cluster = Cluster(rows_trace(*rows), setup, mover)
        moves = [tuple(Move(each, "r0", "r1", how) for each in moved)]

        def plan_moves(view):
            nothing = Objective((), 0.0, 0.0, 0.0)
            return Solution(
                moves=moves.pop() if moves else (),
                adapter_loads=(),
                before=nothing,
                after=nothing,
                lower_bound_s=0.0,
                seconds=0.0,
            )

        cluster._plan_moves = plan_moves
        return cluster.run(check_all)

    def test_one_that_is_elsewhere_stays_there(self):
        run = self.run_with("kv", moved=("1",))
        assert run.moved.num_requests == 0
        assert run.requests[0].end_s == 20 * 0.25

    def test_with_its_kv_it_goes_on_when_that_has_come(self):
        assert GREEDY_PERIOD_S == 1.0
        run = self.run_with("kv")
        assert run.requests[0].end_s == pytest.approx(1.0 + self.SENT_S + 16 * 0.25)
        moved = run.moved
        assert (moved.num_requests, moved.num_bytes) == (1, 2 * PAGE_BYTES)
        assert moved.num_lost_tokens == 0

    def test_a_link_carries_one_at_a_time(self):
        run = self.run_with("kv", moved=("0", "2"))
        first_s = 1.0 + self.SENT_S
        second_s = first_s + LINK.seconds_for(2 * PAGE_BYTES)
        # the second comes within a step of the first
        assert second_s < first_s + 0.25
        assert run.requests[0].end_s == pytest.approx(first_s + 16 * 0.25)
        assert run.requests[2].end_s == pytest.approx(first_s + 17 * 0.25)

    def test_without_it_all_is_computed_again(self):
        """8 tokens in two steps, of which the second gives the next one."""
        run = self.run_with("prefill", max_step_tokens=4)
        assert run.requests[0].end_s == pytest.approx(1.0 + 0.001 + 17 * 0.25)
        moved = run.moved
        assert (moved.num_requests, moved.num_bytes, moved.num_lost_tokens) == (1, 0, 7)

    def test_moves_wait_for_their_solver_if_that_is_counted(self, monkeypatch):
        readings = itertools.count()
        monkeypatch.setattr(
            "loraswarm.simulate.cluster.cluster.time.perf_counter", lambda: 0.5 * next(readings)
        )
        lost = [
            self.run_with("prefill", counts_solving=counts).moved.num_lost_tokens
            for counts in (False, True)
        ]
        assert lost == [7, 9]


class OnlyTo:
    """A router that knows one replica."""

    def __init__(self, replica_id):
        self.replica_id = replica_id

    def route(self, request, view, prefix=None):
        return self.replica_id


@pytest.mark.parametrize("name", ["ours", "dlora"])
def test_migration_spreads_what_was_routed_to_one_replica(name):
    """dLoRA's needs places: `c`, which r0 has in pages and nobody uses, gives one."""
    rows = [(0.01 * place, "b", 400, 30) for place in range(120)]
    rows += [(200.0, "a", 1, 1), (200.0, "c", 1, 1)]
    runs = []
    for migration in (None, policy(name).migration):
        cluster = Cluster(
            rows_trace(*rows), setup_of(2), replace(policy(name), migration=migration)
        )
        cluster._router = OnlyTo("r1")
        runs.append(cluster.run(check_all))
    assert runs[0].moved.num_requests == 0
    assert runs[1].moved.num_requests > 0
    ends = [max(each.end_s for each in run.requests[:120]) for run in runs]
    assert ends[1] < 0.9 * ends[0]


def test_punica_holds_what_has_no_room_and_sends_it_when_one_has_ended():
    """Steps of a second; two seats on each of two replicas, filled one after the other."""
    rows = [(0.0, None, 1, outputs) for outputs in (2, 2, 3, 4, 2, 2)]
    setup = setup_of(2, SMALL_LIMITS, plain_costs(1.0, 0.0))
    run = Cluster(rows_trace(*rows), setup, policy("punica")).run(check_all)
    assert [each.replica_id for each in run.requests] == ["r1", "r1", "r0", "r0", "r1", "r1"]
    assert [each.end_s for each in run.requests] == [2.0, 2.0, 3.0, 4.0, 4.0, 4.0]


def test_placement_brings_adapters_before_they_are_asked_for():
    trace, marginal = busy_trace("code", 4, 200), policy("marginal")
    placing = replace(marginal, has_placement=True)
    runs = [Cluster(trace, setup_of(4), each).run(check_all) for each in (marginal, placing)]
    assert runs[1].num_loads > runs[0].num_loads


class Alone:
    """Surroundings of one stock: an adapter takes 4 pages; what is to happen is in `actions`."""

    costs = plain_costs(1.0, 0.0)

    def __init__(self):
        self.actions, self.tiers = [], {}

    def now_s(self):
        return 0.0

    def bytes_of(self, adapter):
        return 4 * PAGE_BYTES

    def after(self, seconds, action):
        self.actions.append((seconds, action))

    def set_tier(self, replica_id, adapter, tier):
        self.tiers[adapter] = tier

    def wake(self, replica_id):
        pass

    def happen(self):
        self.actions.pop(0)[1]()


def test_an_adapter_that_is_waited_for_leaves_last_and_comes_again():
    around = Alone()
    limits = replace(LIMITS, num_pages=10, host_bytes=4 * PAGE_BYTES)
    stock = Stock("r0", limits, around, lambda adapter: None)
    stock.begin_with("y")  # fills host memory
    stock.begin_with("x")
    assert around.tiers == {"y": "device"}
    for adapter in ("y", "x"):
        stock.hold(adapter)
    assert not around.actions  # host memory is full of what is waited for
    stock.pin("y")
    stock.release("y")
    stock.unpin("y")
    around.happen()  # x has come, in the place of y
    assert around.tiers == {"y": "device", "x": "host"}
    stock.pin("x")
    stock.unpin("x")
    around.happen()
    assert stock.num_free == 2
    assert stock.make_room(6)
    assert around.tiers == {"y": None, "x": "device"}
    stock.hold("y")
    stock.release("x")
    around.happen()
    assert around.tiers == {"y": "host", "x": "device"}
    stock.hold("x")
    assert stock.make_room(10)
    assert around.tiers == {"y": "host", "x": None}
    stock.release("y")
    assert [seconds for seconds, _ in around.actions] == [3.0]
    around.happen()
    assert around.tiers == {"y": None, "x": "host"}
    stock.check(0)


class TestTraces:
    def test_bursts_are_those_of_the_recorded_code_trace(self):
        """Variance over mean of counts in 1, 10 and 60 s: 13, 72 and 164 in the record."""
        counts = {}
        for name in ("code", "conversation"):
            times = make_trace(name, MACHINE, 30_000, 100, 0).arrivals_s
            binned = [np.bincount((times / width).astype(int)) for width in (1.0, 10.0, 60.0)]
            counts[name] = [each.var() / each.mean() for each in binned]
        assert counts["code"] == pytest.approx([13, 72, 164], rel=0.4)
        assert counts["conversation"] == pytest.approx([1.4, 3.9, 16], rel=0.6)

    def test_ranks_and_lengths_are_drawn_as_said(self):
        trace = make_trace("code", MACHINE, 20_000, 5_000, 1)
        shares = [float(np.mean(trace.ranks == rank)) for rank in (8, 16, 32, 64)]
        assert shares == pytest.approx([0.35, 0.35, 0.2, 0.1], abs=0.02)
        found = np.quantile(trace.prompts, [0.25, 0.5, 0.95])
        assert found.tolist() == pytest.approx([578, 1469, 7315], rel=0.05)
        assert len(set(trace.num_bytes[trace.ranks == 16].tolist())) == 1
        assert trace.num_bytes[trace.ranks == 64].min() > trace.num_bytes[trace.ranks == 8].max()

    @pytest.mark.parametrize("name", ["code", "conversation", "on-off", "drifting-zipf", "slora"])
    def test_a_seed_makes_one_trace_that_ascends_from_zero(self, name):
        one, same, other = (make_trace(name, MACHINE, 133, 7, seed) for seed in (3, 3, 4))
        assert one.arrivals_s[0] == 0.0
        assert (np.diff(one.arrivals_s) >= 0).all()
        assert min(one.prompts.min(), one.outputs.min()) >= 1
        assert 0 <= one.adapters.min() <= one.adapters.max() < 7
        assert (one.arrivals_s == same.arrivals_s).all()
        assert (one.prompts != other.prompts).any()

    def test_factors_have_streams_of_their_own(self):
        few, many = (make_trace("code", MACHINE, 133, num, 3) for num in (7, 700))
        assert (few.arrivals_s == many.arrivals_s).all()
        assert (few.prompts == many.prompts).all()
        assert (few.adapters != many.adapters).any()

    def test_a_burst_is_of_one_adapter(self):
        shares = []
        for name in ("code", "conversation"):
            adapters = make_trace(name, MACHINE, 5_000, 100, 0).adapters
            shares.append(float(np.mean(adapters[1:] == adapters[:-1])))
        assert shares[0] > 0.4 > 0.2 > shares[1]

    def test_adapters_are_on_and_off(self):
        """A popular adapter's requests come in fewer of the minutes than if it were always on."""
        trace = make_trace("on-off", MACHINE, 20_000, 50, 0)
        minutes = (trace.arrivals_s / 60).astype(int)
        first = np.bincount(minutes[trace.adapters == 0], minlength=minutes.max() + 1)
        assert first.mean() > 30
        assert (first == 0).mean() > 0.3

    def test_a_column_without_adapter_is_the_base(self):
        trace = rows_trace((0.0, "b", 1, 2), (1.0, None, 3, 4), (2.0, "a", 5, 6))
        assert trace.adapters.tolist() == [1, BASE, 0]
        assert trace.names == ["a", "b"]


def test_what_can_never_fit_is_refused():
    trace = rows_trace((0.0, "a", 10**6, 1))
    with pytest.raises(ConfigError, match=r"1,000,001 tokens.*--pool"):
        Cluster(trace, setup_of(1), policy("ours"))
    trace = rows_trace((0.0, "a", 1, 1))
    with pytest.raises(ConfigError, match="--host-cache"):
        Cluster(trace, setup_of(1, replace(LIMITS, host_bytes=5)), policy("ours"))


def test_many_replicas_and_adapters_are_simulated():
    trace = make_trace("code", MACHINE, 1500, 20_000, 0)
    trace = scaled(trace, FIGURES, 200, 0.8, LIMITS.max_step_tokens)
    run = Cluster(trace, setup_of(200), policy("ours")).run()
    assert sum(each.num_given for each in run.requests) == trace.outputs.sum()
    assert len({each.replica_id for each in run.requests}) == 200
