"""Time of each CPU kernel on the cases that decide serving speed, beside the machine's read rate.

    python benchmarks/kernels.py --threads 4 --dtype bfloat16

Sizes are those of Qwen2.5-0.5B. Each call of a decode case reads other memory, so that nothing is
in the caches. GB/s counts what a call cannot avoid reading: tiles once per segment, K and V once
per sequence, in the median of all calls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraswarm.kernels import AttentionWork, TileTable, cpu

NARROW, WIDE = 896, 4864
RANK = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_TOKENS = 14, 2, 64, 16
COLD_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """`calls` do the same work on different memory; each must read `num_bytes`."""

    kernel: str
    name: str
    num_bytes: int
    calls: list[Callable[[], object]]


def read_rate() -> float:
    """GB/s of a sum over memory that no cache holds, with as many threads."""
    numbers = torch.ones(COLD_BYTES // 4)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return COLD_BYTES / statistics.median(times) / 1e9


def random_bits(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Many numbers quickly: a million random ones, repeated."""
    numbers = (torch.randn(1 << 20) * 0.1).to(dtype)
    return numbers.repeat(-(-num_elements // numbers.numel()))[:num_elements]


def lora_cases(
    name: str,
    lengths: list[int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    with_vectors: bool = False,
) -> list[Case]:
    """Shrink and expand of one linear for segments of these lengths, each with its own adapter.

    The calls are the sites of one table, as in a step. `with_vectors` gives every tile u and v and
    every segment gains; otherwise there are none.
    """
    in_features, out_features = sizes
    num_segments, num_tokens = len(lengths), sum(lengths)
    tile_elements = RANK * (in_features + out_features)
    copies = max(1, COLD_BYTES // (num_segments * tile_elements * dtype.itemsize))
    num_tiles = copies * num_segments
    pool = random_bits(num_tiles * tile_elements, dtype)
    x_TI = random_bits(num_tokens * in_features, dtype).view(num_tokens, in_features)
    y_TO = random_bits(num_tokens * out_features, dtype).view(num_tokens, out_features).clone()
    tile = torch.arange(num_tiles)
    vector = 0 if with_vectors else -1
    tiles = TileTable(
        segments=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        ranges=torch.stack([tile, tile + 1], dim=1).int().view(copies, num_segments, 2),
        a_offset=tile * tile_elements,
        bt_offset=tile * tile_elements + RANK * in_features,
        a_stride=torch.full((num_tiles,), in_features),
        bt_stride=torch.full((num_tiles,), out_features),
        ranks=torch.full((num_tiles,), RANK, dtype=torch.int32),
        scale=torch.ones(num_tiles),
        u_offset=torch.full((num_tiles,), vector),
        v_offset=torch.full((num_tiles,), vector),
        gain_offset=torch.full((copies, num_segments, 2), vector),
        max_tiles=(1,) * copies,
        has_gains=(with_vectors,) * copies,
    )
    h_QTR = torch.randn(1, num_tokens, RANK) * 1e-3
    bounds = (0, out_features)
    shrinks: list[Callable[[], object]] = [
        lambda at=site: cpu.lora_shrink(x_TI, pool, tiles, at, 1) for site in range(copies)
    ]
    expands: list[Callable[[], object]] = [
        lambda at=site: cpu.lora_expand_(y_TO, h_QTR, pool, tiles, at, bounds)
        for site in range(copies)
    ]
    case = f"{name} {in_features}->{out_features}"
    row_bytes = num_segments * RANK * dtype.itemsize
    return [
        Case("lora_shrink", case, row_bytes * in_features, shrinks),
        Case("lora_expand_", case, row_bytes * out_features, expands),
    ]


def attention_case(name: str, lengths: list[tuple[int, int]], dtype: torch.dtype) -> Case:
    """Sequences of (new tokens, context length)."""
    num_tokens = sum(new for new, _ in lengths)
    page_counts = [-(-context // PAGE_TOKENS) for _, context in lengths]
    num_pages = sum(page_counts)
    kv_bytes = (
        sum(context for _, context in lengths) * 2 * NUM_KV_HEADS * HEAD_SIZE * dtype.itemsize
    )
    layers = max(1, min(24, COLD_BYTES // kv_bytes))
    shape = (num_pages, layers, 2, NUM_KV_HEADS, PAGE_TOKENS, HEAD_SIZE)
    pages = random_bits(torch.Size(shape).numel(), dtype).view(shape)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(lengths), max(page_counts), dtype=torch.int32)
    for row, ids in enumerate(order.split(page_counts)):
        table[row, : len(ids)] = ids
    starts = [0, *torch.tensor([new for new, _ in lengths]).cumsum(0).tolist()]
    work = AttentionWork(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        page_table=table,
        max_query_tokens=max(new for new, _ in lengths),
        max_context_tokens=max(context for _, context in lengths),
    )
    q_THE = random_bits(num_tokens * NUM_HEADS * HEAD_SIZE, dtype).view(num_tokens, NUM_HEADS, -1)
    scale = HEAD_SIZE**-0.5
    calls: list[Callable[[], object]] = [
        lambda at=layer: cpu.paged_attention(q_THE, pages, at, work, scale, None)
        for layer in range(layers)
    ]
    return Case("paged_attention", name, kv_bytes, calls)


def write_case(num_tokens: int, dtype: torch.dtype) -> Case:
    """K and V as views of a fused projection, at scattered slots."""
    num_pages = -(-num_tokens // PAGE_TOKENS)
    pages = torch.zeros(num_pages, 24, 2, NUM_KV_HEADS, PAGE_TOKENS, HEAD_SIZE, dtype=dtype)
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    qkv_TNE = random_bits(num_tokens * heads * HEAD_SIZE, dtype).view(num_tokens, heads, HEAD_SIZE)
    k_TKE, v_TKE = qkv_TNE[:, NUM_HEADS:-NUM_KV_HEADS], qkv_TNE[:, -NUM_KV_HEADS:]
    slots = torch.randperm(num_tokens)
    calls: list[Callable[[], object]] = [
        lambda at=layer: cpu.write_kv_(pages, at, k_TKE, v_TKE, slots) for layer in range(24)
    ]
    return Case("write_kv_", f"{num_tokens} tokens", 2 * k_TKE.numel() * dtype.itemsize, calls)


def median_us(case: Case, seconds: float) -> float:
    """Microseconds of a call, over as many rounds as fit."""
    for call in case.calls[:3]:
        call()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for call in case.calls:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def cases(dtype: torch.dtype) -> list[Case]:
    """Everything that is measured, in the order of the table."""
    result: list[Case] = []
    for name, lengths in (
        ("32 distinct", [1] * 32),
        ("32 identical", [32]),
        ("1 x 1", [1]),
        ("prefill 128", [128]),
        ("prefill 512", [512]),
    ):
        result += lora_cases(name, lengths, (NARROW, WIDE), dtype)
        result += lora_cases(name, lengths, (WIDE, NARROW), dtype)
    for name, lengths in (("32 with vectors", [1] * 32), ("512 with vectors", [512])):
        result += lora_cases(name, lengths, (NARROW, WIDE), dtype, with_vectors=True)
    result.append(attention_case("decode 32 x 160", [(1, 160)] * 32, dtype))
    result.append(attention_case("decode 4 x 2048", [(1, 2048)] * 4, dtype))
    result.append(attention_case("decode 1 x 16", [(1, 16)], dtype))
    result.append(attention_case("prefill 512", [(512, 512)], dtype))
    result.append(attention_case("prefill 512 after 1536", [(512, 2048)], dtype))
    result.append(write_case(32, dtype))
    result.append(write_case(512, dtype))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cpu.warm_up(arguments.dtype, lambda line: print(line, flush=True))
    print(f"machine reads {read_rate():.1f} GB/s with {arguments.threads} threads")
    print(f"{'kernel':16} {'case':28} {'us':>9} {'GB/s':>7}")
    for case in cases(getattr(torch, arguments.dtype)):
        time_us = median_us(case, arguments.seconds)
        rate = case.num_bytes / time_us / 1e3
        print(f"{case.kernel:16} {case.name:28} {time_us:9.1f} {rate:7.1f}", flush=True)
    print(f"machine reads {read_rate():.1f} GB/s with {arguments.threads} threads")


if __name__ == "__main__":
    main()
