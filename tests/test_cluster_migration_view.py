"""Migration from a cluster's view: when it is solved, what in, and what is worth moving."""

from __future__ import annotations

import pytest

from cost_cases import KNOWN, KV_TOKEN_BYTES, figures
from loraswarm.cluster.migration.from_view import (
    MigrationOptions,
    MigrationPlanner,
    imbalance_of,
    problem_of,
)
from loraswarm.cluster.migration.greedy import Greedy
from loraswarm.cluster.migration.move_costs import MoveCosts
from loraswarm.cluster.view import ClusterView, ReplicaLimits, ReplicaView, RoutedRequest
from loraswarm.core.cost_model import TransferCosts

PAGE_TOKENS = 16
PAGE_BYTES = PAGE_TOKENS * KV_TOKEN_BYTES
FIGURES = figures()
LINK = TransferCosts(fixed_s=0.002, byte_s=1e-9)
OPTIONS = MigrationOptions(time_limit_s=600.0)


def limits(num_pages: int = 1000, num_seats: int = 4) -> ReplicaLimits:
    return ReplicaLimits(
        num_seats=num_seats,
        max_step_tokens=64,
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        page_bytes=PAGE_BYTES,
    )


def view_of(*counts: int, num_pages: int = 1000, prompt_tokens: int = 100) -> ClusterView:
    """So many decoding requests of the base on r0, r1, ..."""
    view = ClusterView(costs=FIGURES, adapter_bytes={"a": 5_000_000})
    for j, count in enumerate(counts):
        replica = ReplicaView(f"r{j}", limits(num_pages))
        view.replicas[replica.replica_id] = replica
        for i in range(count):
            replica.add(decoding(f"r{j}-{i}", prompt_tokens))
    return view


def decoding(name: str, prompt_tokens: int = 100, *adapters: str) -> RoutedRequest:
    return RoutedRequest(
        request_id=name,
        adapters=adapters,
        prompt_tokens=prompt_tokens,
        expected_tokens=120,
        prefill_tokens=0,
        output_tokens=20,
    )


def planner(**options: float) -> MigrationPlanner:
    given = MigrationOptions(**{"time_limit_s": 600.0, **options})
    return MigrationPlanner(Greedy(num_rounds=5), MoveCosts(FIGURES, LINK), given)


def test_a_queue_is_unbalanced_only_if_requests_wait_that_could_run_elsewhere():
    assert imbalance_of(view_of(6, 0), OPTIONS) == "queue"
    assert imbalance_of(view_of(4, 0), OPTIONS) is None
    assert imbalance_of(view_of(9, 9), OPTIONS) is None
    closed = view_of(6, 0)
    closed.replicas["r1"].accepts = False
    assert imbalance_of(closed, OPTIONS) is None
    assert imbalance_of(ClusterView(FIGURES, {}), OPTIONS) is None


def test_queues_are_not_evened_out_while_no_replica_is_idle():
    assert imbalance_of(view_of(99, 1), OPTIONS) is None
    assert imbalance_of(view_of(99, 1), MigrationOptions(idle_share=0.5)) == "queue"
    assert imbalance_of(view_of(99, 0), MigrationOptions(idle_share=0.0)) is None
    assert imbalance_of(view_of(6, 0), MigrationOptions(queue_difference=2.0)) is None


def test_memory_is_unbalanced_only_if_a_pool_is_full_and_another_is_not():
    """A request of 120 tokens has 8 pages."""
    assert imbalance_of(view_of(4, 1, num_pages=33), OPTIONS) == "memory"
    assert imbalance_of(view_of(4, 1, num_pages=40), OPTIONS) is None
    assert imbalance_of(view_of(4, 4, num_pages=33), OPTIONS) is None


def test_adapters_in_use_fill_a_pool():
    view = view_of(3, 1, num_pages=50)
    assert imbalance_of(view, OPTIONS) is None
    view.replicas["r0"].add(decoding("q", 100, "a"))
    view = ClusterView(FIGURES, {"a": 20 * PAGE_BYTES}, view.replicas)
    assert imbalance_of(view, OPTIONS) == "memory"


