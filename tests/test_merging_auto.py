"""`--merge auto`: what a policy wants is carried out, and answers stay what they are."""

from __future__ import annotations

import random
import shutil

import pytest

from engine_factory import make_engine, make_request, prompt_of, run_tokens
from loraswarm.core.request import SamplingParams
from loraswarm.engine.policies.merging import NAMES, MergeDecision
from loraswarm.errors import ConfigError
from merging_cases import merged_names, names, save_weak_swarm, weights_digest

NUM_ADAPTERS = 4
NUM_LINEARS = 8


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_weak_swarm(path, NUM_ADAPTERS)
    return path


def traffic():
    """Long runs of one adapter, then a mix with the base."""
    chance = random.Random(3)
    wanted = ["a001"] * 12 + [chance.choice([None, *names(NUM_ADAPTERS)]) for _ in range(18)]
    return [
        make_request(
            f"r{index}",
            name,
            prompt_of(index, chance.randrange(3, 30)),
            SamplingParams(max_tokens=chance.randrange(2, 30), temperature=0.0, ignore_eos=True),
        )
        for index, name in enumerate(wanted)
    ]


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_serves_what_an_engine_without_merging_does(swarm, policy):
    engine = make_engine(swarm, merge="auto", merge_policy=policy, max_num_sequences=4)
    before = weights_digest(engine)
    answers = run_tokens(engine, traffic())
    assert answers == run_tokens(make_engine(swarm, max_num_sequences=4), traffic())
    assert weights_digest(engine) == before
    assert (engine.merger.num_switches == 0) == (policy == "never") or policy == "cost"


class Scripted:
    """Wants the first request's adapter, and lets nobody else run."""

    def __init__(self):
        self.views, self.seen = [], []

    def decide(self, view):
        self.views.append(view)
        first = view.requests[0]
        target = first.adapter if first.adapter in view.mergeable else None
        return MergeDecision(target, frozenset({first.request_id}))

    def saw_step(self, seen):
        self.seen.append(seen)


def test_a_policy_sees_requests_and_steps_and_says_who_runs(swarm):
    engine = make_engine(swarm, merge="auto", max_num_sequences=4)
    policy = engine._merge_control._policy = Scripted()
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for index, name in enumerate(["a001", None, "a002"]):
        engine.add(make_request(f"r{index}", name, prompt_of(index, 9), params))
    ended = []
    while engine.has_work:
        ended += [event.request_id for event in engine.step() if event.finish_reason]
    assert sorted(ended) == ["r0", "r1", "r2"]
    assert [one.request_id for one in policy.views[-1].requests] == ["r2"]
    assert policy.views[-1].requests[0].adapter[0] == "a002"
    hot = [seen for seen in policy.seen if seen.merged_share > 0.0 and seen.num_hot_tokens]
    assert hot
    assert all(
        seen.merged_bytes > 0 and seen.num_hot_tokens <= seen.work.num_tokens for seen in hot
    )
    assert sum(seen.work.num_tokens for seen in policy.seen) == 3 * (9 + 5)
    assert any(seen.switched_share > 0.0 and seen.switch_s > 0.0 for seen in policy.seen)
    assert {seen.work.num_adapters for seen in policy.seen} == {0, 1}


def test_a_policy_that_there_is_not_is_refused(swarm):
    with pytest.raises(ConfigError, match="merge policy is 'best'; it must be one of never"):
        make_engine(swarm, merge="auto", merge_policy="best")


def test_what_is_merged_at_start_lets_steps_run_ahead_until_it_is_replaced(swarm, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(swarm / "adapters" / "a000", store / "x")
    engine = make_engine(swarm, adapters=(str(store),), merge="x")
    ahead = engine._look_ahead
    ahead.is_on = True
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    answers = {}
    for generation in ("a000", "a001"):
        old = engine.merger.target
        if generation != "a000":
            shutil.rmtree(store / "x")
            shutil.copytree(swarm / "adapters" / generation, store / "x")
            engine.add(make_request("base", None, prompt_of(1, 9), params))
            for _ in range(4):
                engine.step()
            assert ahead.step is not None
            engine._upkeep.look_again()
            for _ in range(100):
                engine.step()
                if engine.merger.target not in (old, None):
                    break
                engine.wait(0.05)
            assert engine.merger.target not in (old, None)
            assert engine.has_work
            engine.abort_all()
        request = make_request("r", "x", prompt_of(1, 9), params)
        answers[generation] = run_tokens(engine, [request])
        while not engine.merger.is_settled:
            engine.merger.advance(0.0)
        before = ahead.num_ahead
        assert run_tokens(engine, [request])["r"] == answers[generation]["r"]
        assert ahead.num_ahead > before
        assert merged_names(engine) == ["x"] * NUM_LINEARS
    plain = make_engine(swarm)
    for generation, found in answers.items():
        request = make_request("r", generation, prompt_of(1, 9), params)
        assert found == run_tokens(plain, [request])


def test_nothing_runs_ahead_of_a_policy_that_may_switch(swarm):
    engine = make_engine(swarm, merge="auto")
    engine._look_ahead.is_on = True
    run_tokens(engine, traffic()[:3])
    assert engine._look_ahead.num_ahead == 0
