"""CPU tensors as the NumPy arrays that kernels take: same memory, no copy.

bfloat16 appears as uint16 and float16 as int16, see kernels/cpu/vectors. Called by kernels/cpu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STORED_AS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}


def bits(name: str, tensor: Tensor) -> Any:
    """The tensor as an array of the same shape and strides.

    Raises    ValueError naming the argument, if it is not on the CPU or not one of the float types.
    """
    stored_as = _STORED_AS.get(tensor.dtype)
    if stored_as is None:
        raise ValueError(f"{name} is {tensor.dtype}; the cpu kernels take {_names()}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; the cpu kernels need it on the cpu")
    return tensor.view(stored_as).numpy()


def _names() -> str:
    return ", ".join(str(dtype) for dtype in _STORED_AS)
