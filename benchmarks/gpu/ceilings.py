"""What the device can do at most: bytes a second, and bfloat16 products a second.

Measured first in every session, so that all else is a share of it. Used by run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timing import median_s

COPY_BYTES = 4 << 30
PRODUCT_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """`copy_gb_per_s` counts bytes read and written, `read_gb_per_s` bytes read."""

    device: str
    num_multiprocessors: int
    copy_gb_per_s: float
    read_gb_per_s: float
    tflop_per_s: float

    def bytes_us(self, num_bytes: int) -> float:
        """Microseconds in which so many bytes can be moved."""
        return num_bytes / max(self.copy_gb_per_s, self.read_gb_per_s) / 1e3


def measure_ceilings(device: torch.device) -> Ceilings:
    """Best of what torch reaches with large operands."""
    copy_s, read_s = _copy_and_read_s(device)
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=device)
    b = torch.randn_like(a)
    product_s = median_s(lambda: a @ b)
    properties = torch.cuda.get_device_properties(device)
    return Ceilings(
        device=properties.name,
        num_multiprocessors=properties.multi_processor_count,
        copy_gb_per_s=2 * COPY_BYTES / copy_s / 1e9,
        read_gb_per_s=COPY_BYTES / read_s / 1e9,
        tflop_per_s=2 * PRODUCT_SIZE**3 / product_s / 1e12,
    )


def _copy_and_read_s(device: torch.device) -> tuple[float, float]:
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return median_s(lambda: target.copy_(source)), median_s(lambda: source.sum())
