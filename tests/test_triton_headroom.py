"""What is left of a device's memory for steps and their graphs covers what they allocate.

Without a CUDA device its counters are played by ones that hold what the test says.
"""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from device_under_test import DEVICE
from loraswarm.config import EngineConfig
from loraswarm.engine import devices, headroom, sizing
from loraswarm.engine.buckets import buckets_of
from loraswarm.engine.headroom import decode_padding, graph_bytes, padding_batch, step_bytes
from loraswarm.engine.setup import _weight_bytes
from loraswarm.errors import ConfigError
from loraswarm.kernels import triton
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.loader import load_decoder
from loraswarm.models.source import read_config
from model_factory import VOCAB_SIZE, save_tiny_model

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPE = torch.bfloat16
PEAK_BYTES = 1000


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    path = save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2-tied")
    return load_decoder(path, decoder_config(read_config(path)), Backend(triton, DTYPE, DEVICE))


@pytest.fixture
def buffer(decoder) -> PageBuffer:
    geometry = page_geometry(decoder.shape, DTYPE.itemsize)
    return PageBuffer(2, decoder.shape, geometry, DTYPE, DEVICE)


@torch.inference_mode()
def test_padding_is_stored_nowhere_and_gets_logits(decoder, buffer):
    buffer.floats.fill_(float("nan"))
    before = buffer.pool.clone().cpu().view(torch.int16)
    for batch, rows in ((padding_batch(buffer, 5, 3), 3), (decode_padding(buffer, 7), 7)):
        assert decoder.forward(batch).shape == (rows, VOCAB_SIZE)
        assert torch.equal(buffer.pool.cpu().view(torch.int16), before)


def test_the_cpu_keeps_nothing_for_steps(decoder):
    backend = Backend(triton, DTYPE, torch.device("cpu"))
    geometry = page_geometry(decoder.shape, DTYPE.itemsize)
    assert step_bytes(decoder, backend, geometry, 100, 10) == 0
    assert graph_bytes(decoder, backend, geometry, 10, 100) == 0


def test_graphs_take_their_logits_their_page_table_their_peak_and_something_each(
    decoder, buffer, monkeypatch
):
    tried = []

    def peak_bytes(model, batch):
        tried.append(
            (len(batch.token_ids), len(batch.logit_rows), batch.attention.max_query_tokens)
        )
        return PEAK_BYTES

    monkeypatch.setattr(headroom, "_one_page", lambda *_: buffer)
    monkeypatch.setattr(headroom, "_peak_bytes", peak_bytes)
    backend = SimpleNamespace(device=torch.device("cuda"), dtype=DTYPE)
    geometry = page_geometry(decoder.shape, DTYPE.itemsize)
    row_bytes = 4 * VOCAB_SIZE
    found = graph_bytes(decoder, backend, geometry, 9, 10 * geometry.page_tokens + 1)
    own = 9 * 11 * 4 + headroom.GRAPH_SETS * len(buckets_of(9)) * headroom.GRAPH_BYTES
    assert found == 9 * row_bytes + headroom.POOL_SHARE * PEAK_BYTES + own
    of_tokens = 100 * headroom.LORA_TOKEN_BYTES
    copies = headroom.SAMPLING_COPIES
    assert step_bytes(decoder, backend, geometry, 100, 9) == (
        PEAK_BYTES + copies * 9 * row_bytes + of_tokens
    )
    assert tried == [(9, 9, 1), (100, 9, 100)]


def test_buckets_end_with_the_largest_step():
    assert buckets_of(1) == [1]
    assert buckets_of(6) == [1, 2, 4, 6]
    assert buckets_of(128)[-2:] == [96, 128]
    assert buckets_of(300)[-2:] == [256, 300]


def test_a_peak_is_what_torch_takes_from_the_device_beyond_what_it_had(monkeypatch):
    """Counted by what is reserved: tensors leave gaps that no pool can have."""
    calls = []

    def played(name, result):
        def play(*_):
            calls.append(name)
            return result

        return play

    for name, result in (
        ("synchronize", None),
        ("empty_cache", None),
        ("reset_peak_memory_stats", None),
        ("memory_reserved", 100),
        ("max_memory_reserved", 350),
    ):
        monkeypatch.setattr(torch.cuda, name, played(name, result))
    model = SimpleNamespace(forward=played("forward", None))
    batch = SimpleNamespace(pool=SimpleNamespace(device=torch.device("cuda")))
    assert headroom._peak_bytes(model, batch) == 250
    ran = calls.index("forward")
    assert calls[:ran].index("empty_cache") < calls[:ran].index("memory_reserved")
    assert "reset_peak_memory_stats" in calls[:ran]
    assert calls[ran + 1 :] == ["synchronize", "max_memory_reserved", "empty_cache"]


