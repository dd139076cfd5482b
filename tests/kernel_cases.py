"""Batches for the kernel tests: who runs which adapter, and paged K and V in shuffled pages.

Everything a kernel must not read is NaN: the pool before and after the tiles, and pages and rows of
pages that belong to no sequence.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from loraswarm.kernels import AttentionWork, TileTable, cpu, reference
from loraswarm.kernels.cpu import jit, program
from tile_factory import SiteWeights, TilePool

PATTERNS = ("distinct", "uniform", "zipf", "identical", "skewed")
BATCH_SIZES = (1, 3, 7, 33, 133)
RANKS = (5, 16, 17, 40, 1, 64, 8)
NUM_SITES = 4
FIRST_SITE = 1
KINDS = (
    ("shared", "u", "v", "g", "c"),
    (),
    ("shared", "u", "v"),
    ("u",),
    ("v", "g"),
    ("g", "c"),
    ("no tiles", "g"),
    ("no tiles", "c"),
)
BACKENDS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]
NUM_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREAD_COUNTS = [count for count in (1, 2, 4) if count <= (NUM_CPUS or 1)]


def use_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test: even the smallest call is spread over threads."""
    monkeypatch.setattr(jit, "PARALLEL_PRODUCTS", 0)
    monkeypatch.setattr(program, "RECORDED_PRODUCTS", 0)
    monkeypatch.setattr(jit.threads, "_count", THREAD_COUNTS[-1])


def segments_of(pattern: str, num_tokens: int, seed: int = 0) -> list[tuple[str | None, int]]:
    """Adjacent (adapter or None, number of tokens); tokens of None are in every mixed batch."""
    chance = random.Random(seed)
    if pattern == "distinct":
        owners = list(range(num_tokens))
    elif pattern == "identical":
        owners = [3] * num_tokens
    elif pattern == "uniform":
        owners = [chance.randrange(6) for _ in range(num_tokens)]
    elif pattern == "zipf":
        owners = [int(chance.paretovariate(1.0)) % 50 for _ in range(num_tokens)]
    else:
        owners = [5 if chance.random() < 0.5 else index for index in range(num_tokens)]
    names = [None if owner == 1 else f"adapter{owner}" for owner in sorted(owners)]
    return [(name, len(list(group))) for name, group in itertools.groupby(names)]


@dataclass
class LoraCase:
    """Arguments of both LoRA kernels for one fused linear whose parts have `out_bounds`."""

    x_TI: Tensor
    y_TO: Tensor
    pool: Tensor
    tiles: TileTable
    out_bounds: tuple[int, ...]
    segments: list[tuple]
    adapters: Mapping[str, Mapping[int, SiteWeights]]

    @property
    def num_parts(self) -> int:
        return len(self.out_bounds) - 1

    def shrink(self, kernels) -> Tensor:
        return kernels.lora_shrink(self.x_TI, self.pool, self.tiles, FIRST_SITE, self.num_parts)

    def expanded(self, kernels, h_QTR: Tensor) -> Tensor:
        """A copy of y with the update added."""
        y_TO = self.y_TO.clone()
        kernels.lora_expand_(y_TO, h_QTR, self.pool, self.tiles, FIRST_SITE, self.out_bounds)
        return y_TO

    def alone(self, token: int) -> LoraCase:
        """The same for one of the tokens only."""
        segment = int((self.tiles.segments[1:] <= token).sum())
        name, _, *others = self.segments[segment]
        return replace(
            self,
            x_TI=self.x_TI[token : token + 1],
            y_TO=self.y_TO[token : token + 1],
            tiles=replace(
                self.tiles,
                segments=torch.tensor([0, 1], dtype=torch.int32),
                ranges=self.tiles.ranges[:, segment : segment + 1].contiguous(),
                gain_offset=self.tiles.gain_offset[:, segment : segment + 1].contiguous(),
            ),
            segments=[(name, 1, *others)],
        )

    def defined(self, h_QTR: Tensor) -> Tensor:
        """h with zeros in the columns that no tile writes."""
        result = torch.zeros_like(h_QTR)
        bounds = self.tiles.segments.tolist()
        for part, (segment, (begin, end)) in itertools.product(
            range(self.num_parts), enumerate(itertools.pairwise(bounds))
        ):
            first, last = self.tiles.ranges[FIRST_SITE + part, segment].tolist()
            for tile in range(first, last):
                columns = slice(16 * (tile - first), 16 * (tile - first) + self.tiles.ranks[tile])
                result[part, begin:end, columns] = h_QTR[part, begin:end, columns]
        return result


def make_lora_case(
    dtype: torch.dtype,
    segments: list[tuple[str | None, int]],
    in_features: int = 37,
    out_sizes: Sequence[int] = (48, 13, 101),
    poisoned: str | None = None,
    seed: int = 0,
) -> LoraCase:
    """Adapters of mixed ranks, some without the last part; `poisoned` holds NaN and inf."""
    numbers = _numbers(dtype, seed)
    adapters = {}
    for name in _names(segments):
        number = int(name.removeprefix("adapter"))
        sites = {}
        for part, out_features in enumerate(out_sizes):
            if part == 2 and number % 3 == 2:
                continue
            rank = RANKS[(number + part) % len(RANKS)]
            a_RI = numbers(rank, in_features) * in_features**-0.5
            b_OR = numbers(out_features, rank) * rank**-0.5
            if name == poisoned:
                a_RI[0, 0], b_OR[0, 0] = float("nan"), float("inf")
            sites[FIRST_SITE + part] = SiteWeights(a_RI, b_OR, scale=0.5 + number % 4)
        adapters[name] = sites
    return _lora_case(numbers, adapters, segments, in_features, out_sizes)


