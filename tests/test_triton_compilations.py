"""Kernels are compiled once for what they are specialised on, whatever batches come after.

On a device compilations are counted. Without one nothing is compiled, nor run here: what Triton
would look a kernel up by is worked out from the arguments of every launch.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from batch_factory import AdapterPool, BatchFactory, HandAdapter
from device_under_test import DEVICE
from kernel_cases import (
    FIRST_SITE,
    make_attention_case,
    make_general_case,
    make_lora_case,
    segments_of,
)
from loraswarm.engine.transfer import to_device
from loraswarm.kernels import triton as kernels
from loraswarm.kernels.triton import attention, lora
from loraswarm.kernels.triton.launch import IS_INTERPRETED
from loraswarm.kernels.triton.rows import best_tokens
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.loader import load_decoder
from loraswarm.models.source import read_config
from model_factory import VOCAB_SIZE, save_tiny_model
from tile_factory import SiteWeights

H100 = GPUTarget("cuda", 90, 32)
NUM_BATCHES = 100 if IS_INTERPRETED else 60


class Compilations:
    """How many variants of each kernel there are so far."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._keys: set[tuple] = set()
        self._binders: dict[Callable, Callable] = {}
        self._backend = make_backend(H100)

    def compiled(self, fn, **_) -> None:
        """A hook of Triton's, called after each compilation."""
        self.found[fn.name.rsplit(".", 1)[-1]] += 1

    def launched(self, kernel, *args, grid, warmup, **kwargs) -> None:
        """In place of `InterpretedFunction.run`: looks up, and does not run."""
        if kernel.fn not in self._binders:
            given = {name: value for name, value in kernel.kwargs.items() if value is not None}
            function = JITFunction(kernel.fn, **given)
            self._binders[kernel.fn] = create_function_from_signature(
                function.signature, function.params, self._backend
            )
        _, specialization, options = self._binders[kernel.fn](*args, **kwargs)
        key = kernel.fn.__name__, repr(specialization), repr(sorted(options.items()))
        if key not in self._keys:
            self._keys.add(key)
            self.found[kernel.fn.__name__] += 1


