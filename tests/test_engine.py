"""The engine whole: mixed batches, chunking, preemption, eviction, sampling, refusals."""

from __future__ import annotations

import pytest
import torch

from adapter_factory import write_adapter
from device_under_test import DEVICE
from engine_factory import (
    GREEDY,
    make_engine,
    make_request,
    mixed_requests,
    prompt_of,
    run,
    run_alone,
    run_tokens,
    save_swarm,
    tokens_of,
)
from loraswarm.core.request import SamplingParams
from loraswarm.engine import loader_worker
from loraswarm.errors import AdapterError, ConfigError, InvalidRequest, UnknownAdapter
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from tolerance import assert_close

NAMES = [f"a{i:03}" for i in range(8)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 8)
    return path


@pytest.fixture(scope="module")
def engine(swarm):
    return make_engine(swarm)


def test_a_mixed_batch_of_eight_adapters_and_base_equals_each_request_alone(engine):
    requests = mixed_requests([None, *NAMES, None, NAMES[3]])
    together = run_tokens(engine, requests)
    assert together == run_alone(engine, requests)
    assert all(len(tokens) == GREEDY.max_tokens for tokens in together.values())


def test_adapters_change_the_answer_and_each_differently(engine):
    prompt = prompt_of(5, 33)
    requests = [make_request(f"r{i}", name, prompt) for i, name in enumerate([None, *NAMES])]
    answers = {tuple(tokens) for tokens in run_tokens(engine, requests).values()}
    assert len(answers) == len(requests)


def test_base_rows_of_a_mixed_batch_have_the_logprobs_of_base_alone(engine):
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    base = make_request("base", None, prompt_of(1, 21), params)
    others = [make_request(n, n, prompt_of(i, 19), params) for i, n in enumerate(NAMES)]
    mixed = run(engine, [base, *others])["base"]
    alone = run(engine, [base])["base"]
    assert tokens_of(mixed) == tokens_of(alone)
    for one, other in zip(mixed, alone, strict=True):
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-4)


@pytest.mark.parametrize("max_step_tokens", [4, 7, 16])
def test_chunked_prefill_equals_whole_prefill(swarm, engine, max_step_tokens):
    requests = mixed_requests([None, *NAMES[:4]])
    chunked = make_engine(swarm, max_step_tokens=max_step_tokens, max_num_sequences=4)
    assert run_tokens(chunked, requests) == run_tokens(engine, requests)


def test_preempted_at_any_step_equals_undisturbed(swarm, engine):
    params = SamplingParams(max_tokens=14, temperature=0.9, seed=5, ignore_eos=True)
    requests = mixed_requests([NAMES[2], None, NAMES[5]], params)
    expected = run_tokens(engine, requests)
    disturbed = make_engine(swarm, max_step_tokens=16, max_num_sequences=4)
    scheduler = disturbed._scheduler
    num_steps = 0

    def preempt_all_at(chosen):
        def before_step(now):
            nonlocal num_steps
            num_steps = max(num_steps, now)
            if now == chosen:
                for sequence in list(scheduler._running):
                    scheduler._preempt(sequence)

        return before_step

    run(disturbed, requests)  # so that no later run waits for an adapter
    run(disturbed, requests, before_step=preempt_all_at(None))
    assert num_steps >= 13
    for step in range(1, num_steps + 1):
        before = scheduler.num_preemptions
        events = run(disturbed, requests, before_step=preempt_all_at(step))
        assert scheduler.num_preemptions > before
        assert {name: tokens_of(found) for name, found in events.items()} == expected, step


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what the kernels of the CPU compile")
def test_after_warm_up_serving_compiles_nothing(swarm, engine):
    from loraswarm.kernels.cpu.team import begin, clear, publish, work
    from loraswarm.kernels.cpu.tiles import check_vectors, count_items

    kernels = (work, begin, clear, publish, check_vectors, count_items)
    compiled = [list(kernel.signatures) for kernel in kernels]
    assert all(compiled)
    fresh = make_engine(swarm, max_step_tokens=40, max_num_sequences=8)
    run_tokens(fresh, mixed_requests([None, *NAMES]))
    assert [kernel.signatures for kernel in kernels] == compiled


