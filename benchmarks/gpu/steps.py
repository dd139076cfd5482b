"""Steps of a model of Llama-3-8B's sizes with random weights: decode as graphs, and prefill.

Weights, K and V and adapters are made on the device. Used by run.
Legend: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from ceilings import Ceilings
from swarm import Sites
from timing import step_s
from torch import Tensor

from loraswarm.engine.graphs import CudaRecorder, DecodeGraphs
from loraswarm.engine.transfer import to_device
from loraswarm.kernels import AttentionWork, TileTable, triton
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.models.batch import Batch
from loraswarm.models.config import DecoderConfig
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.backend import Backend

BATCHES = (1, 8, 32, 64, 128)
CONTEXT = 1024
PREFILL_TOKENS = 2048
RANK = 16
MIXED_RANKS = (8, 16, 32, 64)
DTYPE = torch.bfloat16
LLAMA_3_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    windows=(None,) * 32,
)
CASES: Mapping[str, int | None] = {
    "base": 0,
    "1 adapter": 1,
    "8 distinct": 8,
    "32 distinct": 32,
    "all distinct": None,
    "all distinct, mixed ranks": None,
}


@dataclass
class Machine:
    """A decoder, pages for the largest batch, and adapters behind them in the pool."""

    device: torch.device
    config: DecoderConfig
    decoder: Decoder = field(init=False)
    buffer: PageBuffer = field(init=False)
    graphs: DecodeGraphs = field(init=False)
    sites: Mapping[str, Sites] = field(init=False)

    def __post_init__(self) -> None:
        backend = Backend(triton, DTYPE, self.device)
        self.decoder = Decoder(backend, self.config)
        for _, tensor in self.decoder.weights():
            tensor.normal_(std=0.02)
        for weight in self.decoder.matrices():
            weight.pack_(triton)
        shape = self.config.shape()
        geometry = page_geometry(shape, DTYPE.itemsize)
        self.pages_each = -(-(CONTEXT + 1) // geometry.page_tokens)
        num_prefill_pages = -(-PREFILL_TOKENS // geometry.page_tokens)
        num_kv_pages = max(max(BATCHES) * self.pages_each, num_prefill_pages)
        sizes = [shape.site_sizes(site) for site in range(shape.num_linears)]
        sizes += [(0, 0)] * (shape.num_sites() - shape.num_linears)  # nothing there
        first = num_kv_pages * geometry.page_bytes // DTYPE.itemsize
        plain = Sites(sizes, first)
        for adapter in range(max(BATCHES)):
            plain.add(adapter, RANK)
        mixed = Sites(sizes, plain.end)
        for adapter in range(max(BATCHES)):
            mixed.add(adapter, MIXED_RANKS[adapter % len(MIXED_RANKS)])
        num_pages = -(-mixed.end * DTYPE.itemsize // geometry.page_bytes)
        self.buffer = PageBuffer(num_pages, shape, geometry, DTYPE, self.device)
        self.buffer.pool.normal_(std=0.02)
        self.sites = {"plain": plain, "mixed": mixed}
        self.page_tokens = geometry.page_tokens
        self.graphs = DecodeGraphs(
            self.decoder,
            CudaRecorder(self.device),
            self.pages_each,
            self.page_tokens,
            max(BATCHES),
        )

    def batch(self, counts: Sequence[int], context: int, tiles: TileTable | None) -> Batch:
        """New tokens of each sequence, the last of `context`; logits of each one's last."""
        num_sequences, num_tokens = len(counts), sum(counts)
        starts = np.concatenate(([0], np.cumsum(counts)))
        positions = np.concatenate([np.arange(context - count, context) for count in counts])
        owner = np.repeat(np.arange(num_sequences), counts)
        used = -(-context // self.page_tokens)
        pages_each = max(self.pages_each, used)
        pages = owner * pages_each + positions // self.page_tokens
        table = np.arange(num_sequences * pages_each).reshape(num_sequences, -1)
        generator = torch.Generator().manual_seed(0)
        return Batch(
            token_ids=torch.randint(0, self.config.vocab_size, (num_tokens,), generator=generator),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(pages * self.page_tokens + positions % self.page_tokens),
            logit_rows=torch.from_numpy(starts[1:] - 1),
            attention=AttentionWork(
                torch.from_numpy(starts.astype(np.int32)),
                torch.full((num_sequences,), context, dtype=torch.int32),
                torch.from_numpy(np.ascontiguousarray(table[:, :used]).astype(np.int32)),
                max(counts),
                context,
            ),
            tiles=tiles,
            head_tiles=tiles,
            pages=self.buffer.pages,
            pool=self.buffer.pool,
        )

    def table(self, kind: str, counts: Sequence[int], num_adapters: int) -> TileTable | None:
        """A table in which as many adapters take turns; tokens of one are adjacent."""
        if num_adapters == 0:
            return None
        shares = np.array_split(np.array(counts), num_adapters)
        return self.sites[kind].table(
            [(index, int(part.sum())) for index, part in enumerate(shares)]
        )


def measure_decode(machine: Machine, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """A row for every batch and case: milliseconds a step, over base, and over the bound.

    `step_ms` is of steps that are launched before the last one's tokens have come, as an engine
    does; `waited_ms` of steps that wait for them. `bound_over_base` is what the bytes of the
    adapters add to the base's.
    """
    weight_bytes = machine.decoder.num_bytes() - machine.decoder.embedding_VD.nbytes
    kv_bytes = 2 * machine.config.shape().kv_elements_per_token() * CONTEXT
    for batch in BATCHES:
        base_ms, base_bytes = 0.0, weight_bytes + batch * kv_bytes
        for name, wanted in CASES.items():
            num_adapters = batch if wanted is None else wanted
            kind = "mixed" if "mixed" in name else "plain"
            if num_adapters > batch:
                continue
            counts = [1] * batch
            host = machine.batch(counts, CONTEXT, machine.table(kind, counts, num_adapters))
            step_ms = step_s(_replayed(machine, host, looks_ahead=True)) * 1e3
            waited_ms = step_s(_replayed(machine, host, looks_ahead=False)) * 1e3
            base_ms = step_ms if num_adapters == 0 else base_ms
            adapter_bytes = sum(machine.sites[kind].tile_bytes(i) for i in range(num_adapters))
            num_bytes = base_bytes + adapter_bytes
            yield {
                "batch": batch,
                "case": name,
                "step_ms": step_ms,
                "waited_ms": waited_ms,
                "tokens_per_s": batch / step_ms * 1e3,
                "over_base": step_ms / base_ms - 1,
                "bound_over_base": adapter_bytes / base_bytes,
                "bytes": num_bytes,
                "share_of_bound": ceilings.bytes_us(num_bytes) / 1e3 / step_ms,
            }


def measure_prefill(machine: Machine, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One prompt of PREFILL_TOKENS: base, and one adapter of each of MIXED_RANKS."""
    shape, sites = machine.config.shape(), machine.sites["mixed"]
    sizes = [shape.site_sizes(site) for site in range(shape.num_linears)]
    base_flops = 2 * sum(i * o for i, o in sizes) * PREFILL_TOKENS
    base_ms = 0.0
    for adapter in (None, *range(len(MIXED_RANKS))):
        tiles = None if adapter is None else sites.table([(adapter, PREFILL_TOKENS)])
        host = machine.batch([PREFILL_TOKENS], PREFILL_TOKENS, tiles)
        host = replace(host, head_tiles=None)  # no adapter here has tiles there
        step_ms = step_s(_prefilled(machine, host), num_runs=5) * 1e3
        base_ms = step_ms if adapter is None else base_ms
        # An element has two bytes, and two operations for each token.
        added_flops = 0 if adapter is None else sites.tile_bytes(adapter) * PREFILL_TOKENS
        bound_ms = (base_flops + added_flops) / ceilings.tflop_per_s / 1e9
        yield {
            "case": "base" if adapter is None else f"1 adapter, r {MIXED_RANKS[adapter]}",
            "step_ms": step_ms,
            "tokens_per_s": PREFILL_TOKENS / step_ms * 1e3,
            "over_base": step_ms / base_ms - 1,
            "bound_over_base": added_flops / base_flops,
            "share_of_bound": bound_ms / step_ms,
        }


def _replayed(machine: Machine, host: Batch, looks_ahead: bool) -> Callable[[], None]:
    """Decode steps, each with the tokens of the one before it; waits for them, or with
    `looks_ahead` for those of the step before that."""
    drawn_ids: Tensor | None = None
    before: torch.cuda.Event | None = None

    @torch.inference_mode()
    def run() -> None:
        nonlocal drawn_ids, before
        logits_ZV = machine.graphs.try_run(host, drawn_ids=drawn_ids)
        assert logits_ZV is not None, "a decode step was not captured"
        drawn_ids = logits_ZV.argmax(dim=-1)
        done = torch.cuda.Event()
        done.record()
        (before if looks_ahead and before is not None else done).synchronize()
        before = done

    return run


def _prefilled(machine: Machine, host: Batch) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        machine.decoder.forward(to_device(host, machine.device)).argmax(dim=-1)

    return run
