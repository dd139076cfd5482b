"""Every method, served in a batch with others, gives PEFT's logits, whatever the engine does."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_factory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_peft_adapter,
    save_random_adapter,
    shape_of,
    write_adapter,
)
from engine_factory import make_engine, make_request, prompt_of
from general_form import save_peft
from loraswarm.core.request import Request
from loraswarm.engine.engine import Engine
from method_cases import INVOCATION, METHOD_CASES
from model_factory import save_tiny_model
from nemo_factory import Layout, peft_to_nemo, shared_a
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
        self._expected: dict[tuple[str | None, tuple[int, ...]], Tensor] = {}

    def expected(self, name: str | None, tokens: list[int]) -> Tensor:
        """Logits [tokens - 1, V] of the plain implementation, computed once for the same tokens."""
        key = name, tuple(tokens)
        if key not in self._expected:
            with torch.inference_mode():
                logits_TV = self._model_with(name)(torch.tensor([tokens[:-1]])).logits[0]
            self._expected[key] = logits_TV
        return self._expected[key]

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _model_with(self, name: str | None) -> nn.Module:
        if name is None:
            return self.model
        if name == "tied-lora":
            return load_tied_lora(self.model, self.path / "adapters" / name)
        return load_peft_adapter(self.model, self.path / "adapters" / name)


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


@pytest.fixture(scope="module")
def chunking_engine(swarms) -> Engine:
    return make_engine(swarms["untied"].path, max_step_tokens=7, max_num_sequences=7)


@pytest.mark.parametrize("name", METHOD_CASES)
def test_chunked_prefill_changes_nothing(swarms, chunking_engine, name):
    check(swarms["untied"], name, served_logits(chunking_engine, requests_for(name)))


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
        running = engine._scheduler._running
        if step % 3 == 1 and running:
            engine._scheduler._preempt(running[step % len(running)])

    names = list(METHOD_CASES)
    requests = [
        make_request(name, name, prompt_with_invocation(i, 17 + i), SCORED)
        for i, name in enumerate(names)
    ]
    found = served_logits(engine, requests, preempt)
    assert engine._scheduler.num_preemptions > 2
    for name in names:
        tokens, logits = found[name]
        assert_close(logits, swarms["untied"].expected(name, tokens), torch.float32)


NEMO_LAYOUTS = {
    "fused": Layout(),
    "fused, sharded over tensors and layers": Layout(tensor_parallel=2, pipeline_parallel=2),
    "unfused": Layout(is_fused=False),
}


@pytest.mark.parametrize("layout", NEMO_LAYOUTS.values(), ids=NEMO_LAYOUTS)
def test_a_nemo_file_gives_the_logits_of_its_peft_twin(tmp_path, layout):
    save_tiny_model(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    ).eval()
    twin = tmp_path / "adapters" / "twin"
    shape = shape_of(model)
    save_random_adapter(twin, shape, rank=6, alpha=12, std=0.2)
    tensors = shared_a(load_file(twin / WEIGHTS_FILE))
    save_file(tensors, twin / WEIGHTS_FILE)
    peft_to_nemo(twin, tmp_path / "adapters" / "nemo" / "adapter.nemo", shape, layout)
    engine = make_engine(tmp_path)
    assert engine._catalog.resolve("nemo").info.file_format == "nemo"
    requests = [
        make_request(name or "base", name, prompt_of(3, 17), SCORED)
        for name in ("nemo", "twin", None)
    ]
    found = served_logits(engine, requests)
    tokens, logits = found["nemo"]
    peft_model = load_peft_adapter(model, twin)
    with torch.inference_mode():
        expected = peft_model(torch.tensor([tokens[:-1]])).logits[0]
    assert_close(logits, expected, torch.float32)
    assert torch.equal(logits, found["twin"][1])
    assert not torch.allclose(logits[:16], found["base"][1][:16], rtol=1e-2, atol=1e-2)


def test_a_hundred_vera_adapters_share_one_pair_of_matrices(swarms, tmp_path):
    source = tmp_path / "source"
    config = VeraConfig(task_type="CAUSAL_LM", r=64, target_modules="all-linear")
    save_peft(swarms["untied"].model, source, config)
    config = json.loads((source / CONFIG_FILE).read_text())
    tensors = load_file(source / WEIGHTS_FILE)
    shared = {name for name in tensors if "vera_lambda" not in name}
    assert len(shared) == 2
    for index in range(100):
        generator = torch.Generator().manual_seed(index)
        vectors = {
            name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
            if name not in shared
        }
        write_adapter(tmp_path / "adapters" / f"v{index}", config, tensors | vectors)
    (tmp_path / "model").symlink_to(swarms["untied"].path / "model")
    engine = make_engine(tmp_path, pool_bytes=16 << 20)
    requests = [make_request(f"v{i}", f"v{i}", prompt_of(1, 5), SCORED) for i in range(100)]
    found = served_logits(engine, requests)
    stats = engine.stats()
    assert stats.num_resident_adapters == 100
    num_floats = sum(tensors[name].numel() for name in shared)
    num_floats += 100 * sum(t.numel() for name, t in tensors.items() if name not in shared)
    assert stats.num_adapter_pages * engine.info.page_bytes <= 1.2 * 4 * num_floats
    assert len({tuple(tokens) for tokens, _ in found.values()}) > 50
