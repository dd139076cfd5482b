"""Migration: what a placement is worth, what none is below, and what the greedy solver does."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from loraswarm.cluster.migration.bound import Bound
from loraswarm.cluster.migration.greedy import Greedy
from loraswarm.cluster.migration.objective import (
    MEAN_WEIGHT,
    Found,
    Indexed,
    needed_on,
    objective_of,
    solution_of,
)
from loraswarm.cluster.migration.placement import Placement
from loraswarm.cluster.migration.problem import (
    AdapterLoad,
    MigrationProblem,
    Move,
    NeededAdapter,
    OpenRequest,
    ReplicaRoom,
)
from migration_cases import KINDS, draw_problem

LONG_S = 600.0
FEW_ROUNDS = Greedy(num_rounds=5)
EXACT = 1e-9


def request(name: str, replica: str, *adapters: str, **values: float) -> OpenRequest:
    numbers = {"work_s": 1.0, "memory_bytes": 0, "kv_move_s": 0.1, "prefill_move_s": 0.2} | values
    return OpenRequest(request_id=name, replica_id=replica, adapters=adapters, **numbers)


def room(name: str, **values: object) -> ReplicaRoom:
    return ReplicaRoom(**{"replica_id": name, "pool_bytes": 100, "adapter_bytes": 50} | values)


def adapter(name: str, num_bytes: int = 10, **values: float) -> NeededAdapter:
    seconds = {"share_s": 0.5, "load_s": 0.4, "copy_s": 0.3} | values
    return NeededAdapter(name=name, num_bytes=num_bytes, **seconds)


def problem(
    requests: list[OpenRequest], replicas: list[ReplicaRoom], *adapters: NeededAdapter
) -> MigrationProblem:
    return MigrationProblem(
        requests=tuple(requests),
        replicas=tuple(replicas),
        adapters={each.name: each for each in adapters},
        overflow_byte_s=0.01,
    )


def all_small() -> list[MigrationProblem]:
    sizes = ((1, 3), (3, 7), (7, 33), (12, 64))
    return [draw_problem(kind, *size, seed=5) for kind in KINDS for size in sizes]


def test_a_placement_is_worth_work_moves_adapters_and_overflow():
    """By hand: `a` is in pages of r0, in host memory of r1, in the store of r2."""
    given = problem(
        [
            request("q0", "r0", "a", work_s=2.0, memory_bytes=70),
            request("q1", "r0", "a", work_s=3.0, memory_bytes=40),
            request("q2", "r2", work_s=1.0, memory_bytes=5),
        ],
        [room("r0", tiers={"a": "device"}), room("r1", tiers={"a": "host"}), room("r2")],
        adapter("a"),
    )
    indexed = Indexed.of(given)
    here = 2.0 + 3.0 + 0.5 + 0.01 * (70 + 40 + 10 - 100)
    assert objective_of(indexed, [0, 0, 2]).loads_s == pytest.approx((here, 0.0, 1.0))
    moved = objective_of(indexed, [0, 1, 2])
    assert moved.loads_s == pytest.approx((2.5, 3.0 + 0.1 + 0.5 + 0.3, 1.0))
    assert objective_of(indexed, [0, 2, 2]).loads_s[2] == pytest.approx(4.0 + 0.1 + 0.5 + 0.4)
    assert moved.objective_s == pytest.approx(3.9 + MEAN_WEIGHT * (2.5 + 3.9 + 1.0) / 3)


def test_two_requests_of_three_stay_together_with_their_adapter():
    """Sharing `a` saves its reading and its load: the other request goes."""
    given = problem(
        [request("q0", "r0", "a"), request("q1", "r0", "a"), request("q2", "r0", work_s=1.9)],
        [room("r0", tiers={"a": "device"}), room("r1")],
        adapter("a"),
    )
    solution = Greedy().solve(given, LONG_S)
    assert solution.moves == (Move("q2", "r0", "r1", "kv"),)
    assert solution.adapter_loads == ()
    assert solution.after.loads_s == pytest.approx((2.5, 2.0))


def test_an_adapter_moves_with_its_requests():
    given = problem(
        [request(f"q{i}", "r0", "a" if i < 2 else "b", work_s=4.0) for i in range(4)],
        [room("r0", tiers={"a": "device", "b": "device"}), room("r1", tiers={"b": "host"})],
        adapter("a"),
        adapter("b"),
    )
    solution = Greedy().solve(given, LONG_S)
    assert {move.request_id for move in solution.moves} == {"q2", "q3"}
    assert solution.adapter_loads == (AdapterLoad("b", "r1"),)


def test_a_move_is_by_the_cheaper_way():
    cheap_kv, cheap_prefill = {"prefill_move_s": 0.3}, {"prefill_move_s": 0.01}
    requests = [request("q0", "r0", **cheap_kv), request("q1", "r0", **cheap_prefill)]
    indexed = Indexed.of(problem(requests, [room("r0"), room("r1")]))
    moves = solution_of(indexed, Found([1, 1], 0.0, 0.0)).moves
    assert [move.how for move in moves] == ["kv", "prefill"]
    assert objective_of(indexed, [1, 1]).loads_s[1] == pytest.approx(2.0 + 0.1 + 0.01)


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [request("q0", "r0")],
        [request("q0", "r0"), request("q1", "r1")],
        [request("q0", "r0", kv_move_s=5.0, prefill_move_s=5.0), request("q1", "r0", work_s=0.5)],
    ],
    ids=["no request", "one request", "balanced", "moves cost too much"],
)
def test_nothing_moves_where_nothing_gains(requests):
    costly = [replace(each, kv_move_s=5.0, prefill_move_s=5.0) for each in requests]
    solution = Greedy().solve(problem(costly, [room("r0"), room("r1")]), LONG_S)
    assert solution.moves == ()
    assert solution.gain_s == 0.0


def test_the_same_requests_move_where_it_gains():
    """The control of the test above."""
    requests = [request("q0", "r0"), request("q1", "r0")]
    solution = Greedy().solve(problem(requests, [room("r0"), room("r1")]), LONG_S)
    assert len(solution.moves) == 1
    assert solution.gain_s > 0.8


def test_two_requests_are_exchanged_where_giving_one_does_not_help():
    """7 and 5 become 6 and 6, but for the moves; nothing is tried at random."""
    works = {"r0": (4.0, 3.0), "r1": (3.0, 2.0)}
    requests = [
        request(f"{name}-{work_s:.0f}", name, work_s=work_s)
        for name, some in works.items()
        for work_s in some
    ]
    solution = Greedy(num_rounds=0).solve(problem(requests, [room("r0"), room("r1")]), LONG_S)
    assert {(move.request_id, move.target) for move in solution.moves} == {
        ("r0-4", "r1"),
        ("r1-3", "r0"),
    }
    assert solution.after.loads_s == pytest.approx((6.1, 6.1))


def test_memory_that_overflows_is_a_load():
    """Both have little work; what does not fit is computed again."""
    requests = [request(f"q{i}", "r0", memory_bytes=90, work_s=0.2) for i in range(2)]
    tight = problem(requests, [room("r0"), room("r1")])
    assert len(Greedy().solve(tight, LONG_S).moves) == 1
    roomy = problem(requests, [room("r0", pool_bytes=200), room("r1", pool_bytes=200)])
    assert len(Greedy().solve(replace(roomy, overflow_byte_s=0.0), LONG_S).moves) == 1
    slow = [replace(each, work_s=0.05) for each in requests]
    assert Greedy().solve(replace(roomy, requests=tuple(slow)), LONG_S).moves == ()


def test_nothing_comes_to_a_replica_that_does_not_accept_but_its_requests_may_leave():
    requests = [request(f"q{i}", "r0" if i < 4 else "r1") for i in range(8)]
    given = problem(requests, [room("r0"), room("r1", accepts=False), room("r2")])
    solution = Greedy().solve(given, LONG_S)
    assert {move.target for move in solution.moves} == {"r2"}
    assert {move.source for move in solution.moves} == {"r0", "r1"}


def test_adapters_never_exceed_what_a_replica_allows():
    """Without the limit, the request of `b` would go where there is nothing to do."""
    requests = [request("q0", "r0", "a"), request("q1", "r0", "b", work_s=3.0)]
    small, large = room("r1", adapter_bytes=9), room("r1", adapter_bytes=10)
    for target, num_moves in ((small, 0), (large, 1)):
        given = problem(requests, [room("r0"), target], adapter("a"), adapter("b"))
        assert len(Greedy().solve(given, LONG_S).moves) == num_moves


@pytest.mark.parametrize("given", all_small())
def test_limits_hold_unless_they_did_not_before(given):
    indexed = Indexed.of(given)
    solution = FEW_ROUNDS.solve(given, LONG_S)
    place = {each.replica_id: j for j, each in enumerate(given.replicas)}
    targets = {move.request_id: place[move.target] for move in solution.moves}
    after = [
        targets.get(each.request_id, home)
        for each, home in zip(given.requests, indexed.home, strict=True)
    ]
    for j, needed in enumerate(needed_on(indexed, after)):
        now = needed_on(indexed, indexed.home)[j]
        used, had = (sum(indexed.needed[k].num_bytes for k in some) for some in (needed, now))
        assert used <= max(given.replicas[j].adapter_bytes, had)
    assert all(given.replicas[place[move.target]].accepts for move in solution.moves)
    assert objective_of(indexed, after) == solution.after


@pytest.mark.parametrize("given", all_small())
def test_greedy_is_between_the_bound_and_what_was_before(given):
    solution = FEW_ROUNDS.solve(given, LONG_S)
    assert 0.0 < solution.lower_bound_s <= solution.after.objective_s * (1.0 + EXACT)
    assert solution.after.objective_s <= solution.before.objective_s


def test_no_placement_is_below_the_bound():
    for kind, seed in itertools.product(KINDS, range(10)):
        indexed = Indexed.of(draw_problem(kind, 2, 7, seed))
        allowed = [[j for j in range(2) if indexed.may_host(i, j)] for i in range(7)]
        placements = itertools.product(*allowed)
        best_s = min(objective_of(indexed, each).objective_s for each in placements)
        assert 0.0 < Bound(indexed).objective_s <= best_s * (1.0 + EXACT)


def test_the_bound_counts_moves_copies_and_overflow():
    """Each is known by hand, and each is missed by the sum of all work alone."""
    rooms = [room("r0"), room("r1")]
    moving = problem([request(f"q{i}", "r0") for i in range(10)], rooms)
    assert Bound(Indexed.of(moving)).makespan_s == pytest.approx(10.0 / 2 + 0.5 / 2, rel=0.03)
    needing = [request(f"q{i}", f"r{i % 2}", "a") for i in range(10)]
    tiers = {"a": "device"}
    held = [room("r0", tiers=tiers), room("r1", tiers=tiers)]
    assert Bound(Indexed.of(problem(needing, held, adapter("a")))).makespan_s == pytest.approx(5.5)
    full = [request(f"q{i}", f"r{i % 2}", memory_bytes=30) for i in range(10)]
    assert Bound(Indexed.of(problem(full, rooms))).makespan_s == pytest.approx(5.5)


def test_one_problem_has_one_answer():
    given = draw_problem(KINDS[1], 7, 40, seed=1)
    first, second = (FEW_ROUNDS.solve(given, LONG_S) for _ in range(2))
    assert first.moves == second.moves
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_without_time_load_is_spread_all_the_same():
    given = draw_problem(KINDS[0], 12, 64, seed=0)
    hasty, patient = Greedy().solve(given, 0.0), FEW_ROUNDS.solve(given, LONG_S)
    assert hasty.after.objective_s < 0.5 * hasty.before.objective_s
    assert patient.after.objective_s < hasty.after.objective_s


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_placement_that_is_changed_agrees_with_its_definition(kind):
    indexed = Indexed.of(with_two_adapters(draw_problem(kind, 6, 40, seed=1)))
    placement, chance = Placement(indexed), random.Random(0)
    for _ in range(200):
        i, j = chance.randrange(40), chance.randrange(6)
        source = placement.at[i]
        seconds, num_bytes = (row[0, j] for row in placement.entries(np.array([i])))
        at_s, at_bytes = (column[0] for column in placement.entries_at(j, np.array([i])))
        left_s = placement.load_without_s(source, np.array([i]))[0]
        base_s, used = placement.base_s[j], placement.used_bytes[j]
        placement.move(i, j)
        assert placement.loads_s() == pytest.approx(objective_of(indexed, placement.at).loads_s)
        if source == j:
            continue
        assert placement.load_s(source) == pytest.approx(left_s)
        assert used + num_bytes == placement.used_bytes[j] == used + at_bytes
        assert not np.isfinite(seconds) or base_s + seconds == pytest.approx(placement.base_s[j])
        assert not np.isfinite(at_s) or base_s + at_s == pytest.approx(placement.base_s[j])


def with_two_adapters(given: MigrationProblem) -> MigrationProblem:
    """Every third request needs another adapter too."""
    requests = list(given.requests)
    for i in range(0, len(requests), 3):
        others = [name for name in given.adapters if name not in requests[i].adapters]
        adapters = (*requests[i].adapters, others[i % len(others)])
        requests[i] = replace(requests[i], adapters=adapters)
    return replace(given, requests=tuple(requests))


@pytest.mark.parametrize(
    ("requests", "replicas", "said"),
    [
        ([request("q0", "r9")], [room("r0")], "'q0' is on 'r9'"),
        ([request("q0", "r0"), request("q0", "r0")], [room("r0")], "request 'q0' is there twice"),
        ([], [room("r0"), room("r0")], "replica 'r0' is there twice"),
        ([], [], "at least one replica"),
        ([request("q0", "r0", "z")], [room("r0")], "unknown adapter 'z'"),
        ([request("q0", "r0", "a", "a")], [room("r0")], "an adapter twice"),
        ([request("q0", "r0", work_s=-1.0)], [room("r0")], "work_s of request 'q0' is -1.0"),
        ([request("q0", "r0", work_s=float("nan"))], [room("r0")], "work_s of request 'q0' is nan"),
        ([request("q0", "r0", kv_move_s=float("inf"))], [room("r0")], "kv_move_s of request 'q0'"),
        ([], [room("r0", pool_bytes=-1)], "pool_bytes of replica 'r0' is -1"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(requests, replicas, said):
    with pytest.raises(ValueError, match=said):
        problem(requests, replicas, adapter("a"))


def test_an_adapter_under_another_name_or_without_seconds_is_refused():
    with pytest.raises(ValueError, match="'a' is listed as 'b'"):
        MigrationProblem(
            requests=(), replicas=(room("r0"),), adapters={"b": adapter("a")}, overflow_byte_s=0.0
        )
    with pytest.raises(ValueError, match="share_s of adapter 'a' is nan"):
        problem([], [room("r0")], adapter("a", share_s=float("nan")))


def test_a_solver_that_breaks_a_limit_is_found_out():
    given = problem(
        [request("q0", "r0", "a")], [room("r0"), room("r1", accepts=False)], adapter("a")
    )
    with pytest.raises(ValueError, match="cannot come"):
        solution_of(Indexed.of(given), Found([1], 0.0, 0.0))
    small = replace(given, replicas=(room("r0"), room("r1", adapter_bytes=9)))
    with pytest.raises(ValueError, match="exceed"):
        solution_of(Indexed.of(small), Found([1], 0.0, 0.0))