class Device:
    """A CUDA device of so many free bytes, of which a step takes 1,000,000 and graphs 500,000."""

    TOTAL, STEP, GRAPHS = 90_000_000, 1_000_000, 500_000

    def __init__(self, decoder, monkeypatch, free: int):
        self.decoder = decoder
        self.geometry = page_geometry(decoder.shape, DTYPE.itemsize)
        self.tried = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, self.TOTAL))
        monkeypatch.setattr(sizing, "step_bytes", self._step)
        monkeypatch.setattr(sizing, "graph_bytes", lambda *_: self.GRAPHS)

    def _step(self, *_):
        self.tried.append("step")
        return self.STEP

    def sized(self, **options) -> EngineConfig:
        config = EngineConfig(model="m", device="cuda", **options)
        backend = SimpleNamespace(device=torch.device("cuda"), dtype=DTYPE)
        return sizing.size_memory(config, self.geometry, self.decoder, backend)


def test_the_pool_is_a_share_of_what_weights_steps_and_graphs_leave(decoder, monkeypatch):
    device = Device(decoder, monkeypatch, 21_500_000)
    assert device.sized(memory_utilization=0.5).pool_bytes == 10_000_000
    assert device.sized(memory_utilization=1.0).pool_bytes == 20_000_000
    merging = device.sized(memory_utilization=0.5, merge="auto")
    assert merging.pool_bytes + merging.merge_bytes == 10_000_000
    assert merging.merge_bytes > 0


@pytest.mark.parametrize("merge", ["off", "auto"])
def test_a_pool_beside_which_no_step_fits_is_refused_with_the_numbers(decoder, monkeypatch, merge):
    device = Device(decoder, monkeypatch, 21_000_000)
    assert device.sized(pool_bytes=9_000_000, merge=merge).pool_bytes == 9_000_000
    assert device.sized(pool_bytes=20_000_000).pool_bytes == 20_000_000
    with pytest.raises(ConfigError) as raised:
        device.sized(pool_bytes=20_000_001, merge=merge)
    for number in ("20,000,001", "512", "1,000,000", "21,000,000", "90,000,000"):
        assert number in str(raised.value)


def test_a_pool_that_leaves_nothing_to_merged_weights_is_refused(decoder, monkeypatch):
    device = Device(decoder, monkeypatch, 21_500_000)
    with pytest.raises(ConfigError, match=r"leave nothing for merged weights .*21,500,000 of"):
        device.sized(pool_bytes=20_000_000, merge="auto")


@pytest.mark.parametrize("free", [0, 1_500_000, 1_500_100])
def test_a_device_without_room_for_a_page_is_refused_with_the_numbers(decoder, monkeypatch, free):
    device = Device(decoder, monkeypatch, free)
    with pytest.raises(ConfigError, match="one page of this model takes") as raised:
        device.sized()
    for number in (device.geometry.page_bytes, free, device.TOTAL, 1_500_000):
        assert f"{number:,}" in str(raised.value)
    assert "memory_utilization 0.9" in str(raised.value)


def test_a_step_that_does_not_fit_beside_the_weights_is_refused_with_the_numbers(
    decoder, monkeypatch
):
    device = Device(decoder, monkeypatch, 21_000_000)

    def exhausted(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 MiB")

    monkeypatch.setattr(sizing, "step_bytes", exhausted)
    for options in ({}, {"pool_bytes": 1_000_000}):
        with pytest.raises(ConfigError, match="a step of 512 tokens does not fit") as raised:
            device.sized(**options)
        assert f"{decoder.num_bytes():,}" in str(raised.value)
        assert "21,000,000" in str(raised.value)


def test_the_cpus_pool_is_a_share_of_what_is_available(decoder, monkeypatch):
    memory = SimpleNamespace(available=10_000_000, total=90_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    backend = Backend(triton, DTYPE, torch.device("cpu"))
    geometry = page_geometry(decoder.shape, DTYPE.itemsize)
    config = EngineConfig(model="m", memory_utilization=0.5)
    assert sizing.size_memory(config, geometry, decoder, backend).pool_bytes == 5_000_000
    with pytest.raises(ConfigError, match=r"memory_utilization 1e-05 leaves 100 bytes"):
        sizing.size_memory(
            EngineConfig(model="m", memory_utilization=1e-5), geometry, decoder, backend
        )


def test_what_a_models_weights_take_is_known_without_their_memory(decoder):
    backend = Backend(triton, DTYPE, DEVICE)
    assert _weight_bytes(decoder.config, backend) == decoder.num_bytes()


def test_a_device_that_cannot_be_used_says_why_in_one_line(monkeypatch):
    def busy():
        raise RuntimeError("CUDA error: all devices are busy\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        devices.resolve_device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "current_device", busy)
    with pytest.raises(ConfigError, match="all devices are busy; use --device cpu") as raised:
        devices.resolve_device("cuda")
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert devices.resolve_device("cuda") == torch.device("cuda", 1)
