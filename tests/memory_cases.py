"""Made-up adapters of every kind that memory keeps: descriptions for index tests, and tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from loraswarm.adapters.adapter import (
    EMBEDDING_A,
    Adapter,
    AdapterInfo,
    ModuleInfo,
    ModuleWeights,
    OverlayInfo,
    SharedMatrix,
)
from loraswarm.core.base_shape import EMBEDDING, FINAL_NORM, LM_HEAD, TARGETS, BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.memory import Memory

QWEN_SHAPE = BaseShape(
    num_layers=24,
    num_kv_heads=2,
    head_size=64,
    vocab_size=151_936,
    target_sizes=(
        (896, 896),
        (896, 128),
        (896, 128),
        (896, 896),
        (896, 4864),
        (896, 4864),
        (4864, 896),
    ),
)
LLAMA_SHAPE = BaseShape(
    num_layers=32,
    num_kv_heads=32,
    head_size=128,
    vocab_size=32_000,
    target_sizes=((4096, 4096),) * 4 + ((4096, 11008), (4096, 11008), (11008, 4096)),
)
QUERY_AND_VALUE = (0, 2)


def describe(
    name: str, modules: list[ModuleInfo], overlays: tuple[OverlayInfo, ...] = ()
) -> AdapterInfo:
    """An adapter with these modules; nothing is on disk."""
    return AdapterInfo(
        name=name,
        path=Path("nowhere"),
        digest="0",
        method="any",
        modules=tuple(modules),
        num_bytes=0,
        overlays=overlays,
    )


def lora(name: str, shape: BaseShape, rank: int, scale: float = 1.0) -> AdapterInfo:
    """Plain LoRA of one rank on every linear."""
    return describe(name, [ModuleInfo(site, rank, scale) for site in range(shape.num_linears)])


def shared_pair(shape: BaseShape, rank: int, label: str, out: int = 0) -> tuple[SharedMatrix, ...]:
    """A and Bt as VeRA has them: as wide as the widest linear, Bt at least `out`."""
    widest_in = max(in_size for in_size, _ in shape.target_sizes)
    widest_out = max(out, max(out_size for _, out_size in shape.target_sizes))
    return (
        SharedMatrix(f"a-{label}", rank, widest_in),
        SharedMatrix(f"bt-{label}", rank, widest_out),
    )


def vera(
    name: str,
    shape: BaseShape,
    rank: int,
    targets: tuple[int, ...] = tuple(range(len(TARGETS))),
    label: str = "vera",
) -> AdapterInfo:
    """VeRA: u and v of each module, A and Bt shared with every adapter of the same label."""
    a, bt = shared_pair(shape, rank, label)
    sites = [
        layer * len(TARGETS) + target for layer in range(shape.num_layers) for target in targets
    ]
    return describe(name, [ModuleInfo(site, rank, 1.0, ("u", "v"), a, bt) for site in sites])


def kinds(shape: BaseShape) -> dict[str, AdapterInfo]:
    """One adapter of every kind, by its name."""
    head, embedding = shape.head_site, shape.embedding_site
    a, bt = shared_pair(shape, 21, "head", shape.vocab_size)
    embedding_a = OverlayInfo((EMBEDDING_A,), shape.vocab_size, 5)
    norms = [OverlayInfo((path,), 1, size) for path, size in shape.norm_sizes().items()]
    table = OverlayInfo((EMBEDDING, LM_HEAD), shape.vocab_size, shape.hidden_size)
    some_rows = OverlayInfo((EMBEDDING,), 3, shape.hidden_size, (1, 7, 133))
    mixed = [ModuleInfo(0, 3, 0.5), ModuleInfo(4, 33, 2.0), ModuleInfo(13, 16, 1.5)]
    adapters = [
        lora("lora", shape, 5),
        lora("wide", shape, 40),
        describe("mixed", mixed),
        vera("vera", shape, 24),
        vera("vera-other", shape, 24),
        vera("vera-qv", shape, 24, QUERY_AND_VALUE),
        vera("vera-apart", shape, 7, QUERY_AND_VALUE, "apart"),
        describe("tied", [ModuleInfo(3, 21, 1.0, ("u",), a, None)]),
        describe("gains", [ModuleInfo(2, 4, 1.0, ("g",)), ModuleInfo(5, 20, 1.0, ("g", "c"))]),
        describe("ia3", [ModuleInfo(1, 0, 1.0, ("g",)), ModuleInfo(8, 0, 1.0, ("c",))]),
        describe("head", [ModuleInfo(head, 18, 0.25, ("u", "v", "g", "c"))]),
        describe(
            "vera-head",
            [ModuleInfo(site, 21, 1.0, ("u", "v"), a, bt) for site in (6, head)],
        ),
        describe("embedding", [ModuleInfo(embedding, 5, 3.0, ("u",))], (embedding_a,)),
        describe("norms", [], tuple(norms)),
        describe("table", [ModuleInfo(1, 2, 1.0)], (table,)),
        describe("rows", [], (some_rows, OverlayInfo((FINAL_NORM,), 1, shape.hidden_size))),
    ]
    return {adapter.name: adapter for adapter in adapters}


def random_adapter(info: AdapterInfo, shape: BaseShape, dtype: torch.dtype) -> Adapter:
    """Tensors for a description; a shared matrix has the same values wherever its digest is."""
    modules = []
    for module in info.modules:
        in_size, out_size = shape.site_sizes(module.site)
        owns_a = module.rank and not module.shared_a and module.site != shape.embedding_site
        owns_bt = module.rank and not module.shared_bt
        sizes = {"u": module.rank, "v": out_size, "g": out_size, "c": out_size}
        weights = ModuleWeights(
            info=module,
            a_RI=torch.randn(module.rank, in_size).to(dtype) if owns_a else None,
            bt_RO=torch.randn(module.rank, out_size).to(dtype) if owns_bt else None,
            vectors={name: torch.randn(sizes[name]) for name in module.vectors},
        )
        modules.append(weights)
    overlays = tuple(torch.randn(each.num_rows, each.width).to(dtype) for each in info.overlays)
    shared = {each.digest: shared_values(each, dtype) for each in info.shared_matrices()}
    return Adapter(info, tuple(modules), overlays, shared)


def shared_values(matrix: SharedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The values that a digest stands for."""
    generator = torch.Generator().manual_seed(sum(matrix.digest.encode()))
    return torch.randn(matrix.num_rows, matrix.width, generator=generator).to(dtype)


def written(memory: Memory, info: AdapterInfo) -> AdapterLoad | None:
    """Bring an adapter into pages as if its bytes were copied, and leave it idle."""
    load, _ = memory.pin_adapter(info)
    if load is not None:
        memory.adapters.finish_load(info.key)
    memory.adapters.unpin(info.key)
    return load


def evict_all(memory: Memory) -> list[AdapterKey]:
    """Evict what may leave; returns the adapters that left."""
    num_leaving = memory.prefixes.num_idle_pages + memory.adapters.num_idle_pages()
    evicted = memory.make_room(memory.pool.num_free + num_leaving)
    assert evicted is not None
    return evicted
