"""Several adapters in one request, and adapters that act from a token of the prompt on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from adapter_factory import peft_warnings_ignored, save_random_adapter
from engine_factory import GREEDY, make_engine, make_request, prompt_of, run_tokens, save_swarm
from fake_engine import FakeEngine
from general_form import save_peft
from loraswarm import LLM, InvalidRequest, UnknownAdapter
from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo, OverlayInfo
from loraswarm.core.request import Request
from loraswarm.engine.engine import Engine
from loraswarm.engine.mixing import first_adapted, resolve_mix
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from model_factory import save_tiny_model
from served_logits import SCORED, served_logits
from server_harness import RunningServer, openai_client, running_server
from tiny_tokenizers import byte_level
from tolerance import TOLERANCE, assert_close

MIXES = {
    "two": (("a000", 0.7), ("a003", 0.4)),
    "three, one against the others": (("a001", 1.0), ("a002", -0.5), ("a005", 2.0)),
    "one, weakened": (("a004", 0.25),),
}


def info_of(name: str = "a", **fields: object) -> AdapterInfo:
    defaults = {
        "path": Path("nowhere"),
        "digest": "0",
        "method": "lora",
        "modules": (ModuleInfo(0, 4, 1.0),),
        "num_bytes": 0,
    }
    return AdapterInfo(name=name, **(defaults | fields))


def mixed(request_id: str, adapters: tuple[tuple[str, float], ...], length: int = 19) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_of(3, length),
        params=SCORED,
        adapters=adapters,
    )


@pytest.fixture(scope="module")
def swarm(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 6, has_tokenizer=True)
    return path


@pytest.fixture(scope="module")
def engine(swarm):
    return make_engine(swarm)


def peft_sum(path: Path, mix: tuple[tuple[str, float], ...], tokens: list[int]) -> torch.Tensor:
    """Logits [tokens - 1, V] of PEFT's weighted sum of adapters under `path`."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(path / "model", attn_implementation="eager")
    with peft_warnings_ignored():
        adapted = PeftModel.from_pretrained(model, path / "adapters" / mix[0][0], mix[0][0])
        for other, _ in mix[1:]:
            adapted.load_adapter(path / "adapters" / other, other)
        names, weights = zip(*mix, strict=True)
        adapted.add_weighted_adapter(list(names), list(weights), "sum", combination_type="cat")
        adapted.set_adapter("sum")
    with torch.inference_mode():
        return adapted.eval()(torch.tensor([tokens[:-1]])).logits[0]


def check_sum(path: Path, engine: Engine, mix: tuple[tuple[str, float], ...]) -> None:
    requests = [
        mixed("mix", mix),
        make_request("base", None, prompt_of(1, 7), SCORED),
        make_request("alone", mix[0][0], prompt_of(3, 19), SCORED),
    ]
    found = served_logits(engine, requests)
    tokens, logits = found["mix"]
    assert_close(logits, peft_sum(path, mix, tokens), torch.float32)
    relative, absolute = TOLERANCE[torch.float32]
    alone = found["alone"][1][:18]
    assert not torch.allclose(logits[:18], alone, rtol=10 * relative, atol=10 * absolute)


@pytest.mark.parametrize("name", MIXES)
def test_a_weighted_sum_equals_peft_with_combination_type_cat(swarm, engine, name):
    check_sum(swarm, engine, MIXES[name])


def test_updates_of_the_embedding_and_the_lm_head_can_be_summed(tmp_path):
    save_tiny_model(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    targets = ["embed_tokens", "lm_head", "v_proj"]
    for name, rank, chosen in (("x", 18, targets), ("y", 5, targets[:1]), ("z", 3, targets[1:])):
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=9, target_modules=chosen)
        save_peft(model, tmp_path / "adapters" / name, config, seed=rank)
    engine = make_engine(tmp_path)
    check_sum(tmp_path, engine, (("x", 0.7), ("y", -0.5)))
    check_sum(tmp_path, engine, (("y", 1.5), ("x", 0.3)))
    found = served_logits(engine, [mixed("xyz", (("z", 1.0), ("y", 1.0), ("x", 1.0)))])
    again = served_logits(engine, [mixed("xyz", (("x", 1.0), ("y", 1.0), ("z", 1.0)))])
    assert_close(found["xyz"][1], again["xyz"][1], torch.float32)


