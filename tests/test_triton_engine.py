"""A model and an engine on Triton's kernels equal transformers, and an engine on the CPU's.

Without a CUDA device the kernels are interpreted, and graphs repeat the Python of a step.
"""

from __future__ import annotations

import pytest
import torch

from batch_factory import BatchFactory
from device_under_test import DEVICE
from engine_factory import make_engine, make_request, prompt_of, run_tokens, save_swarm
from loraswarm.core.request import SamplingParams
from loraswarm.engine import setup
from loraswarm.engine.graphs import DecodeGraphs
from loraswarm.engine.transfer import to_device
from loraswarm.kernels import triton
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.loader import load_decoder
from loraswarm.models.source import read_config
from model_factory import VOCAB_SIZE, load_reference, save_tiny_model
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("interpreted_triton")


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["qwen3-biased", "llama3-tied", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_transformers(variant, dtype, tmp_path):
    path = save_tiny_model(tmp_path, variant)
    decoder = load_decoder(path, decoder_config(read_config(path)), Backend(triton, dtype, DEVICE))
    factory = BatchFactory(decoder.shape, dtype)
    factory.pages = factory.pages.to(DEVICE)
    tokens = torch.randint(0, VOCAB_SIZE, (21,), generator=torch.Generator().manual_seed(1))
    found = [
        decoder.forward(to_device(factory.batch({"a": part.tolist()}), DEVICE))
        for part in tokens.split([13, 7, 1])
    ]
    expected_ZV = load_reference(path, dtype)(tokens[None]).logits[0]
    assert_close(torch.cat(found).cpu(), expected_ZV, dtype)


def test_an_engine_generates_what_it_does_on_the_cpu(tmp_path, monkeypatch):
    save_swarm(tmp_path, 3, ranks=(8, 40, 3))
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    adapters = [None, "a001", "a000", "a002", "a001"]

    requests = [
        make_request(f"r{index}", adapter, prompt_of(index, 4 + 3 * index), params)
        for index, adapter in enumerate(adapters)
    ]
    expected = run_tokens(make_engine(tmp_path, device="cpu"), requests)
    graphs = []

    def repeated(config, info, decoder, backend):
        max_pages = -(-info.max_model_len // info.page_tokens)
        graphs.append(DecodeGraphs(decoder, lambda run: run, max_pages, info.page_tokens, 8))
        return graphs[0]

    if DEVICE.type == "cpu":
        monkeypatch.setattr(setup, "load_kernels", lambda device: triton)
        monkeypatch.setattr(setup, "_graphs", repeated)
    lines = []
    engine = make_engine(tmp_path, lines.append, capture_at_start=True, max_num_sequences=8)
    assert sum("captured base decode steps" in line for line in lines) == 1
    assert run_tokens(engine, requests) == expected
    assert len(set(map(tuple, expected.values()))) == len(adapters)
    assert DEVICE.type == "cuda" or graphs[0]._graphs
