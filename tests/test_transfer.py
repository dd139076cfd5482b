"""A batch's tensors survive the one copy to a device, with their shapes and dtypes."""

from __future__ import annotations

import pytest
import torch

from batch_factory import BatchFactory
from device_under_test import DEVICE
from loraswarm.config import EngineConfig
from loraswarm.core.base_shape import BaseShape
from loraswarm.engine.devices import memory_report, resolve_device
from loraswarm.engine.transfer import host_tensors, pack, to_device, views
from loraswarm.errors import ConfigError

SHAPE = BaseShape(
    num_layers=1,
    num_kv_heads=1,
    head_size=4,
    vocab_size=9,
    target_sizes=((8, 8),) * 7,
)


@pytest.mark.parametrize("lengths", [(1,), (3, 1), (17, 2, 5)])
def test_every_tensor_arrives(lengths):
    factory = BatchFactory(SHAPE, torch.float32)
    chunks = {f"s{index}": list(range(1, length + 1)) for index, length in enumerate(lengths)}
    batch = factory.batch(chunks, last_rows_only=True)
    moved = to_device(batch, DEVICE)
    for there, here in zip(host_tensors(moved), host_tensors(batch), strict=True):
        assert there.device.type == DEVICE.type
        assert there.dtype == here.dtype
        assert torch.equal(there.cpu(), here)
    assert moved.attention.max_query_tokens == batch.attention.max_query_tokens
    assert moved.attention.max_context_tokens == batch.attention.max_context_tokens
    assert moved.pages is batch.pages


def test_tensors_lie_aligned_and_apart():
    tensors = [torch.arange(3, dtype=torch.int32), torch.arange(5), torch.zeros(0), torch.ones(1)]
    packed = pack(tensors, is_pinned=False)
    found = views(packed, tensors)
    assert all(torch.equal(view, tensor) for view, tensor in zip(found, tensors, strict=True))
    found[1].fill_(7)
    assert torch.equal(found[0], tensors[0])
    assert torch.equal(found[3], tensors[3])
    assert all(view.storage_offset() * view.itemsize % 16 == 0 for view in found if view.numel())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a CUDA device")
def test_cuda_is_refused_where_torch_finds_none():
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
    assert EngineConfig(model="m").device == "auto"


def test_the_report_of_memory_has_two_numbers():
    assert memory_report(DEVICE).count(" bytes") == 1
    assert " of " in memory_report(DEVICE)
