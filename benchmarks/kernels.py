"""Time of each CPU kernel on the cases that decide serving speed, beside the machine's read rate.

    python benchmarks/kernels.py --threads 4 --dtype bfloat16

Sizes are those of Qwen2.5-0.5B. Each call of a decode case reads other memory, so that nothing is
in the caches. Calls are timed in recordings of many, as a model's step makes them, so that waking
threads is not in the figures. GB/s counts what a call cannot avoid reading: weights once, tiles
once per segment, K and V once per sequence; what works on activations alone: all it reads and
writes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from document import json_path, write_document
from loraswarm.kernels import AttentionWork, TileTable, cpu
from loraswarm.kernels.cpu.linear import PackedWeight

NARROW, WIDE = 896, 4864
RANK = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_TOKENS = 14, 2, 64, 16
VOCAB = 151_936
COLD_BYTES = 256 << 20
CALLS_TOGETHER = 24
LEAST_RECORDINGS = 3


@dataclass(frozen=True)
class Case:
    """`calls` do the same work on different memory; each must move `num_bytes`."""

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


def lora_table(
    lengths: list[int], sizes: tuple[int, int], dtype: torch.dtype, with_vectors: bool
) -> tuple[Tensor, TileTable, int]:
    """A pool, its table and the number of sites: one linear, each segment with its own adapter.

    `with_vectors` gives every tile u and v and every segment gains; otherwise there are none.
    """
    in_features, out_features = sizes
    num_segments = len(lengths)
    tile_elements = RANK * (in_features + out_features)
    copies = max(1, COLD_BYTES // (num_segments * tile_elements * dtype.itemsize))
    num_tiles = copies * num_segments
    pool = random_bits(num_tiles * tile_elements, dtype)
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
    return pool, tiles, copies


def lora_cases(
    name: str,
    lengths: list[int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    with_vectors: bool = False,
) -> list[Case]:
    """Shrink and expand of one linear; the calls are the sites of one table, as in a step."""
    in_features, out_features = sizes
    num_segments, num_tokens = len(lengths), sum(lengths)
    pool, tiles, copies = lora_table(lengths, sizes, dtype, with_vectors)
    x_TI = random_bits(num_tokens * in_features, dtype).view(num_tokens, in_features)
    y_TO = random_bits(num_tokens * out_features, dtype).view(num_tokens, out_features).clone()
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


def linear_case(num_tokens: int, sizes: tuple[int, int], dtype: torch.dtype) -> Case | None:
    """One product; None where weights of this dtype are not packed and torch multiplies."""
    in_features, out_features = sizes
    x_TI = random_bits(num_tokens * in_features, dtype).view(num_tokens, in_features)
    weights = packed_weights(sizes, dtype)
    if weights is None:
        return None
    calls: list[Callable[[], object]] = [
        lambda weight=weight: cpu.linear(x_TI, weight, None) for weight in weights
    ]
    num_bytes = in_features * out_features * dtype.itemsize
    return Case("linear", f"{num_tokens} rows {in_features}->{out_features}", num_bytes, calls)


def linear_shrink_case(
    name: str, lengths: list[int], sizes: tuple[int, int], dtype: torch.dtype
) -> Case | None:
    """A product and the shrink of the same rows; None as of `linear_case`."""
    in_features, out_features = sizes
    num_segments, num_tokens = len(lengths), sum(lengths)
    x_TI = random_bits(num_tokens * in_features, dtype).view(num_tokens, in_features)
    weights = packed_weights(sizes, dtype)
    if weights is None:
        return None
    pool, tiles, num_sites = lora_table(lengths, sizes, dtype, with_vectors=False)
    count = max(num_sites, len(weights))
    calls: list[Callable[[], object]] = [
        lambda weight=weight, at=site: cpu.linear_shrink(x_TI, weight, None, pool, tiles, at, 1)
        for weight, site, _ in zip(
            itertools.cycle(weights), itertools.cycle(range(num_sites)), range(count), strict=False
        )
    ]
    num_elements = in_features * out_features + num_segments * RANK * in_features
    case = f"{name} {in_features}->{out_features}"
    return Case("linear_shrink", case, num_elements * dtype.itemsize, calls)


def packed_weights(sizes: tuple[int, int], dtype: torch.dtype) -> list[PackedWeight] | None:
    """So many that no cache holds them; None where this dtype is not packed."""
    in_features, out_features = sizes
    num_elements = in_features * out_features
    weight_OI = random_bits(num_elements, dtype).view(out_features, in_features)
    copies = max(1, COLD_BYTES // (num_elements * dtype.itemsize))
    packed = [cpu.pack_linear(weight_OI) for _ in range(copies)]
    found = [weight for weight in packed if weight is not None]
    return found or None


def norm_case(num_tokens: int, dtype: torch.dtype) -> Case:
    """The residual sum and its norm."""
    x_TD, delta_TD = (random_bits(num_tokens * NARROW, dtype).view(-1, NARROW) for _ in range(2))
    weight_D = random_bits(NARROW, dtype)
    streams = [x_TD.clone() for _ in range(CALLS_TOGETHER)]
    calls: list[Callable[[], object]] = [
        lambda x=stream: cpu.add_rms_norm_(x, delta_TD, weight_D, 1e-6) for stream in streams
    ]
    num_bytes = 4 * num_tokens * NARROW * dtype.itemsize
    return Case("add_rms_norm_", f"{num_tokens} rows of {NARROW}", num_bytes, calls)


def silu_case(num_tokens: int, dtype: torch.dtype) -> Case:
    """The gated product of an MLP."""
    gate_up_TF2 = random_bits(num_tokens * 2 * WIDE, dtype).view(num_tokens, 2 * WIDE)
    inputs = [gate_up_TF2.clone() for _ in range(CALLS_TOGETHER)]
    calls: list[Callable[[], object]] = [lambda x=each: cpu.silu_multiply(x) for each in inputs]
    num_bytes = 3 * num_tokens * WIDE * dtype.itemsize
    return Case("silu_multiply", f"{num_tokens} rows of 2 x {WIDE}", num_bytes, calls)


def rotate_case(num_tokens: int, dtype: torch.dtype) -> Case:
    """Rotation of a fused projection in place, its K and V to scattered slots."""
    num_pages = -(-num_tokens // PAGE_TOKENS)
    pages = torch.zeros(num_pages, 24, 2, NUM_KV_HEADS, PAGE_TOKENS, HEAD_SIZE, dtype=dtype)
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    qkv_TNE = random_bits(num_tokens * heads * HEAD_SIZE, dtype).view(num_tokens, heads, HEAD_SIZE)
    projections = [qkv_TNE.clone() for _ in range(24)]
    angle_T1E = torch.rand(num_tokens, 1, HEAD_SIZE)
    cos_T1E, sin_T1E = angle_T1E.cos().to(dtype), angle_T1E.sin().to(dtype)
    slots_T = torch.randperm(num_tokens)
    calls: list[Callable[[], object]] = [
        lambda at=layer, qkv=qkv: cpu.rotate_and_write_kv_(
            qkv, NUM_HEADS, cos_T1E, sin_T1E, pages, at, slots_T
        )
        for layer, qkv in enumerate(projections)
    ]
    num_bytes = 2 * qkv_TNE.numel() * dtype.itemsize
    return Case("rotate_and_write_kv_", f"{num_tokens} tokens", num_bytes, calls)


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
    """Microseconds of a call, over as many recordings of CALLS_TOGETHER as fit."""
    calls = itertools.cycle(case.calls)
    recording_s(calls)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < LEAST_RECORDINGS:
        times.append(recording_s(calls))
    return statistics.median(times) / CALLS_TOGETHER * 1e6


def recording_s(calls: Iterator[Callable[[], object]]) -> float:
    """Seconds of the next CALLS_TOGETHER."""
    begin = time.perf_counter()
    with cpu.recording():
        for call in itertools.islice(calls, CALLS_TOGETHER):
            call()
    return time.perf_counter() - begin


def cases(dtype: torch.dtype) -> Iterator[Case | None]:
    """Everything that is measured, in the order of the table; made when it is asked for.

    None stands for a case that this dtype does not have.
    """
    for sizes in ((NARROW, 2 * WIDE), (WIDE, NARROW)):
        for num_tokens in (1, 8, 32, 128, 512):
            yield linear_case(num_tokens, sizes, dtype)
        for name, lengths in (("32 distinct", [1] * 32), ("prefill 512", [512])):
            yield linear_shrink_case(name, lengths, sizes, dtype)
    for num_tokens in (1, 32):
        yield linear_case(num_tokens, (NARROW, VOCAB), dtype)
    for name, lengths in (
        ("32 distinct", [1] * 32),
        ("32 identical", [32]),
        ("1 x 1", [1]),
        ("prefill 128", [128]),
        ("prefill 512", [512]),
    ):
        yield from lora_cases(name, lengths, (NARROW, WIDE), dtype)
        yield from lora_cases(name, lengths, (WIDE, NARROW), dtype)
    for name, lengths in (("32 with vectors", [1] * 32), ("512 with vectors", [512])):
        yield from lora_cases(name, lengths, (NARROW, WIDE), dtype, with_vectors=True)
    yield attention_case("decode 32 x 160", [(1, 160)] * 32, dtype)
    yield attention_case("decode 4 x 2048", [(1, 2048)] * 4, dtype)
    yield attention_case("decode 1 x 16", [(1, 16)], dtype)
    yield attention_case("prefill 512", [(512, 512)], dtype)
    yield attention_case("prefill 512 after 1536", [(512, 2048)], dtype)
    for num_tokens in (32, 512):
        yield write_case(num_tokens, dtype)
        yield rotate_case(num_tokens, dtype)
        yield norm_case(num_tokens, dtype)
        yield silu_case(num_tokens, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    parser.add_argument("--json", type=json_path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cpu.warm_up(arguments.dtype, lambda line: print(line, flush=True))
    first_rate, num_left_out, found = read_rate(), 0, []
    print(f"machine reads {first_rate:.1f} GB/s with {arguments.threads} threads")
    print(f"{'kernel':20} {'case':28} {'us':>9} {'GB/s':>7}")
    for case in cases(getattr(torch, arguments.dtype)):
        if case is None:
            num_left_out += 1
            continue
        time_us = median_us(case, arguments.seconds)
        rate = case.num_bytes / time_us / 1e3
        print(f"{case.kernel:20} {case.name:28} {time_us:9.1f} {rate:7.1f}", flush=True)
        found.append({"kernel": case.kernel, "case": case.name, "us": time_us, "gb_per_s": rate})
    if num_left_out:
        print(f"{num_left_out} cases left out: weights in {arguments.dtype} are not packed here")
    last_rate = read_rate()
    print(f"machine reads {last_rate:.1f} GB/s with {arguments.threads} threads")
    if arguments.json:
        rates = [first_rate, last_rate]
        write_document(arguments.json, arguments, {"read_gb_per_s": rates, "kernels": found})


if __name__ == "__main__":
    main()
