"""The offline API: order, adapters, streams, errors."""

from __future__ import annotations

import pytest

from engine_factory import save_swarm
from loraswarm import LLM, ConfigError, InvalidRequest, SamplingParams, UnknownAdapter

GREEDY = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
PROMPTS = ["The quick brown fox", "Hello", "SELECT name, age", "Grüße aus"]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 3, has_tokenizer=True)
    return path


@pytest.fixture(scope="module")
def llm(swarm):
    return LLM(
        str(swarm / "model"), adapters=str(swarm / "adapters"), pool_bytes=8 << 20, num_threads=2
    )


def test_outputs_are_in_the_order_of_prompts_with_their_own_adapters(llm):
    adapters = ["a002", None, "a000", "a002"]
    outputs = llm.generate(PROMPTS, GREEDY, adapter=adapters)
    assert [output.adapter for output in outputs] == adapters
    for prompt, adapter, output in zip(PROMPTS, adapters, outputs, strict=True):
        (alone,) = llm.generate(prompt, GREEDY, adapter=adapter)
        assert output.text == alone.text
        assert output.token_ids == alone.token_ids
        assert output.finish_reason == "length"
        assert output.prompt_token_ids == tuple(llm.tokenizer.encode(prompt))
    (base,) = llm.generate(PROMPTS[0], GREEDY)
    assert base.token_ids != outputs[0].token_ids


def test_many_prompts_report_each_tenth_where_there_is_no_terminal(llm, caplog):
    caplog.set_level("INFO", "loraswarm.llm")
    llm.generate(["Hello"] * 20, SamplingParams(max_tokens=1, temperature=0))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"prompts done={2 * i} of=20" for i in range(1, 11)]
    caplog.clear()
    llm.generate(["Hello"] * 20, SamplingParams(max_tokens=1), use_progress_bar=False)
    assert not caplog.records


def test_token_ids_and_the_base_models_own_name_are_accepted(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    (by_text,) = llm.generate([PROMPTS[0]], GREEDY)
    (by_ids,) = llm.generate(ids, GREEDY, adapter=llm.info.model)
    (by_list,) = llm.generate([ids], GREEDY)
    assert by_text.token_ids == by_ids.token_ids == by_list.token_ids


def test_streamed_pieces_join_to_the_whole_text(llm):
    (whole,) = llm.generate(PROMPTS[3], GREEDY, adapter="a001")
    deltas = list(llm.stream(PROMPTS[3], GREEDY, adapter="a001"))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].finish_reason == "length"


def test_streams_that_take_turns_and_a_call_between_them_each_get_their_own_answer(llm):
    expected = llm.generate(PROMPTS[:2], GREEDY, adapter=["a001", None])
    one = llm.stream(PROMPTS[0], GREEDY, adapter="a001")
    other = llm.stream(PROMPTS[1], GREEDY)
    texts = ["", ""]
    for turn in range(GREEDY.max_tokens):
        texts[0] += next(one).text
        texts[1] += next(other).text
        if turn == 3:
            assert llm.generate(PROMPTS[:2], GREEDY, adapter=["a001", None]) == expected
    assert texts == [output.text for output in expected]
    assert next(one, None) is None


def test_a_stream_that_is_left_early_frees_its_pages(llm):
    for _ in llm.stream(PROMPTS[0], GREEDY, adapter="a001"):
        break
    assert llm._engine.stats().num_kv_pages == 0
    assert not llm._engine.has_work


def test_a_stop_string_ends_its_own_prompt_only(llm):
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    stop = whole.text[3:5]
    params = [SamplingParams(max_tokens=9, temperature=0, stop=(stop,), ignore_eos=True), GREEDY]
    stopped, other = llm.generate([PROMPTS[0], PROMPTS[1]], params)
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert other.finish_reason == "length"
    assert llm._engine.stats().num_kv_pages == 0


def test_logprobs_are_parallel_to_tokens(llm):
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate(PROMPTS[0], params)
    assert [item.token_id for item in output.logprobs] == list(output.token_ids)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_chat_uses_the_models_template(llm):
    messages = [{"role": "user", "content": "Hello"}]
    (one,) = llm.chat(messages, GREEDY)
    rendered = llm.tokenizer.render_chat(messages)
    (other,) = llm.generate(llm.tokenizer.encode(rendered, add_special_tokens=False), GREEDY)
    assert one.token_ids == other.token_ids
    assert [o.token_ids for o in llm.chat([messages, messages], GREEDY)] == [one.token_ids] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": [[5.5]]}, InvalidRequest, "list of token ids"),
        ({"prompts": None}, InvalidRequest, "NoneType"),
        ({"adapter": "nobody"}, UnknownAdapter, "a000, a001, a002"),
        ({"adapter": ["a000"]}, InvalidRequest, "4 prompts but 1 of adapter"),
        ({"params": SamplingParams(max_tokens=999)}, InvalidRequest, "max_tokens is 999"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(llm, arguments, error, message):
    with pytest.raises(error, match=message):
        llm.generate(**({"prompts": PROMPTS} | arguments))
    assert not llm._engine.has_work
    assert llm.generate(PROMPTS[0], GREEDY)[0].text


def test_an_adapter_that_cannot_be_read_is_reported_in_its_output(tmp_path):
    save_swarm(tmp_path, 2, has_tokenizer=True)
    llm = LLM(str(tmp_path / "model"), str(tmp_path / "adapters"), pool_bytes=8 << 20)
    weights = tmp_path / "adapters" / "a001" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    good, bad = llm.generate(PROMPTS[:2], GREEDY, adapter=["a000", "a001"])
    assert good.finish_reason == "length"
    assert bad.finish_reason == "error"
    assert "a001" in bad.error


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ConfigError, match="'pool_size'"):
        LLM("model", pool_size=3)
