"""What is left of a device's memory for steps and their graphs covers what they allocate.

Without a CUDA device its counters are played by ones that hold what the test says.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from device_under_test import DEVICE
from loraswarm.engine import headroom
from loraswarm.engine.buckets import buckets_of
from loraswarm.engine.headroom import decode_padding, graph_bytes, padding_batch, step_bytes
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
    assert graph_bytes(decoder, backend, geometry, 10) == 0


def test_graphs_take_their_logits_their_peak_and_something_each(decoder, buffer, monkeypatch):
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
    found = graph_bytes(decoder, backend, geometry, 9)
    own = headroom.GRAPH_SETS * len(buckets_of(9)) * headroom.GRAPH_BYTES
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