def test_a_problem_is_in_seconds_and_bytes_of_the_figures():
    view = view_of(1, 0)
    view.replicas["r0"].add(decoding("q", 100, "a"))
    view.set_tier("r0", "a", "device")
    view.set_tier("r1", "a", "host")
    given = problem_of(view, MoveCosts(FIGURES, LINK, message_s=0.003))
    plain, adapted = given.requests
    row_s = (KNOWN.fixed_s + 4e-5) / 4 + KNOWN.logit_row_s
    read_s = KNOWN.kv_byte_s * KV_TOKEN_BYTES * (120 + 50)
    assert plain.work_s == pytest.approx(100 * (row_s + read_s))
    own_s = KNOWN.adapted_token_s + KNOWN.lora_product_s * 5_000_000
    assert adapted.work_s == pytest.approx(plain.work_s + 100 * own_s)
    assert plain.memory_bytes == 11 * PAGE_BYTES
    assert plain.kv_move_s == pytest.approx(0.003 + 0.002 + 8 * PAGE_BYTES * 1e-9)
    adapter = given.adapters["a"]
    assert adapter.share_s == pytest.approx(100 * (5e-5 + 3e-11 * 5_000_000))
    assert adapter.copy_s == pytest.approx(0.001 + 5e-4)
    assert adapter.load_s == pytest.approx(0.01 + 5e-3 + 0.001 + 5e-4)
    assert [dict(each.tiers) for each in given.replicas] == [{"a": "device"}, {"a": "host"}]
    assert given.replicas[0].pool_bytes == 1000 * PAGE_BYTES


def test_a_request_that_waits_moves_by_a_message_and_has_its_prompt_to_do():
    view = view_of(1)
    waiting = RoutedRequest(
        request_id="w", adapters=(), prompt_tokens=64, expected_tokens=1, prefill_tokens=64
    )
    view.replicas["r0"].add(waiting)
    decoding_one, waiting_one = problem_of(view, MoveCosts(FIGURES, LINK)).requests
    assert waiting_one.how == "prefill"
    assert waiting_one.move_s == 0.001 < decoding_one.move_s
    chunk_s = KNOWN.fixed_s + 4e-5 + 12 * 2e-4 + 48 * 9e-4 + 3e-4 + 2e-8 * 64 * 65 / 2
    assert waiting_one.work_s == pytest.approx(chunk_s + decoding_one.work_s / 100, rel=0.01)


def test_a_solve_does_not_see_what_the_view_becomes():
    view = view_of(8, 0)
    view.replicas["r0"].add(decoding("q", 100, "a"))
    view.set_tier("r0", "a", "device")
    given = planner().problem(view)
    assert given is not None
    view.set_tier("r0", "a", None)
    view.replicas["r0"].saw_tokens("q", 50)
    view.replicas["r0"].remove("r0-0")
    assert len(given.requests) == 9
    assert given.replicas[0].tiers == {"a": "device"}


def test_requests_move_from_a_long_queue():
    solution = planner().plan(view_of(9, 0))
    assert solution is not None
    assert len(solution.moves) == 4
    assert {(move.source, move.target) for move in solution.moves} == {("r0", "r1")}


def test_what_is_balanced_is_not_solved():
    class Never:
        def solve(self, problem: object, time_limit_s: float) -> object:
            raise AssertionError

    balanced = MigrationPlanner(Never(), MoveCosts(FIGURES))  # type: ignore[arg-type]
    assert balanced.plan(view_of(4, 2)) is None
    with pytest.raises(AssertionError):
        balanced.plan(view_of(9, 0))


def test_moves_that_gain_too_little_are_not_made():
    assert planner(least_gain_share=0.1).plan(view_of(9, 0)) is not None
    assert planner(least_gain_share=0.6).plan(view_of(9, 0)) is None


def test_the_way_of_a_move_follows_what_was_measured():
    costs = MoveCosts(FIGURES, LINK)
    view = view_of(9, 1, prompt_tokens=1000, num_pages=10_000)
    assert {each.how for each in problem_of(view, costs).requests} == {"kv"}
    for _ in range(100):
        costs.saw_kv(12_000_000, 3.0)
    assert {each.how for each in problem_of(view, costs).requests} == {"prefill"}
    assert costs.kv_s(12_000_000) == pytest.approx(3.0, rel=0.01)
    for _ in range(100):
        costs.saw_prefill(1000, 30.0)
    assert {each.how for each in problem_of(view, costs).requests} == {"kv"}
    assert costs.prefill_s(1000) == pytest.approx(30.0, rel=0.01)


def test_without_a_link_replicas_share_a_machine():
    assert MoveCosts(FIGURES).kv_s(10**9) == pytest.approx(0.001 + 0.001 + 0.1)


@pytest.mark.parametrize("seen", [(0, 1.0), (-1, 1.0), (5, -1.0), (5, float("nan"))])
def test_what_cannot_have_been_measured_is_refused(seen):
    costs = MoveCosts(FIGURES)
    for saw in (costs.saw_kv, costs.saw_prefill):
        with pytest.raises(ValueError, match="must"):
            saw(*seen)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"full_share": -0.1}, "full_share is -0.1"),
        ({"least_gain_share": float("nan")}, "least_gain_share is nan"),
        ({"adapter_share": 0.0}, "adapter_share is 0.0"),
        ({"adapter_share": 1.5}, "adapter_share is 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        MigrationOptions(**options)
