"""Answers with cached prefixes are those without, for whatever computes the tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from adapter_factory import save_random_adapter
from engine_factory import make_engine, make_request, prompt_of, run, run_tokens, tokens_of
from loraswarm.core.admin import RescanAdapters
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from method_cases import INVOCATION, METHOD_CASES
from model_factory import load_reference, save_tiny_model
from served_logits import SCORED, served_logits
from tolerance import assert_close

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
EXPLAINED = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=3)
METHODS = ("dora", "vera", "alora", "trained-tokens", "saved-norms", "saved-embeddings", "ia3")
LENGTH = 101

Choice = tuple[tuple[str, float], ...]
SUM: Choice = (("a000", 0.75), ("a001", 0.5))


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefixes")
    save_tiny_model(path / "model")
    for index, rank in enumerate((8, 24, 8)):
        save_lora(path, f"a{index:03}", index, rank)
    model = load_reference(path / "model", torch.float32)
    for method in METHODS:
        METHOD_CASES[method](model, path / "adapters" / method)
    return path


@pytest.fixture(scope="module")
def plain(swarm):
    """Without cached prefixes."""
    engine = make_engine(swarm)
    yield engine
    engine.close()


@pytest.fixture
def engine(swarm):
    engine = make_engine(swarm, prefix_caching=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def page(plain):
    return plain.info.page_tokens


def save_lora(path: Path, name: str, seed: int, rank: int = 8) -> None:
    shape = decoder_config(read_config(path / "model")).shape()
    save_random_adapter(path / "adapters" / name, shape, rank=rank, alpha=32, seed=seed, std=0.2)


def one(name: str | None) -> Choice:
    return () if name is None else ((name, 1.0),)


def ask(
    choice: Choice,
    prompt: tuple[int, ...],
    request_id: str = "x",
    params: SamplingParams = GREEDY,
) -> Request:
    if len(choice) == 1 and choice[0][1] == 1.0:
        return make_request(request_id, choice[0][0], prompt, params)
    return Request(request_id=request_id, prompt_token_ids=prompt, params=params, adapters=choice)


def serve(
    engine: Engine, choice: Choice, prompt: tuple[int, ...], params: SamplingParams = GREEDY
) -> tuple[list[int], int | None]:
    """Tokens of the answer, and how many of the prompt were cached."""
    events = run(engine, [ask(choice, prompt, "x", params)])["x"]
    assert events[-1].finish_reason == "length"
    return tokens_of(events), cached(events)


def cached(events: list[SequenceEvent]) -> int | None:
    """Cached tokens of the prompt; they come with the first event alone."""
    assert all(event.num_cached_tokens is None for event in events[1:])
    return events[0].num_cached_tokens


def with_invocation(prompt: tuple[int, ...], place: int) -> tuple[int, ...]:
    return (*prompt[:place], *INVOCATION, *prompt[place + len(INVOCATION) :])


CHOICES = {
    "base": (),
    "lora": one("a000"),
    "weighted": (("a001", 0.5),),
    "sum": SUM,
    **{method: one(method) for method in METHODS},
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_answers_from_cached_prefixes_are_those_without(plain, engine, page, choice):
    prompt = with_invocation(prompt_of(2, LENGTH), 7)
    tokens, uncached = serve(plain, choice, prompt)
    assert uncached == 0
    assert serve(engine, choice, prompt) == (tokens, 0)
    assert serve(engine, choice, prompt) == (tokens, LENGTH // page * page)
    if choice:
        assert tokens != serve(plain, (), prompt)[0]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_logprobs_after_cached_prefixes_are_those_without(plain, engine, choice):
    prompt = with_invocation(prompt_of(4, LENGTH), 40)
    rows = []
    for chosen in (plain, engine, engine):
        events = run(chosen, [ask(choice, prompt, "x", EXPLAINED)])["x"]
        rows.append([value for e in events for row in e.logprobs for _, value in row.top])
    assert cached(events) > 0
    expected, *others = map(torch.tensor, rows)
    for other in others:
        assert_close(other, expected, torch.float32)


def test_different_computations_of_one_prompt_share_nothing(engine, plain):
    prompt = prompt_of(1, LENGTH)
    choices = [
        *map(one, (None, "a000", "a001", "a002", "dora")),
        SUM,
        (("a000", 0.5),),
        (("a000", 0.5), ("a001", 0.75)),
    ]
    for choice in choices:
        assert serve(engine, choice, prompt) == (serve(plain, choice, prompt)[0], 0)
    for choice in choices:
        assert serve(engine, choice, prompt)[1] > 0
    stats = engine.stats()
    assert stats.total_prefix_asked_tokens == 2 * len(choices) * LENGTH
    assert 0 < stats.total_prefix_hit_tokens < len(choices) * LENGTH


@pytest.mark.parametrize("pages_before", [0, 1, 2])
@pytest.mark.parametrize("offset", [0, 1, 15])
def test_an_activated_adapter_shares_the_bases_pages_before_its_invocation(
    engine, plain, page, pages_before, offset
):
    place = pages_before * page + offset
    prompt = with_invocation(prompt_of(6, LENGTH), place)
    expected, _ = serve(plain, one("alora"), prompt)
    serve(engine, (), prompt)
    assert serve(engine, one("alora"), prompt) == (expected, pages_before * page)
    assert serve(engine, one("alora"), prompt) == (expected, LENGTH // page * page)
    assert expected != serve(plain, (), prompt)[0]


def test_an_invocation_across_a_page_boundary_does_not_share_a_page_adapted_from_earlier(
    engine, plain, page
):
    prompt = list(with_invocation(prompt_of(6, LENGTH), 5))
    prompt[page - 1 : page + 1] = INVOCATION
    across = tuple(prompt)
    prompt[page] += 1
    earlier = tuple(prompt)
    expected = serve(plain, one("alora"), across)[0]
    assert serve(engine, one("alora"), earlier) == (serve(plain, one("alora"), earlier)[0], 0)
    assert serve(engine, one("alora"), across) == (expected, 0)


def test_the_base_shares_what_an_activated_adapter_computed_before_its_invocation(
    engine, plain, page
):
    prompt = with_invocation(prompt_of(6, LENGTH), 2 * page + 3)
    serve(engine, one("alora"), prompt)
    assert serve(engine, (), prompt) == (serve(plain, (), prompt)[0], 2 * page)
    later = with_invocation(prompt, 90)
    assert serve(engine, one("alora"), later) == (serve(plain, one("alora"), later)[0], 2 * page)


def test_a_new_generation_never_meets_the_old_ones_prefixes(tmp_path, page):
    save_tiny_model(tmp_path / "model")
    save_lora(tmp_path, "a", seed=1)
    prompt = prompt_of(3, LENGTH)
    engine = make_engine(tmp_path, prefix_caching=True)
    old, _ = serve(engine, one("a"), prompt)
    assert serve(engine, one("a"), prompt)[1] > 0
    long = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    undisturbed, _ = serve(make_engine(tmp_path), one("a"), prompt, long)
    engine.add(ask(one("a"), prompt, "running", long))
    events = [event for _ in range(3) for event in engine.step()]
    save_lora(tmp_path, "a", seed=2)
    events += rescan(engine)
    new, _ = serve(make_engine(tmp_path), one("a"), prompt)
    assert new != old
    engine.add(ask(one("a"), prompt, "beside"))
    while engine.has_work:
        events += engine.step()
        engine.check()
    running, beside = (
        [event for event in events if event.request_id == name] for name in ("running", "beside")
    )
    assert (tokens_of(running), cached(running)) == (undisturbed, LENGTH // page * page)
    assert (tokens_of(beside), cached(beside)) == (new, 0)
    assert serve(engine, one("a"), prompt) == (new, LENGTH // page * page)
    save_lora(tmp_path, "a", seed=1)
    rescan(engine)
    assert serve(engine, one("a"), prompt) == (old, 0)
    assert engine._catalog.resolve("a").generation == 3


def rescan(engine: Engine) -> list[SequenceEvent]:
    """Look at the stores, while requests go on; what happens to them."""
    events = []
    engine.begin_command(0, RescanAdapters())
    while not (answers := engine.take_answers()):
        events += engine.step(may_wait=False)
        engine.check()
    assert answers[0].result.changed == ("a",)
    return events


def test_requests_for_logprobs_of_the_prompt_reuse_nothing_and_are_right(plain, engine):
    prompt = prompt_of(5, LENGTH)
    for choice in ((), one("a001")):
        tokens, _ = serve(engine, choice, prompt)
        request = ask(choice, prompt, "x", SCORED)
        _, expected = served_logits(plain, [request])["x"]
        found, logits = served_logits(engine, [request])["x"]
        assert_close(logits, expected, torch.float32)
        assert found[LENGTH:] == tokens[: SCORED.max_tokens]
        (event, *_) = run(engine, [request])["x"]
        assert event.num_cached_tokens == 0
        assert len(event.prompt_logprobs) == LENGTH


@pytest.mark.parametrize("choice", [(), one("a001"), SUM], ids=["base", "lora", "sum"])
def test_the_next_turn_reuses_generated_tokens_too(plain, engine, page, choice):
    params = SamplingParams(max_tokens=45, temperature=0.0, ignore_eos=True)
    prompt = prompt_of(7, 40)
    for turn in range(3):
        tokens, num_cached = serve(engine, choice, prompt, params)
        assert tokens == serve(plain, choice, prompt, params)[0]
        # All but this turn's question, and the last token before it, which was never computed.
        known = 0 if turn == 0 else len(prompt) - 3 - 1
        assert num_cached == known // page * page
        prompt = (*prompt, *tokens, *prompt_of(turn, 3))
    assert num_cached > 40 + 45


@pytest.mark.parametrize("choice", [(), one("a000")], ids=["base", "lora"])
def test_a_preempted_request_takes_up_its_own_pages(plain, engine, page, choice):
    expected, _ = serve(plain, choice, prompt_of(8, LENGTH))
    engine.add(ask(choice, prompt_of(8, LENGTH)))
    events = []
    while len(events) < 4:
        events += engine.step()
    before = engine.stats().total_prefix_hit_tokens
    engine._scheduler._preempt(engine._scheduler._running[0])
    engine.check()
    while engine.has_work:
        events += engine.step()
        engine.check()
    assert tokens_of(events) == expected
    assert engine.stats().total_preemptions == 1
    assert engine.stats().total_prefix_hit_tokens - before == LENGTH // page * page
    assert cached(events) == 0


@pytest.mark.parametrize("length", [32, 64, 96])
def test_a_prompt_that_is_cached_to_its_end_still_computes_its_last_token(
    plain, engine, page, length
):
    assert length % page == 0
    prompt = prompt_of(9, length)
    expected, _ = serve(plain, one("a002"), prompt)
    for num_cached in (0, length - page, length - page):
        assert serve(engine, one("a002"), prompt) == (expected, num_cached)
    longer = prompt + prompt_of(1, 1)
    assert serve(engine, one("a002"), longer)[1] == length


@pytest.mark.parametrize("eviction", ["cost", "lru"])
@pytest.mark.parametrize("num_pages", [38, 60])
def test_a_random_mix_under_pressure_is_answered_as_without_cached_prefixes(
    swarm, plain, page, eviction, num_pages
):
    rng = random.Random(num_pages)
    engine = make_engine(
        swarm,
        prefix_caching=True,
        eviction=eviction,
        pool_bytes=num_pages * plain.info.page_bytes,
        max_num_sequences=6,
        max_step_tokens=48,
        max_model_len=160,
    )
    choices = [
        choice
        for choice in CHOICES.values()
        if sum(
            plain._memory.adapters.num_pages(plain._catalog.resolve(name).info)
            for name, _ in choice
        )
        <= num_pages - 6
    ]
    assert len(choices) > 5
    requests = []
    for number in range(45):
        prompt = prompt_of(rng.randrange(3), rng.choice([31, 33, 70, 97, 133]))
        if rng.random() < 0.4:
            prompt = with_invocation(prompt, rng.randrange(len(prompt) - 2))
        choice = rng.choice(choices) if rng.random() < 0.8 else ()
        requests.append(ask(choice, prompt, f"r{number}"))
    found = run_tokens(engine, requests)
    for request in requests:
        assert found[request.request_id] == run_tokens(plain, [request])[request.request_id]
    for _ in range(2):  # under this pressure all hits of the mix may fail, as loads happen to end
        assert run_tokens(engine, requests[:1]) == run_tokens(plain, requests[:1])
    stats = engine.stats()
    assert stats.total_prefix_hit_tokens > 0
    assert stats.total_prefix_evictions > 0
    assert stats.total_device_evictions > 0
    assert stats.num_kv_pages == stats.num_pinned_adapters == 0


def test_requests_that_run_together_use_the_prefix_of_one_that_runs(plain, engine, page):
    prompt = prompt_of(10, LENGTH)
    expected, _ = serve(plain, one("a000"), prompt)
    long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    engine.add(ask(one("a000"), prompt, "first", long))
    while not engine.stats().num_prefix_pages + engine.stats().num_kv_pages:
        engine.step()
    engine.step()
    engine.add(ask(one("a000"), prompt, "second"))
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check()
    second = [event for event in events if event.request_id == "second"]
    assert tokens_of(second) == expected
    assert cached(second) == LENGTH // page * page
    assert sum(len(event.token_ids) for event in events) > 60
