"""Which tensors kernels take, and how a float travels among an operation's int64 arguments.

Asked by whatever records an operation.
"""

from __future__ import annotations

from functools import cache
from struct import pack, unpack

import torch
from torch import Tensor

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)


def check_elements(name: str, tensor: Tensor) -> None:
    """Raise ValueError naming the tensor if it is not on the CPU or not one of the float types."""
    if tensor.dtype not in ELEMENTS:
        names = ", ".join(str(dtype) for dtype in ELEMENTS)
        raise ValueError(f"{name} is {tensor.dtype}; the cpu kernels take {names}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; the cpu kernels need it on the cpu")


@cache
def float_bits(number: float) -> int:
    """The bits of a float32; `vectors.float_of_bits` reads them."""
    bits: int = unpack("i", pack("f", number))[0]
    return bits
