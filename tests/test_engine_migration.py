"""A request that goes from one engine to another in the middle of its answer: at every token the
same answer as undisturbed, with its K and V and without, and nothing is left behind."""

from __future__ import annotations

from random import Random

import pytest

from adapter_factory import save_random_adapter
from engine_factory import make_engine, make_request, prompt_of, run, save_swarm, tokens_of
from frozen_cases import assert_nothing_left, renamed, take
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.errors import InvalidRequest
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config

NUM_TOKENS = 64
INVOCATION = (5, 21)


def params(**choices) -> SamplingParams:
    return SamplingParams(
        max_tokens=NUM_TOKENS, ignore_eos=True, **({"temperature": 0.0} | choices)
    )


def mixed(request_id: str, how: SamplingParams) -> Request:
    mix = (("a001", 0.5), ("a002", 0.75))
    return Request(
        request_id=request_id, prompt_token_ids=prompt_of(3, 21), params=how, adapters=mix
    )


REQUESTS = (
    make_request("greedy base", None, prompt_of(0, 17), params()),
    make_request("greedy adapter", "a000", prompt_of(1, 33), params()),
    make_request("drawn", "a001", prompt_of(2, 7), params(temperature=1.4, top_p=0.95, seed=7)),
    make_request("unseeded", "a002", prompt_of(5, 16), params(temperature=1.8)),
    mixed("mixed", params(temperature=0.9, seed=-3)),
    make_request(
        "penalised",
        "a002",
        prompt_of(4, 31),
        params(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, logprobs=2),
    ),
    make_request(
        "ends barred",
        None,
        prompt_of(6, 3),
        params(temperature=2.0, seed=5, min_tokens=60, stop_token_ids=tuple(range(3, 120))),
    ),
    make_request("activated", "late", (*prompt_of(7, 19), *INVOCATION, 9, 9, 9), params()),
    make_request("never activated", "late", prompt_of(8, 40), params()),
    make_request("scored prompt", "a000", prompt_of(9, 50), params(prompt_logprobs=1)),
)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 3, ranks=(8, 17, 4))
    save_random_adapter(
        path / "adapters" / "late",
        decoder_config(read_config(path / "model")).shape(),
        std=0.2,
        config_overrides={"alora_invocation_tokens": list(INVOCATION)},
    )
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["prefix cache", "no prefix cache"])
def engines(swarm, request):
    """Two engines; the second cuts prompts otherwise."""
    options = {"pool_bytes": 32 << 20, "prefix_caching": request.param}
    return make_engine(swarm, **options), make_engine(
        swarm, max_step_tokens=72, max_num_sequences=64, **options
    )


@pytest.fixture(scope="module")
def undisturbed(swarm):
    return run(make_engine(swarm), REQUESTS)


def start(engine) -> None:
    """All requests, of which the engine gives one its seed."""
    engine._reception._seeds = Random(0)
    for request in REQUESTS:
        engine.add(request)


def what_was_said(events) -> tuple:
    """All of it that does not depend on time, or on the last bits of logits."""
    logprobs = [each.token_id for event in events for each in event.logprobs or ()]
    prompt = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    ranks = [[each and (each.token_id, each.rank) for each in found] for found in prompt]
    ends = [event.finish_reason for event in events if event.finish_reason is not None]
    num_starts = sum(event.queue_s is not None for event in events)
    return tokens_of(events), logprobs, ranks, ends, events[-1].stop_token_id, num_starts


def test_these_requests_are_not_alike(undisturbed):
    said = {name: what_was_said(events) for name, events in undisturbed.items()}
    assert len({tuple(tokens) for tokens, *_ in said.values()}) == len(REQUESTS)
    assert all(len(tokens) >= 60 for tokens, *_ in said.values())
    assert said["ends barred"][3] == ["stop"]
    assert all(num_starts == 1 for *_, num_starts in said.values())


@pytest.mark.parametrize("with_kv", [True, False], ids=["kv", "tokens"])
def test_a_copy_taken_at_every_token_goes_on_with_the_same_ones(engines, undisturbed, with_kv):
    """The source freezes and thaws each request after each step, and answers as undisturbed; every
    third snapshot goes on in the target."""
    source, target = engines
    found = {request.request_id: [] for request in REQUESTS}
    copies, num_snapshots = {}, 0
    start(source)
    while source.has_work:
        for name in source._reception.open_ids:
            snapshot = take(source, name, with_kv)
            assert source.thaw(name)
            num_snapshots += 1
            if num_snapshots % 3 == 0:
                copy = renamed(snapshot, f"{name} {num_snapshots}")
                copies[copy.request_id] = copy
        for event in source.step():
            found[event.request_id].append(event)
        source.check()
    positions = {len(each.output_token_ids) for each in copies.values()}
    assert positions == set(range(NUM_TOKENS))
    expected = {name: what_was_said(events) for name, events in undisturbed.items()}
    assert {name: what_was_said(events) for name, events in found.items()} == expected
    rests = {copy_id: [] for copy_id in copies}
    for snapshot in copies.values():
        target.adopt(snapshot)
    while target.has_work:
        for event in target.step():
            rests[event.request_id].append(event)
    for copy_id, rest in rests.items():
        name, _, _ = copy_id.rpartition(" ")
        num_before = len(copies[copy_id].output_token_ids)
        before = [event for event in found[name] if event.token_ids][:num_before]
        assert what_was_said([*before, *rest]) == expected[name], copy_id
    assert_nothing_left(source)
    assert_nothing_left(target)


@pytest.mark.parametrize("with_kv", [True, False], ids=["kv", "tokens"])
def test_requests_that_change_engines_with_every_token_answer_as_undisturbed(
    engines, undisturbed, with_kv
):
    owner, other = engines
    found = {request.request_id: [] for request in REQUESTS}
    start(owner)
    num_moves = 0
    while owner.has_work:
        for event in owner.step():
            found[event.request_id].append(event)
        for name in owner._reception.open_ids:
            snapshot = take(owner, name, with_kv)
            assert snapshot.output_token_ids == tuple(tokens_of(found[name]))
            other.adopt(snapshot)
            assert owner.release(name)
            num_moves += 1
        assert_nothing_left(owner)
        owner, other = other, owner
    assert num_moves >= NUM_TOKENS * (len(REQUESTS) - 1)
    assert_nothing_left(other)
    expected = {name: what_was_said(events) for name, events in undisturbed.items()}
    assert {name: what_was_said(events) for name, events in found.items()} == expected


@pytest.mark.parametrize("name", ["activated", "never activated"])
def test_the_contents_of_the_named_adapters_are_enough_to_go_on(engines, undisturbed, name):
    """A front does not know whether an activated adapter acts on a prompt."""
    _, target = engines
    (request,) = (each for each in REQUESTS if each.request_id == name)
    answer = tokens_of(undisturbed[name])
    late = next(state for state in target.adapter_states() if state.name == "late")
    for digest, is_right in ((late.digest, True), ("other", False)):
        snapshot = SequenceSnapshot(
            request=request, output_token_ids=tuple(answer[:9]), adapter_digests=(digest,)
        )
        if not is_right:
            with pytest.raises(InvalidRequest, match="other contents"):
                target.adopt(snapshot)
            continue
        target.adopt(snapshot)
        events = []
        while target.has_work:
            events += target.step()
        assert tokens_of(events) == answer[9:]
    assert_nothing_left(target)
