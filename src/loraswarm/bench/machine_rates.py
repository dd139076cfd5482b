"""How fast this machine reads memory, copies it and multiplies by a model's own matrices.

The best of several tries: a bound that a step may come near to, not an average. Imports torch
inside, so that it may be imported by who only wants to be fast at starting. Called by
bench/calibrate, in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from loraswarm.core.cost_model import GemmRate, MachineRates

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.models.decoder import Decoder
    from loraswarm.models.layers.weight import Weight

Clock = Callable[[], float]
NUM_TRIES = 5
ARRAY_BYTES = 512 << 20  # more than caches hold
GEMM_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class Matrices(NamedTuple):
    """Matrices of one kind, each of `num_weights` elements."""

    name: str
    weights: list[Weight]
    num_weights: int


def machine_rates(
    decoder: Decoder,
    clock: Clock,
    rows: Sequence[int] = GEMM_ROWS,
    array_bytes: int = ARRAY_BYTES,
) -> MachineRates:
    """Takes seconds to a minute, and twice `array_bytes` of memory."""
    read_bytes_per_s, copy_bytes_per_s = _bandwidths(clock, array_bytes)
    return MachineRates(
        read_bytes_per_s=read_bytes_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        gemm=tuple(_gemm_rates(decoder, clock, rows)),
    )


def _bandwidths(clock: Clock, num_bytes: int) -> tuple[float, float]:
    """Bytes per second of a sum over an array, and of a copy of it (each byte counts once)."""
    import torch

    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    read_s = _best_s(clock, source.sum)
    copy_s = _best_s(clock, lambda: target.copy_(source))
    return source.nbytes / read_s, source.nbytes / copy_s


def _gemm_rates(decoder: Decoder, clock: Clock, rows: Sequence[int]) -> list[GemmRate]:
    """All layers' matrices of a kind in turn, so that none is in a cache unless all are."""
    import torch

    found = []
    generator = torch.Generator().manual_seed(0)

    def inputs(width: int) -> list[Tensor]:
        sizes = [(num_rows, width) for num_rows in rows]
        dtype = decoder.dtype
        return [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    for index, name in enumerate(LINEARS):
        linears = [layer.linears()[index] for layer in decoder.layers]
        weights = [linear.weight for linear in linears]
        in_size = decoder.shape.target_sizes[linears[0].first_site][0]
        num_weights = linears[0].out_bounds[-1] * in_size
        found += _rates_of(Matrices(name, weights, num_weights), inputs(in_size), clock)
    hidden_size, vocab_size = decoder.shape.hidden_size, decoder.shape.vocab_size
    head = Matrices("lm_head", [decoder.lm_head], hidden_size * vocab_size)
    return found + _rates_of(head, inputs(hidden_size), clock)


def _rates_of(matrices: Matrices, inputs: list[Tensor], clock: Clock) -> list[GemmRate]:
    import torch

    from loraswarm.kernels import cpu
    from loraswarm.models.layers.weight import multiply

    @torch.inference_mode()
    def products(x_TI: Tensor) -> None:
        with cpu.recording():
            for weight in matrices.weights:
                multiply(cpu, weight, x_TI)

    found = []
    for x_TI in inputs:
        seconds = _best_s(clock, partial(products, x_TI))
        num_operations = 2 * x_TI.shape[0] * matrices.num_weights * len(matrices.weights)
        rate = num_operations / seconds
        found.append(GemmRate(linear=matrices.name, num_rows=x_TI.shape[0], operations_per_s=rate))
    return found


def _best_s(clock: Clock, function: Callable[[], object]) -> float:
    """Seconds of the fastest of NUM_TRIES runs, after one that does not count."""
    function()
    times = []
    for _ in range(NUM_TRIES):
        begin_s = clock()
        function()
        times.append(clock() - begin_s)
    return min(times)