def test_a_sum_with_rslora_does_not_depend_on_order_and_equals_peft_where_it_comes_second(tmp_path):
    save_swarm(tmp_path, 1, ranks=(5,))
    shape = decoder_config(read_config(tmp_path / "model")).shape()
    stable = {"use_rslora": True}
    save_random_adapter(
        tmp_path / "adapters" / "rs", shape, rank=4, seed=9, std=0.2, config_overrides=stable
    )
    engine = make_engine(tmp_path)
    check_sum(tmp_path, engine, (("a000", 0.5), ("rs", 0.5)))
    orders = [(("a000", 0.5), ("rs", 0.5)), (("rs", 0.5), ("a000", 0.5))]
    one, other = (served_logits(engine, [mixed("x", order)])["x"][1] for order in orders)
    assert_close(one, other, torch.float32)


def test_one_adapter_of_weight_one_is_that_adapter(engine):
    found = served_logits(
        engine,
        [mixed("list", (("a002", 1.0),)), make_request("x", "a002", prompt_of(3, 19), SCORED)],
    )
    assert found["list"][0] == found["x"][0]


def test_a_weight_of_zero_is_the_base(engine):
    found = served_logits(
        engine, [mixed("zero", (("a002", 0.0),)), make_request("x", None, prompt_of(3, 19), SCORED)]
    )
    assert_close(found["zero"][1], found["x"][1], torch.float32)


def test_mixes_come_and_go_through_a_pool_with_room_for_one(swarm, engine):
    pages = [engine._memory.adapters.num_pages(i) for i in engine._catalog.served.values()]
    small = make_engine(swarm, pool_bytes=(sum(sorted(pages)[-3:]) + 6) * engine.info.page_bytes)
    requests = [mixed(f"{turn}{name}", MIXES[name]) for turn in range(2) for name in MIXES]
    roomy, tight = served_logits(engine, requests), served_logits(small, requests)
    assert {name: tokens for name, (tokens, _) in roomy.items()} == {
        name: tokens for name, (tokens, _) in tight.items()
    }
    assert small.stats().num_pinned_adapters == 0


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ((("a000", 1.0), ("nobody", 1.0)), UnknownAdapter, "'nobody'; known: a000"),
        ((("a000", 1.0), ("a000", 0.5)), InvalidRequest, "names 'a000' twice"),
        ((("a000", float("nan")),), InvalidRequest, "'a000' the weight nan"),
        ((("a000", 1e9),), InvalidRequest, "from -100 to 100"),
        ((("a000", "1"),), InvalidRequest, "'a000' the weight '1'"),
        ((("a000", 10**400),), InvalidRequest, "'a000' the weight 1000"),
        (((7, 1.0),), InvalidRequest, "name 7"),
        (tuple((f"a{i}", 1.0) for i in range(17)), InvalidRequest, "17 entries; at most 16"),
    ],
)
def test_a_list_that_cannot_be_combined_is_refused(engine, adapters, error, message):
    with pytest.raises(error, match=message):
        engine.add(mixed("x", adapters))
    assert not engine.has_work


def test_an_adapter_and_a_list_of_adapters_exclude_each_other():
    with pytest.raises(InvalidRequest, match="'a000' and a list"):
        Request(
            request_id="x",
            prompt_token_ids=(1,),
            params=GREEDY,
            adapter="a000",
            adapters=(("a001", 1.0),),
        )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"modules": (ModuleInfo(0, 4, 1.0, ("g",)),), "method": "dora"},
            "dora adapter also scales",
        ),
        ({"modules": (ModuleInfo(0, 0, 1.0, ("c",)),)}, "biases"),
        ({"overlays": (OverlayInfo(("model.norm",), 1, 8),)}, r"replaces weights \(model.norm\)"),
        ({"invocation_tokens": (3, 4)}, "activated"),
    ],
)
def test_an_adapter_that_is_more_than_an_update_is_served_alone_only(fields, reason):
    odd, plain = info_of("odd", **fields), info_of("plain")
    assert resolve_mix([odd], [1.0]) == ((odd.key, 1.0),)
    for infos, weights in (([odd], [0.5]), ([plain, odd], [1.0, 1.0])):
        with pytest.raises(InvalidRequest, match=rf"'odd' cannot be combined.*{reason}"):
            resolve_mix(infos, weights)


def test_vectors_of_tiles_can_be_combined():
    vera = info_of("v", modules=(ModuleInfo(0, 4, 1.0, ("u", "v")),))
    assert len(resolve_mix([vera, info_of("a")], [0.5, 0.5])) == 2


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ((1, 2, 3), 0),
        ((9, 1, 2, 3, 9, 1, 2, 3, 8), 5),
        ((1, 2, 1, 2, 3), 2),
        ((1, 2), None),
        ((1, 3, 2), None),
        ((), None),
    ],
)
def test_activation_is_at_the_start_of_the_last_match(prompt, start):
    assert first_adapted([info_of(invocation_tokens=(1, 2, 3))], prompt) == start
    assert first_adapted([info_of()], prompt) == 0
    assert first_adapted([], prompt) == 0


