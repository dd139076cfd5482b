"""Every method, served in a batch with others, gives PEFT's logits, whatever the engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_factory import load_peft_adapter
from engine_factory import make_engine, make_request, prompt_of
from loraswarm.core.request import Request
from loraswarm.engine.engine import Engine
from method_cases import INVOCATION, METHOD_CASES
from model_factory import save_tiny_model
from served_logits import SCORED, served_logits
from tied_lora import load_tied_lora
from tolerance import TOLERANCE, assert_close

BASES = {
    "untied": {"variant": "llama"},
    "tied-with-biases": {"variant": "qwen2-tied"},
    "norms-of-heads": {"variant": "qwen3"},
}
CASES = [
    *(("untied", name) for name in METHOD_CASES),
    *(("tied-with-biases", name) for name in METHOD_CASES if name != "lm-head"),
    ("norms-of-heads", "saved-norms"),
    ("norms-of-heads", "dora"),
]
# Three methods that run beside every other: vectors, gains and overlays in one batch.
COMPANIONS = ("dora", "vera", "saved-norms", "lora")


class Swarm:
    """A base and one adapter of every method on disk, and PEFT's view of them."""

    def __init__(self, path: Path, base: str, names: list[str]) -> None:
        self.path = path
        save_tiny_model(path / "model", **BASES[base])
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path / "model", attn_implementation="eager"
        ).eval()
        for name in names:
            METHOD_CASES[name](self.model, path / "adapters" / name)

    def expected(self, name: str | None, tokens: list[int]) -> Tensor:
        """Logits [tokens - 1, V] of the plain implementation."""
        model = self.model
        if name == "tied-lora":
            model = load_tied_lora(self.model, self.path / "adapters" / name)
        elif name is not None:
            model = load_peft_adapter(self.model, self.path / "adapters" / name)
        with torch.inference_mode():
            return model(torch.tensor([tokens[:-1]])).logits[0]


@pytest.fixture(scope="module")
def swarms(tmp_path_factory) -> dict[str, Swarm]:
    return {
        base: Swarm(
            tmp_path_factory.mktemp(base),
            base,
            sorted({name for other, name in CASES if other == base} | set(COMPANIONS)),
        )
        for base in BASES
    }


@pytest.fixture(scope="module")
def engines(swarms) -> dict[str, Engine]:
    return {base: make_engine(swarm.path) for base, swarm in swarms.items()}


def prompt_with_invocation(index: int, length: int) -> tuple[int, ...]:
    """A prompt with an invocation of activated LoRA twice within."""
    prompt = list(prompt_of(index, length))
    for place in (length // 4, length // 2):
        prompt[place : place + 2] = INVOCATION
    return tuple(prompt)


def requests_for(name: str) -> list[Request]:
    """The adapter under test twice, its companions, and the base, in one batch."""
    others = [other for other in COMPANIONS if other != name][:3]
    return [
        make_request("tested", name, prompt_with_invocation(1, 31), SCORED),
        make_request("base", None, prompt_with_invocation(2, 9), SCORED),
        make_request("again", name, prompt_with_invocation(3, 11), SCORED),
        *(make_request(other, other, prompt_of(4, 13), SCORED) for other in others),
    ]


def check(swarm: Swarm, name: str, found: dict[str, tuple[list[int], Tensor]]) -> None:
    relative, absolute = TOLERANCE[torch.float32]
    for request_id, (tokens, logits) in found.items():
        adapter = {"tested": name, "again": name, "base": None}.get(request_id, request_id)
        expected = swarm.expected(adapter, tokens)
        assert_close(logits, expected, torch.float32)
        if adapter is not None:
            base = swarm.expected(None, tokens)
            assert not torch.allclose(expected, base, rtol=10 * relative, atol=10 * absolute)


@pytest.mark.parametrize(("base", "name"), CASES)
def test_served_in_a_mixed_batch_a_method_gives_the_logits_of_peft(swarms, engines, base, name):
    check(swarms[base], name, served_logits(engines[base], requests_for(name)))


@pytest.mark.parametrize("name", METHOD_CASES)
def test_chunked_prefill_changes_nothing(swarms, name):
    engine = make_engine(swarms["untied"].path, max_step_tokens=7, max_num_sequences=7)
    check(swarms["untied"], name, served_logits(engine, requests_for(name)))


@pytest.mark.parametrize("base", ["untied", "tied-with-biases"])
def test_all_methods_in_one_batch_through_a_pool_too_small_for_them(swarms, engines, base):
    names = [name for other, name in CASES if other == base]
    page_bytes = engines[base].info.page_bytes
    roomy = engines[base]
    needed = max(roomy._memory.adapters.num_pages(info) for info in roomy._catalog.served.values())
    small = make_engine(swarms[base].path, pool_bytes=(needed + 12) * page_bytes)
    requests = [
        make_request(f"{turn}{name}", name, prompt_with_invocation(turn, 21), SCORED)
        for turn in range(2)
        for name in names
    ]
    found = served_logits(small, requests)
    assert small._scheduler.num_running == 0
    assert small.stats().num_resident_adapters < len(names)
    for request in requests:
        tokens, logits = found[request.request_id]
        assert_close(logits, swarms[base].expected(request.adapter, tokens), torch.float32)


def test_preemption_at_any_step_changes_nothing(swarms):
    engine = make_engine(swarms["untied"].path)

    def preempt(step: int) -> None:
        if step in (1, 2, 4, 7) and engine._scheduler._running:
            engine._scheduler._preempt(engine._scheduler._running[step % 3])

    names = ["dora", "vera", "saved-embeddings", "embeddings", "ia3", "alora", "lm-head"]
    requests = [
        make_request(name, name, prompt_with_invocation(i, 17 + i), SCORED)
        for i, name in enumerate(names)
    ]
    found = served_logits(engine, requests, preempt)
    assert engine._scheduler.num_preemptions > 2
    for name in names:
        tokens, logits = found[name]
        assert_close(logits, swarms["untied"].expected(name, tokens), torch.float32)
