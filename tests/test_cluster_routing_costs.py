"""What a request would cost on a replica: figures worked by hand from a known cost model."""

from __future__ import annotations

import pytest

from cost_cases import KNOWN, KV_TOKEN_BYTES, figures
from loraswarm.cluster.routing.costs import (
    DecodeRows,
    MarginalCosts,
    StepEstimates,
    load_s,
    num_to_end,
)
from loraswarm.cluster.routing.router import NO_PREFIX, PrefixTokens
from loraswarm.core.step_cost import ChunkWork, StepWork
from routing_cases import LIMITS, SIZES, decoding, request, view_of

STEPS = StepEstimates(figures())


def added(request_, view, replica_id="r0", prefix=NO_PREFIX):
    return MarginalCosts(view.costs).added(request_, view.replicas[replica_id], view, prefix)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 16, 40, 64, 133])
@pytest.mark.parametrize("num_adapters", [0, 1, 3])
def test_a_step_of_decodes_is_what_the_cost_model_says(num_rows, num_adapters):
    chunks = [
        ChunkWork(
            num_tokens=1,
            num_computed=7,
            adapter=index % num_adapters if num_adapters else None,
            adapter_bytes=5000 if num_adapters else 0,
        )
        for index in range(num_rows)
    ]
    rows = DecodeRows(num_rows, 7 * num_rows, min(num_adapters, num_rows), 5000)
    expected = figures().step_s(StepWork.of(chunks, KV_TOKEN_BYTES))
    assert STEPS.decode_s(rows) == pytest.approx(expected)


@pytest.mark.parametrize("num_rows", [0, 3, 15, 63, 70])
def test_an_added_row_is_the_difference_of_two_steps(num_rows):
    before = DecodeRows(num_rows, 0, num_rows, 5000)
    after = DecodeRows(num_rows + 1, 0, num_rows + 1, 5000)
    difference = STEPS.decode_s(after) - STEPS.decode_s(before)
    assert STEPS.added_row_s(before, 5000, is_new=True) + STEPS.context_s(1) == pytest.approx(
        difference
    )
    same = STEPS.added_row_s(before, 5000, is_new=False)
    saved = KNOWN.adapter_s + 5000 * KNOWN.tile_byte_s
    assert STEPS.added_row_s(before, 5000, is_new=True) - same == pytest.approx(saved)
    assert STEPS.added_row_s(before, None, is_new=False) < same


def test_an_idle_replica_costs_its_own_prompt_and_answer():
    cost = added(request(prompt=32, expected=10), view_of(1))
    chunk_s = (KNOWN.fixed_s + 4 * 1e-5 + 12 * 2e-4 + 48 * 9e-4 + KNOWN.logit_row_s) / 64
    assert cost.prefill_s == pytest.approx(32 * chunk_s + 2e-8 * 32 * 16)
    row_s = KNOWN.fixed_s + 1e-5 + KNOWN.logit_row_s
    kv_s = KNOWN.kv_byte_s * KV_TOKEN_BYTES * (32 + 5)
    assert cost.answer_s == pytest.approx(10 * (row_s + kv_s))
    assert (cost.wait_s, cost.load_s, cost.others_s) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        ("device", 0.0),
        ("host", 0.001 + 4_000_000 * 1e-10),
        (None, 0.001 + 4_000_000 * 1e-10 + 0.01 + 4_000_000 * 1e-9),
    ],
)
def test_an_adapter_costs_its_way_from_the_tier_where_it_is(tier, expected):
    view = view_of(1)
    view.set_tier("r0", "large", tier)
    replica = view.replicas["r0"]
    assert load_s(request("new", "large"), replica, view) == pytest.approx(expected)
    decoding(replica, "large")
    assert load_s(request("new", "large"), replica, view) == pytest.approx(expected / 2)
    assert load_s(request("new"), replica, view) == 0.0


def test_prompts_before_it_and_a_taken_seat_are_waited_for():
    view = view_of(1)
    replica = view.replicas["r0"]
    replica.add(request("first", prompt=128))
    waiting = added(request(), view)
    assert waiting.wait_s == pytest.approx(STEPS.queued_prefill_s(128, 64))
    replica.saw_tokens("first", 1)
    assert added(request(), view).wait_s == 0.0
    for _ in range(LIMITS.num_seats - 1):
        decoding(replica, prompt=128, expected=9)
    # Four rows with nine tokens left each: one ends every 9 / 4 steps.
    step_s = STEPS.decode_s(DecodeRows(4, replica.context_tokens, 0, 0.0))
    assert added(request(), view).wait_s == pytest.approx(9 / 4 * step_s)


def test_those_who_must_end_are_counted_by_seats_and_by_pages():
    view = view_of(1)
    replica = view.replicas["r0"]
    assert num_to_end(request(prompt=1600), replica, 0) == 0
    for _ in range(3):
        decoding(replica, prompt=400)
    assert num_to_end(request(prompt=400), replica, 0) == 0
    assert num_to_end(request(prompt=401), replica, 0) == 1
    assert num_to_end(request(prompt=400), replica, 1.0) == 1, "adapters in use take room too"
    assert num_to_end(request(prompt=900), replica, 0) == 2
    decoding(replica, prompt=1)
    decoding(replica, prompt=1)
    assert num_to_end(request(prompt=1), replica, 0) == 2


def test_a_cached_prefix_saves_its_prefill_but_never_the_last_token():
    view = view_of(1)
    decoding(view.replicas["r0"])
    plain = added(request(prompt=32), view)
    half = added(request(prompt=32), view, prefix=PrefixTokens({"r0": 16}))
    whole = added(request(prompt=32), view, prefix=PrefixTokens({"r0": 32}))
    elsewhere = added(request(prompt=32), view, prefix=PrefixTokens({"r1": 32}))
    assert elsewhere == plain
    chunk_s = STEPS.queued_prefill_s(1, 64)
    assert half.prefill_s == pytest.approx(16 * chunk_s + 2e-8 * 16 * (16 + 8))
    assert whole.prefill_s == pytest.approx(chunk_s + 2e-8 * (31 + 0.5))
    saved = plain.total_s - half.total_s
    assert saved == pytest.approx(2 * (plain.prefill_s - half.prefill_s)), "its own, and a row's"


def test_a_request_that_brings_its_kv_with_it_has_no_prefill():
    moved = request(prompt=32, prefill=0)
    assert added(moved, view_of(1), prefix=PrefixTokens({"r0": 16})).prefill_s == 0.0


def test_others_wait_for_its_prompt_and_for_longer_steps():
    view = view_of(1)
    replica = view.replicas["r0"]
    decoding(replica, "small", expected=100)
    decoding(replica, "small", expected=100)
    cost = added(request("new", "large", prompt=32, expected=10), view)
    rows = DecodeRows(2, replica.context_tokens, 1, SIZES["small"])
    longer_s = STEPS.added_row_s(rows, SIZES["large"], is_new=True) + STEPS.context_s(32 + 5)
    # Two others, for the ten steps that it is there.
    assert cost.others_s == pytest.approx(2 * cost.prefill_s + 20 * longer_s)
    shared = added(request("new", "small", prompt=32, expected=10), view)
    assert shared.others_s < cost.others_s
