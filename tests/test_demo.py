"""The bundled swarm: adapters do their tasks through the server, the base does not, PEFT agrees."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_factory import WEIGHTS_FILE, load_peft_adapter, write_adapter
from loraswarm.demo import adapter_names, adapters_path, base_path, heldout
from served_process import served
from server_harness import async_openai_client
from tolerance import assert_close

NUM_COMPARED = 50
NUM_SCORED = 3
MAX_TOKENS = 96
NUM_AT_ONCE = 128
MAX_DATA_BYTES = 25 << 20
NAMES = adapter_names()


def message(prompt):
    return [{"role": "user", "content": prompt}]


async def answers(url, asks):
    """Texts and token ids for (model, prompt, max_tokens), in their order; as many are sent at
    once as run in a step."""
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    async with async_openai_client(url) as client:

        async def ask(model, prompt, max_tokens):
            async with at_once:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=message(prompt),
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body={"return_token_ids": True},
                )
            choice = answer.choices[0]
            return choice.message.content, choice.model_dump()["token_ids"]

        return await asyncio.gather(*(ask(*each) for each in asks))


async def prompt_logprobs(url, asks):
    """For each (model, prompt): logprobs of the prompt's tokens, all but the first's."""
    async with async_openai_client(url) as client:

        async def ask(model, prompt):
            answer = await client.chat.completions.create(
                model=model,
                messages=message(prompt),
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": 0},
            )
            found = answer.model_dump()["prompt_logprobs"][1:]
            return torch.tensor([each["logprob"] for token in found for each in token.values()])

        return await asyncio.gather(*(ask(model, prompt) for model, prompt in asks))


@pytest.fixture(scope="module")
def server():
    with served(
        str(base_path()),
        *("--adapters", str(adapters_path())),
        *("--served-model-name", "base"),
        *("--dtype", "float32"),
        *("--pool-bytes", "256MiB"),
    ) as process:
        yield process


@pytest.fixture(scope="module")
def replies(server, tokenizer):
    """What base and adapters say to every held-out prompt, sent interleaved.

    The base is cut off once it has said more than is right: it would go on to MAX_TOKENS.
    """
    sets = {name: heldout(name) for name in NAMES}
    columns = itertools.zip_longest(*sets.values())
    asks = []
    for column in columns:
        for name, example in zip(NAMES, column, strict=True):
            if example is not None:
                num_right = len(tokenizer(example.answer)["input_ids"])
                asks += [
                    (name, example.prompt, MAX_TOKENS),
                    ("base", example.prompt, num_right + 1),
                ]
    found = asyncio.run(answers(server.base_url, asks))
    return {(model, prompt): reply for (model, prompt, _), reply in zip(asks, found, strict=True)}


def configs():
    """Every adapter's config by its name."""
    return {
        name: json.loads((adapters_path() / name / "adapter_config.json").read_text())
        for name in NAMES
    }


def test_there_are_eight_adapters_of_different_ranks_and_targets():
    loras = [config for config in configs().values() if config["peft_type"] == "LORA"]
    assert len(NAMES) == 8
    assert len({config["r"] for config in loras}) >= 4
    assert min(config["r"] for config in loras) <= 4
    assert max(config["r"] for config in loras) >= 32
    assert len({str(config["target_modules"]) for config in loras}) >= 3
    assert any(config["use_rslora"] for config in loras)


def test_one_adapter_is_a_dora_and_one_a_vera_that_brings_its_matrices():
    dora = [name for name, config in configs().items() if config.get("use_dora")]
    vera = [name for name, config in configs().items() if config["peft_type"] == "VERA"]
    assert (dora, vera) == (["formal-reply"], ["tags"])
    assert configs()["tags"]["save_projection"]
    dora_keys = load_file(adapters_path() / "formal-reply" / WEIGHTS_FILE)
    assert any(key.endswith("lora_magnitude_vector") for key in dora_keys)
    vera_keys = load_file(adapters_path() / "tags" / WEIGHTS_FILE)
    assert {"base_model.vera_A", "base_model.vera_B"} < set(vera_keys)


def test_the_bundle_stays_small():
    files = [path for path in Path(base_path()).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_DATA_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_adapter_answers_its_held_out_set_and_the_base_does_not(replies, name):
    examples = heldout(name)
    assert len(examples) >= 100
    hits = sum(replies[name, example.prompt][0] == example.answer for example in examples)
    base_hits = sum(replies["base", example.prompt][0] == example.answer for example in examples)
    assert hits >= 0.9 * len(examples)
    assert base_hits <= 0.1 * len(examples)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32).eval()


@torch.inference_mode()
def computed_logprobs(model, tokenizer, prompt):
    """What `prompt_logprobs` asks a server for, by transformers and PEFT."""
    ids = tokenizer.apply_chat_template(
        message(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_served_tokens_equal_peft_token_for_token(replies, tokenizer, base, name):
    model = load_peft_adapter(base, adapters_path() / name)
    prompts = [example.prompt for example in heldout(name)[:NUM_COMPARED]]
    inputs = tokenizer.apply_chat_template(
        [message(prompt) for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    answers_ids = output[:, inputs["input_ids"].shape[1] :].tolist()
    for prompt, padded in zip(prompts, answers_ids, strict=True):
        expected = [token for token in padded if token != tokenizer.pad_token_id]
        assert replies[name, prompt][1] == expected


@pytest.mark.parametrize("name", NAMES)
def test_served_prompt_logprobs_equal_pefts_and_differ_from_the_bases(
    server, tokenizer, base, name
):
    prompts = [example.prompt for example in heldout(name)[:NUM_SCORED]]
    found = asyncio.run(prompt_logprobs(server.base_url, [(name, prompt) for prompt in prompts]))
    model = load_peft_adapter(base, adapters_path() / name)
    for prompt, served_T in zip(prompts, found, strict=True):
        assert_close(served_T, computed_logprobs(model, tokenizer, prompt), torch.float32)
        with pytest.raises(AssertionError):
            assert_close(served_T, computed_logprobs(base, tokenizer, prompt), torch.float32)


def test_the_doras_magnitudes_change_what_is_served(server, tokenizer, base, tmp_path):
    name, prompt = "formal-reply", heldout("formal-reply")[0].prompt
    tensors = load_file(adapters_path() / name / WEIGHTS_FILE)
    rest = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key}
    write_adapter(tmp_path / name, configs()[name] | {"use_dora": False}, rest)
    without = load_peft_adapter(base, tmp_path / name)
    served_T = asyncio.run(prompt_logprobs(server.base_url, [(name, prompt)]))[0]
    with pytest.raises(AssertionError):
        assert_close(served_T, computed_logprobs(without, tokenizer, prompt), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_training_settings_are_those_of_the_shipped_config(name):
    from loraswarm.demo.finetune import ADAPTERS, build_config

    built, shipped = build_config(ADAPTERS[name]).to_dict(), configs()[name]
    keys = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern")
    assert {key: built.get(key) for key in keys} == {key: shipped.get(key) for key in keys}
