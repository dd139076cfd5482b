"""Large tensors in host memory that Linux is asked to map in huge pages.

Weights and the page pool are read from end to end in every step; with pages of 4 KiB a good part of
that is waiting for address translation. Knows nothing about what is kept there.
"""

from __future__ import annotations

import contextlib
import mmap
from math import prod

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU; zeros, and memory that is taken when first written.

    Ordinary memory if it is small, or where the system knows no huge pages.

    Raises    RuntimeError if there is not so much memory, as torch does.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    try:
        # Private: shared memory follows another setting, which is mostly off.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeError(f"no memory for a tensor of {num_bytes} bytes") from error
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
