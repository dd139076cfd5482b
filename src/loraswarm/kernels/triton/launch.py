"""Where Triton's kernels run: on a CUDA device, or on CPU tensors under TRITON_INTERPRET=1.

Knows no kernel. Called by the modules that launch them.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are interpreted, as Triton decides when they are defined."""
INTERPRETED_CORES = 2
DEVICE_TYPE = "cpu" if IS_INTERPRETED else "cuda"


@cache
def num_cores(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_CORES
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_device(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that kernels cannot use with the first one given."""
    first = next((tensor for tensor in tensors.values() if tensor is not None), None)
    for name, tensor in tensors.items():
        if tensor is None or first is None:
            continue
        if tensor.device.type != DEVICE_TYPE:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {DEVICE_TYPE}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, others are on {first.device}")


def ceil_power(number: int) -> int:
    """The smallest power of two that is at least `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()