def make_general_case(
    dtype: torch.dtype,
    segments: list[tuple],
    in_features: int = 37,
    out_sizes: Sequence[int] = (48, 13, 101),
    seed: int = 0,
) -> LoraCase:
    """Adapter n is of kind `KINDS[n % len(KINDS)]`; every third has nothing at the last part.

    Those of a "shared" kind use one A and one B of 40 ranks, wider than any part.
    """
    numbers, floats = _numbers(dtype, seed), _numbers(torch.float32, seed + 1)
    a_wide = numbers(40, in_features + 5) * in_features**-0.5
    b_wide = numbers(max(out_sizes) + 3, 40) * 40**-0.5
    adapters = {}
    for name in _names(segments):
        number = int(name.removeprefix("adapter"))
        kind = KINDS[number % len(KINDS)]
        sites = {}
        for part, out_features in enumerate(out_sizes):
            if part == 2 and number % 3 == 2:
                continue
            rank = 40 if "shared" in kind else RANKS[(number + part) % len(RANKS)]
            a_RI = numbers(rank, in_features) * in_features**-0.5
            b_OR = numbers(out_features, rank) * rank**-0.5
            if "shared" in kind:
                a_RI, b_OR = a_wide, b_wide
            sites[FIRST_SITE + part] = SiteWeights(
                a=None if "no tiles" in kind else a_RI,
                b=None if "no tiles" in kind else b_OR,
                scale=0.5 + number % 4,
                u=floats(rank) if "u" in kind else None,
                v=floats(out_features) if "v" in kind else None,
                g=floats(out_features) if "g" in kind else None,
                c=floats(out_features) if "c" in kind else None,
            )
        adapters[name] = sites
    return _lora_case(numbers, adapters, segments, in_features, out_sizes)


def _numbers(dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def _names(segments: Sequence[tuple]) -> list[str]:
    names = {name for first, _, *others in segments for name in (first, *others)}
    return sorted((names - {None}) | {"adapter0"})


def _lora_case(
    numbers: Callable[..., Tensor],
    adapters: Mapping[str, Mapping[int, SiteWeights]],
    segments: Sequence[tuple],
    in_features: int,
    out_sizes: Sequence[int],
) -> LoraCase:
    """Random x and y; the last segment is one without tokens."""
    num_tokens = sum(count for _, count, *_ in segments)
    x_TI, y_TO = numbers(num_tokens, in_features), numbers(num_tokens, sum(out_sizes))
    tile_pool = TilePool(adapters, x_TI.dtype)
    table_segments = [*segments, ("adapter0", 0)]
    return LoraCase(
        x_TI=x_TI,
        y_TO=y_TO,
        pool=torch.cat([tile_pool.pool, torch.full((1000,), float("nan"), dtype=x_TI.dtype)]),
        tiles=tile_pool.table(NUM_SITES, table_segments),
        out_bounds=(0, *itertools.accumulate(out_sizes)),
        segments=table_segments,
        adapters=adapters,
    )


@dataclass
class AttentionCase:
    """Arguments of `paged_attention`, and the same K and V [K, context, E] by sequence."""

    q_THE: Tensor
    pages: Tensor
    layer: int
    work: AttentionWork
    contiguous: list[tuple[Tensor, Tensor]]

    def attend(self, kernels, window: int | None = None) -> Tensor:
        scale = self.q_THE.shape[2] ** -0.5
        return kernels.paged_attention(self.q_THE, self.pages, self.layer, self.work, scale, window)


def make_attention_case(
    dtype: torch.dtype,
    lengths: Sequence[tuple[int, int]],
    heads: tuple[int, int] = (14, 2),
    head_size: int = 64,
    page_tokens: int = 16,
    seed: int = 0,
) -> AttentionCase:
    """Sequences of (new tokens, context length); `heads` are query heads and kv heads.

    q is a view of a fused projection; layer 1 of 2 is used.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    page_counts = [-(-context // page_tokens) for _, context in lengths]
    shape = (sum(page_counts) + 2, 2, 2, num_kv_heads, page_tokens, head_size)
    pages = torch.full(shape, float("nan"), dtype=dtype)
    order = torch.randperm(shape[0], generator=generator).tolist()
    table = torch.zeros(len(lengths), max(page_counts), dtype=torch.int32)
    contiguous = []
    for row, (_, context) in enumerate(lengths):
        ids = [order.pop() for _ in range(page_counts[row])]
        table[row, : len(ids)] = torch.tensor(ids)
        kv = torch.randn(2, num_kv_heads, context, head_size, generator=generator).to(dtype)
        for token in range(context):
            pages[ids[token // page_tokens], 1, :, :, token % page_tokens] = kv[:, :, token]
        contiguous.append((kv[0], kv[1]))
    new_counts = [new for new, _ in lengths]
    fused = torch.randn(sum(new_counts), num_heads + 3, head_size, generator=generator).to(dtype)
    work = AttentionWork(
        query_starts=torch.tensor([0, *itertools.accumulate(new_counts)], dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        page_table=table,
        max_query_tokens=max(new_counts),
        max_context_tokens=max(context for _, context in lengths),
    )
    return AttentionCase(fused[:, :num_heads], pages, 1, work, contiguous)
