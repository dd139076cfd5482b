"""One linear of a prefill chunk with adapters: torch's product and expand after it, or one kernel.

Both have the same h; the shrink, which either needs, is left out. Used by run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ceilings import Ceilings
from swarm import Sites
from timing import median_s

from loraswarm.kernels import triton
from loraswarm.kernels.triton.fused_linear import Updates, fused_linear

SIZES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
"""In and out features of Llama-3-8B's fused linears."""
TOKENS = (512, 2048)
RANKS = (16, 64)
NUM_ADAPTERS = (1, 8)


def measure_prefill_linears(ceilings: Ceilings, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for every size, chunk, rank and number of adapters; microseconds."""
    for in_size, out_size in SIZES:
        weight = triton.pack_linear(_numbers(device, out_size, in_size) * in_size**-0.5)
        for rank in RANKS:
            sites = Sites([(in_size, out_size)])
            for adapter in range(max(NUM_ADAPTERS)):
                sites.add(adapter, rank)
            pool = _numbers(device, sites.end)
            for num_tokens in TOKENS:
                x_TI = _numbers(device, num_tokens, in_size)
                for num_adapters in NUM_ADAPTERS:
                    each = num_tokens // num_adapters
                    tiles = sites.table([(adapter, each) for adapter in range(num_adapters)])
                    h_QTR = triton.lora_shrink(x_TI, pool, tiles, 0, 1)
                    updates = Updates(h_QTR, pool, tiles, 0, (0, out_size))
                    about = {
                        "in": in_size,
                        "out": out_size,
                        "tokens": num_tokens,
                        "rank": rank,
                        "adapters": num_adapters,
                    }
                    flops = 2 * num_tokens * in_size * out_size
                    bound_us = flops / ceilings.tflop_per_s / 1e6
                    yield about | _measure(x_TI, weight, updates, bound_us)


def _measure(x_TI: Any, weight: Any, updates: Updates, bound_us: float) -> dict[str, Any]:
    h_QTR, *others = updates

    def expanded() -> torch.Tensor:
        y_TO = triton.linear(x_TI, weight, None)
        triton.lora_expand_(y_TO, h_QTR, *others)
        return y_TO

    expected_TO = expanded().float()
    difference = (fused_linear(x_TI, weight, updates).float() - expected_TO).abs().max()
    product_us = median_s(lambda: triton.linear(x_TI, weight, None)) * 1e6
    expanded_us = median_s(expanded) * 1e6
    fused_us = median_s(lambda: fused_linear(x_TI, weight, updates)) * 1e6
    return {
        "product_us": product_us,
        "with_expand_us": expanded_us,
        "fused_us": fused_us,
        "over_product": expanded_us / product_us - 1,
        "fused_over": fused_us / product_us - 1,
        "bound_us": bound_us,
        "difference": float(difference / expected_TO.abs().max()),
    }


def _numbers(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)