@pytest.fixture
def compilations(monkeypatch) -> Iterator[Compilations]:
    found = Compilations()
    if IS_INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction

        def run(kernel, *args, **kwargs):
            found.launched(kernel, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", run)
    else:
        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", found.compiled)
    return found


def assert_found(compilations: Compilations, expected: dict[str, int]) -> None:
    """So many variants of each kernel; on a device other tests may have compiled some before."""
    if IS_INTERPRETED:
        assert compilations.found == expected
    else:
        assert compilations.found <= Counter(expected)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def test_a_changing_integer_that_is_specialised_is_noticed(compilations):
    if not IS_INTERPRETED:
        pytest.skip("compiles on a device what is of no use there")

    @triton.jit
    def specialised(out, number):
        pass

    @triton.jit(do_not_specialize=["number"])
    def plain(out, number):
        pass

    out = torch.zeros(64)
    for number in (1, 2, 3, 16, 32):
        specialised[(1,)](out, number)
        plain[(1,)](out, number)
    assert compilations.found == {"specialised": 3, "plain": 1}
    plain[(1,)](out[1:], 5)
    assert compilations.found["plain"] == 2


def test_lora_kernels_serve_any_rows_tiles_ranks_and_segments(compilations):
    chance = random.Random(0)
    for seed in range(NUM_BATCHES):
        pattern = chance.choice(("distinct", "uniform", "zipf", "identical", "skewed"))
        segments = segments_of(pattern, chance.choice((1, 2, 3, 7, 16, 33, 133)), seed)
        if chance.random() < 0.5:  # long enough for prefill, of one tile a part or of more
            others = segments if chance.random() < 0.5 else []
            segments = [*others, (f"adapter{chance.choice((0, 1, 6))}", chance.randrange(257, 300))]
        make = chance.choice((make_lora_case, make_general_case))
        case = make(torch.bfloat16, segments, 64, (48, 16, 112), seed=seed)
        x_TI, y_TO, pool = on_device(case.x_TI, case.y_TO, case.pool)
        h_QTR = lora.lora_shrink(x_TI, pool, case.tiles, FIRST_SITE, 3)
        lora.lora_expand_(y_TO, h_QTR, pool, case.tiles, FIRST_SITE, case.out_bounds)
        wide = torch.zeros(len(y_TO), 2 * y_TO.shape[1], dtype=y_TO.dtype, device=DEVICE)
        part = wide[:, : y_TO.shape[1]]
        lora.lora_expand_(part, h_QTR, pool, case.tiles, FIRST_SITE, case.out_bounds)
    # Every table here has two tiles at least. Shrink: cut for decode, or for prefill with 2 or 4 at
    # a time. Expand: 2 or 4 at a time or, with a v, one; for prefill 2 or, with a v, one.
    assert_found(compilations, {"shrink_kernel": 3, "expand_kernel": 5})


def test_attention_serves_any_lengths_and_page_tables(compilations):
    chance = random.Random(1)
    for seed in range(NUM_BATCHES):
        lengths = []
        for _ in range(chance.choice((1, 2, 3, 7, 16))):
            new = 1 if chance.random() < 0.6 else chance.randrange(2, 40)
            lengths.append((new, new + chance.randrange(500)))
        case = make_attention_case(torch.bfloat16, lengths, (4, 2), 16, 16, seed)
        work = case.work
        names = ("query_starts", "context_lens", "page_table")
        tensors = on_device(*(getattr(work, name) for name in names))
        if chance.random() < 0.5:  # views of one tensor, as a step's are
            tensors = [torch.cat([tensor.new_zeros(tensor.shape), tensor]) for tensor in tensors]
            tensors = [tensor[len(tensor) // 2 :] for tensor in tensors]
        work = dataclasses.replace(work, **dict(zip(names, tensors, strict=True)))
        q_THE, pages = on_device(case.q_THE, case.pages)
        window = chance.choice((None, 1, 16, 50))
        attention.paged_attention(q_THE, pages, 1, work, 0.25, window)
    # Prefill: few rows a block or many. Decode: with splits or without.
    assert_found(compilations, {"prefill_kernel": 2, "decode_kernel": 2, "join_kernel": 1})


@torch.inference_mode()
def test_steps_of_a_model_compile_no_more_after_the_first_ones(compilations, tmp_path):
    path = save_tiny_model(tmp_path, "qwen3-biased")
    dtype = torch.bfloat16
    decoder = load_decoder(path, decoder_config(read_config(path)), Backend(kernels, dtype, DEVICE))
    chance, generator = random.Random(2), torch.Generator().manual_seed(2)
    adapters = {
        name: HandAdapter(_sites(decoder, rank, generator))
        for name, rank in (("a", 3), ("b", 16), ("c", 40))
    }
    pool = AdapterPool(adapters, decoder.shape, dtype)
    pool.pool = pool.pool.to(DEVICE)

    def step(lengths: list[int], contexts: list[int]) -> None:
        factory = BatchFactory(decoder.shape, dtype, num_pages=80)
        factory.pages = factory.pages.to(DEVICE)
        for index, context in enumerate(contexts):
            factory.batch({f"s{index}": [1] * context})
        chunks = {f"s{index}": [2] * length for index, length in enumerate(lengths)}
        batch = factory.batch(chunks, last_rows_only=True)
        names = sorted(chance.choices((None, "a", "b", "c"), k=len(lengths)), key=str)
        if any(names):
            batch = pool.adapt(batch, list(zip(names, lengths, strict=True)))
        logits_ZV = decoder.forward(to_device(batch, DEVICE))
        assert logits_ZV.shape == (len(lengths), VOCAB_SIZE)
        best_tokens(logits_ZV)

    def steps(count: int) -> None:
        for _ in range(count):
            num = chance.choice((1, 2, 3, 5, 8))
            decodes = chance.random() < 0.5
            lengths = [1 if decodes else chance.randrange(1, 30) for _ in range(num)]
            step(lengths, [chance.randrange(1, 90) for _ in range(num)])

    steps(NUM_BATCHES // 2)
    before = compilations.found.copy()
    steps(NUM_BATCHES // 2)
    assert compilations.found == before


def _sites(decoder, rank: int, generator: torch.Generator) -> dict[int, SiteWeights]:
    sites = {}
    for site in range(decoder.shape.num_linears):
        in_size, out_size = decoder.shape.site_sizes(site)
        a = torch.randn(rank, in_size, generator=generator) * in_size**-0.5
        sites[site] = SiteWeights(a, torch.randn(out_size, rank, generator=generator), scale=0.5)
    return sites