def test_answers_stay_the_same_when_the_pool_is_too_small_for_all(swarm, engine):
    params = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True)
    requests = mixed_requests([None, *NAMES[:3], None, None, *NAMES[:3]], params)
    small = make_engine(swarm, pool_bytes=32 * engine.info.page_bytes)
    assert run_tokens(small, requests) == run_tokens(engine, requests)
    assert small._scheduler.num_preemptions > 0
    assert small.stats().num_kv_pages == 0
    assert small.stats().num_pinned_adapters == 0


def test_a_hundred_adapters_with_room_for_five_answer_as_if_always_resident(tmp_path):
    save_swarm(tmp_path, 100, ranks=[8])
    names = [f"a{i:03}" for i in range(100)]
    requests = mixed_requests(names, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    roomy = make_engine(tmp_path, pool_bytes=64 << 20)
    expected = run_tokens(roomy, requests)
    assert roomy.stats().num_resident_adapters == 100
    one = roomy.stats().num_adapter_pages // 100
    small = make_engine(tmp_path, pool_bytes=(5 * one + 8) * roomy.info.page_bytes)
    most = 0
    for batch in (requests, requests[::-1]):
        found = {}
        for request in batch:
            small.add(request)
            found[request.request_id] = []
        while small.has_work:
            for event in small.step():
                found[event.request_id] += event.token_ids
            small.check()
            most = max(most, small.stats().num_resident_adapters)
        assert found == expected
    assert most == 5


def test_sampled_answer_depends_on_its_seed_and_not_on_the_batch(engine):
    def make(name, seed):
        params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=seed)
        return make_request(name, NAMES[1], prompt_of(2, 9), params)

    crowd = mixed_requests([None, *NAMES])
    alone = run_tokens(engine, [make("x", 11)])["x"]
    assert run_tokens(engine, [*crowd, make("x", 11)])["x"] == alone
    assert run_tokens(engine, [make("x", 12)])["x"] != alone


def test_without_a_seed_two_requests_differ(engine):
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    requests = [make_request(name, None, prompt_of(0, 5), params) for name in ("x", "y")]
    answers = run_tokens(engine, requests)
    assert answers["x"] != answers["y"]


def test_prompt_logprobs_equal_those_of_generated_tokens_and_ignore_chunking(swarm, engine):
    prompt = prompt_of(4, 23)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    first = run(engine, [make_request("x", NAMES[2], prompt, params)])["x"]
    generated = [event.logprobs[0] for event in first]
    longer = prompt + tuple(tokens_of(first))
    asked = SamplingParams(max_tokens=0, prompt_logprobs=2)
    for chosen in (engine, make_engine(swarm, max_step_tokens=5, max_num_sequences=4)):
        (event,) = run(chosen, [make_request("y", NAMES[2], longer, asked)])["y"]
        assert event.finish_reason == "length"
        assert event.token_ids == ()
        assert event.prompt_logprobs[0] is None
        assert len(event.prompt_logprobs) == len(longer)
        for one, other in zip(event.prompt_logprobs[-5:], generated, strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [t for t, _ in one.top] == [t for t, _ in other.top]


def test_stop_token_ends_the_answer_and_min_tokens_bars_it(engine):
    prompt = prompt_of(3, 7)
    tokens = run_tokens(engine, [make_request("x", None, prompt)])["x"]
    stop = tokens[4]
    cut = tokens.index(stop) + 1
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,))
    events = run(engine, [make_request("x", None, prompt, params)])["x"]
    assert tokens_of(events) == tokens[:cut]
    assert events[-1].finish_reason == "stop"
    assert events[-1].stop_token_id == stop
    params = SamplingParams(max_tokens=12, min_tokens=8, temperature=0, stop_token_ids=(stop,))
    assert len(run_tokens(engine, [make_request("x", None, prompt, params)])["x"]) >= 8


def test_greedy_tokens_and_logprobs_equal_peft(swarm, engine):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(swarm / "model", attn_implementation="eager")
    for name in (NAMES[0], NAMES[4], NAMES[6]):
        peft_model = PeftModel.from_pretrained(model, swarm / "adapters" / name).eval()
        prompt = prompt_of(7, 40)
        params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, prompt_logprobs=0)
        events = run(engine, [make_request("x", name, prompt, params)])["x"]
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(10):
                logits = peft_model(torch.tensor([tokens])).logits[0]
                if len(tokens) == len(prompt):
                    logprobs = logits.log_softmax(-1)
                tokens.append(int(logits[-1].argmax()))
        assert tokens_of(events) == tokens[len(prompt) :]
        found = torch.tensor([item.logprob for item in events[0].prompt_logprobs[1:]])
        expected = logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        assert_close(found, expected, torch.float32)
        model = peft_model.unload()