def test_offline_adapters_may_be_maps_of_weights(swarm):
    llm = LLM(str(swarm / "model"), str(swarm / "adapters"), pool_bytes=8 << 20, num_threads=2)
    mix = {"a000": 0.7, "a003": 0.4}
    outputs = llm.generate(["Hello", "Hello", "Hello"], GREEDY, adapter=[mix, None, "a000"])
    assert [output.adapter for output in outputs] == [mix, None, "a000"]
    assert len({output.token_ids for output in outputs}) == 3
    request = mixed("x", tuple(mix.items()))
    expected = run_tokens(
        make_engine(swarm),
        [
            Request(
                request_id="x",
                prompt_token_ids=tuple(llm.tokenizer.encode("Hello")),
                params=GREEDY,
                adapters=request.adapters,
            )
        ],
    )["x"]
    assert list(outputs[0].token_ids) == expected
    assert list(llm.stream("Hello", GREEDY, mix))[-1].finish_reason == "length"
    with pytest.raises(UnknownAdapter, match="'nobody'"):
        llm.generate("Hello", GREEDY, adapter={"nobody": 1.0})
    for pairs in ([("a000", 0.7), ("a003", np.float32(0.4))], (("a000", 0.7), ("a003", 0.4))):
        by_pairs = llm.generate(["Hello", "Hi"], GREEDY, adapter=pairs)
        assert by_pairs[0].token_ids == outputs[0].token_ids
        assert list(by_pairs[1].adapter) == ["a000", "a003"]
    each = llm.generate(["Hello", "Hello"], GREEDY, adapter=[[("a000", 0.7), ("a003", 0.4)], None])
    assert [output.token_ids for output in each] == [output.token_ids for output in outputs[:2]]
    huge, array = {"a000": 10**400}, np.array(["a000", "a003"])
    for nonsense in (
        7,
        {},
        [],
        huge,
        array,
        {"a000"},
        ["a000", 7],
        ("a000", 0.5),
        [["a000", 0.5]],
        [True],
    ):
        with pytest.raises(InvalidRequest, match="adapter"):
            llm.generate(["Hello", "Hi"], GREEDY, adapter=nonsense)
    for nonsense in (7, {}, ["a000"], ("a000", 0.5), Path("a000")):
        with pytest.raises(InvalidRequest, match="give a name, a map"):
            next(llm.stream("Hello", GREEDY, nonsense))
    assert not llm._engine.has_work


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(byte_level())) as running:
        yield running


def test_the_field_adapters_reaches_the_engine_from_both_endpoints(server):
    extra = {"adapters": [{"name": "sql", "weight": 0.5}, {"name": "team/router"}]}
    expected = (("sql", 0.5), ("team/router", 1.0))
    with openai_client(server.base_url) as client:
        client.completions.create(model="tiny", prompt="x", extra_body=extra)
        assert server.engine.requests[-1].adapters == expected
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], extra_body=extra
        )
        assert server.engine.requests[-1].adapters == expected
    server.complete(adapters=[])
    assert server.engine.requests[-1].adapters == ()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"adapters": [{"name": "nobody"}]}, 404, "'nobody'"),
        ({"adapters": [{"name": "broken"}]}, 422, "3 dimensions"),
        ({"adapters": [{"name": "tiny"}]}, 400, "'tiny', the base model"),
        ({"model": "sql", "adapters": [{"name": "team/router"}]}, 400, "an adapter itself"),
        ({"adapters": [{"name": "sql"}, {"name": "sql"}]}, 400, "twice"),
        ({"adapters": [{"name": "sql", "weight": 1e6}]}, 400, "the weight 1000000.0"),
        ({"adapters": [{"name": "sql", "weight": "1"}]}, 400, "adapters[0].weight"),
        ({"adapters": [{"name": "sql", "scale": 1}]}, 400, "unknown field 'adapters[0].scale'"),
        ({"adapters": ["sql"]}, 400, "adapters[0]"),
        ({"adapters": "sql"}, 400, "adapters is 'sql'"),
    ],
)
def test_a_wrong_list_of_adapters_is_an_error_that_says_why(server, body, status, message):
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "x", **body})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