def test_abort_in_the_middle_frees_everything(engine):
    free = engine.stats().num_free_pages
    resident = engine.stats().num_adapter_pages
    for request in mixed_requests([None, *NAMES]):
        engine.add(request)
    engine.step()
    engine.step()
    assert engine.abort("r3").finish_reason == "abort"
    assert engine.abort("r3") is None
    assert len(engine.abort_all()) == 8
    assert not engine.has_work
    stats = engine.stats()
    assert stats.num_kv_pages == 0
    assert stats.num_pinned_adapters == 0
    assert stats.num_free_pages + stats.num_adapter_pages == free + resident


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter": "nobody"}, UnknownAdapter, "'nobody'; known: a000, a001"),
        ({"prompt": ()}, InvalidRequest, "prompt is empty"),
        ({"prompt": (5, 133)}, InvalidRequest, "token id 133; the vocabulary has 133"),
        ({"prompt": prompt_of(0, 300)}, InvalidRequest, r"300 tokens; this model allows 256"),
        (
            {"params": SamplingParams(max_tokens=250)},
            InvalidRequest,
            r"max_tokens is 250; this model allows 256",
        ),
        (
            {"params": SamplingParams(stop_token_ids=(999,))},
            InvalidRequest,
            "stop_token_ids has token id 999",
        ),
        (
            {"params": SamplingParams(logit_bias={999: 1.0})},
            InvalidRequest,
            "logit_bias has token id 999",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_next_one_works(
    engine, change, error, message
):
    fields = {"adapter": NAMES[0], "prompt": prompt_of(0, 7), "params": GREEDY} | change
    with pytest.raises(error, match=message):
        engine.add(make_request("bad", **fields))
    assert run_tokens(engine, [make_request("good", NAMES[0], prompt_of(0, 7))])["good"]


def test_a_request_that_can_never_fit_the_pool_is_refused_with_both_numbers(swarm):
    engine = make_engine(swarm, pool_bytes=1 << 20)
    capacity = engine._scheduler.max_sequence_tokens([])
    small = make_engine(swarm, pool_bytes=engine.info.page_bytes * 40)
    wide = "a007"
    room = small._scheduler.max_sequence_tokens([small._catalog.resolve(wide).info])
    assert room < capacity
    with pytest.raises(
        InvalidRequest, match=rf"the page pool holds {room:,} beside adapter 'a007'"
    ):
        small.add(make_request("x", wide, prompt_of(0, 200)))
    assert run_tokens(small, [make_request("y", None, prompt_of(0, 9))])["y"]


def test_an_adapter_that_breaks_after_the_scan_fails_its_own_request_only(tmp_path):
    save_swarm(tmp_path, 2)
    engine = make_engine(tmp_path)
    weights = tmp_path / "adapters" / "a001" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    events = run(engine, mixed_requests(["a000", "a001", None]))
    assert [events[f"r{i}"][-1].finish_reason for i in range(3)] == ["length", "error", "length"]
    error = events["r1"][-1].error
    assert error.http_status == AdapterError.http_status
    assert "a001" in error.message
    assert engine.stats().num_resident_adapters == 1


def test_an_unexpected_failure_to_read_an_adapter_ends_its_own_requests_only(
    tmp_path, caplog, monkeypatch
):
    save_swarm(tmp_path, 2)
    engine = make_engine(tmp_path)
    read = loader_worker.read_adapter

    def failing(info, base, dtype):
        if info.name == "a001":
            raise RuntimeError("linalg.svd did not converge")
        return read(info, base, dtype)

    monkeypatch.setattr(loader_worker, "read_adapter", failing)
    events = run(engine, mixed_requests(["a000", "a001", None]))
    assert events["r1"][-1].error.http_status == 500
    assert "adapter 'a001' failed: RuntimeError" in events["r1"][-1].error.message
    assert "did not converge" in caplog.text
    assert all(events[name][-1].finish_reason == "length" for name in ("r0", "r2"))
    assert engine.stats().num_resident_adapters == 1


def test_an_adapter_with_rows_longer_than_a_page_is_refused_when_asked_for(tmp_path):
    save_swarm(tmp_path, 1)
    shape = decoder_config(read_config(tmp_path / "model")).shape()
    rank = make_engine(tmp_path)._runner._buffer.geometry.page_elements + 1
    prefix = "base_model.model.model.embed_tokens"
    write_adapter(
        tmp_path / "adapters" / "wide",
        {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "target_modules": ["embed_tokens"]},
        {
            f"{prefix}.lora_embedding_A": torch.ones(rank, shape.vocab_size),
            f"{prefix}.lora_embedding_B": torch.ones(shape.hidden_size, rank),
        },
    )
    engine = make_engine(tmp_path)
    with pytest.raises(AdapterError, match=rf"'wide': rank {rank:,} .* a page of this base holds"):
        engine.add(make_request("x", "wide", prompt_of(0, 5)))
    assert run_tokens(engine, [make_request("y", "a000", prompt_of(0, 5))])["y"]


def test_refused_adapter_says_why_when_asked_for(tmp_path):
    save_swarm(tmp_path, 1)
    (tmp_path / "adapters" / "broken").mkdir()
    engine = make_engine(tmp_path)
    with pytest.raises(AdapterError, match=r"broken.*adapter_config.json"):
        engine.add(make_request("x", "broken", prompt_of(0, 3)))
    (refused,) = [row for row in engine.adapters() if row.refusal]
    assert refused.name == "broken"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1000}, "max_model_len is 1,000; this model was made for 256"),
        ({"max_model_len": 256, "pool_bytes": 50_000}, r"holds \d+ tokens"),
        ({"pool_bytes": 10}, "one page of this model takes"),
        ({"max_step_tokens": 3}, "max_step_tokens is 3 but max_num_sequences"),
        ({"adapters": ("/nonexistent/dir",)}, "/nonexistent/dir"),
        ({"model": "/nonexistent/model"}, "no such directory"),
    ],
)
def test_options_that_cannot_work_are_refused_before_start(swarm, options, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(swarm, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_engines_serve_a_mixed_batch(swarm, dtype):
    engine = make_engine(swarm, dtype=dtype)
    prompt = prompt_of(5, 33)
    requests = [make_request(f"r{i}", name, prompt) for i, name in enumerate([None, *NAMES])]
    answers = run_tokens(engine, requests)
    assert len({tuple(tokens) for tokens in answers.values()}) > 4


def test_parameters_that_leave_no_token_end_their_own_request_with_a_reason(engine):
    params = SamplingParams(
        max_tokens=5, min_tokens=2, stop_token_ids=tuple(range(engine.info.vocab_size))
    )
    bad = make_request("bad", None, prompt_of(0, 5), params)
    events = run(engine, [bad, make_request("good", NAMES[1], prompt_of(1, 5))])
    assert events["bad"][-1].error.http_status == 400
    assert "leave no token" in events["bad"][-1].error.message
    assert events["good"][-1].finish_reason == "length"


def test_a_request_id_in_use_is_refused(engine):
    engine.add(make_request("x", None, prompt_of(0, 5)))
    with pytest.raises(InvalidRequest, match="'x' is already in use"):
        engine.add(make_request("x", NAMES[0], prompt_of(0, 5)))
    assert len(engine.abort_all()) == 1


def test_end_tokens_outside_the_vocabulary_are_reported_and_do_no_harm(tmp_path):
    save_swarm(tmp_path, 1)
    config = tmp_path / "model" / "generation_config.json"
    config.write_text('{"eos_token_id": [2, 99999]}')
    lines = []
    engine = make_engine(tmp_path, report=lines.append)
    assert engine.info.end_token_ids == (2,)
    assert any("99999" in line for line in lines)
    params = SamplingParams(max_tokens=4, min_tokens=2, temperature=0)
    assert len(run_tokens(engine, [make_request("x", None, prompt_of(0, 5), params)])["x"]) >= 2


def test_a_prompt_that_fills_the_pool_can_be_scored(swarm, engine):
    small = make_engine(swarm, pool_bytes=7 * engine.info.page_bytes)
    room = small._scheduler.max_sequence_tokens([])
    assert room == small.info.max_model_len
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (event,) = run(small, [make_request("x", None, prompt_of(0, room), params)])["x"]
    assert len(event.prompt_logprobs) == room
