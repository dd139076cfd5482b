"""Engines that merge, stopped where a test wants them, and adapters no larger than the base.

Looks into the engine's merger and runner.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adapter_factory import save_random_adapter
from engine_factory import make_engine
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.engine import Engine
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from model_factory import save_tiny_model

RANKS = (8, 1, 17, 40, 16, 3)


def save_weak_swarm(
    path: Path, num_adapters: int, dtype: torch.dtype = torch.float32, **overrides: Any
) -> None:
    """`path`/model and `path`/adapters/a000 ... whose updates are half as large as the weights of
    attention's output and smaller elsewhere; ranks take turns."""
    save_tiny_model(path / "model", dtype=dtype, **overrides)
    shape = decoder_config(read_config(path / "model")).shape()
    for index in range(num_adapters):
        rank = RANKS[index % len(RANKS)]
        save_random_adapter(
            path / "adapters" / f"a{index:03}",
            shape,
            rank=rank,
            alpha=0.7 * rank**0.5,
            seed=index,
            std=0.1,
        )


def merging_engine(path: Path, **options: Any) -> Engine:
    """An engine whose weights merge what `engine.merger` is told, and by no policy."""
    engine = make_engine(path, **({"merge": "auto"} | options))
    engine._merge_control = None
    return engine


def key_of(engine: Engine, name: str) -> AdapterKey:
    """The content that `name` stands for, brought to host memory if need be."""
    while (key := engine.merger.holds.key_of(name)) is None:
        engine._collect()
    return key


def merge(engine: Engine, name: str, num_linears: int | None = None) -> None:
    """Merge an adapter into so many linears, or into all, and leave it at that."""
    merger = engine.merger
    merger.set_target(key_of(engine, name))
    while not merger.is_settled:
        if num_linears is not None and merger.num_merged >= num_linears:
            merger._todo, merger._making = [], None
            engine._runner.is_switching = False
            return
        engine._collect()
        merger.advance(0.0)


def shuffle_linears(engine: Engine, seed: int) -> None:
    """Merge in another order, so that another subset is merged at each number."""
    random.Random(seed).shuffle(engine.merger._places)


def weights_digest(engine: Engine) -> str:
    """Of every bit of the base."""
    digest = hashlib.sha256()
    for name, tensor in engine.decoder.weights():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merged_names(engine: Engine) -> list[str | None]:
    """By linear in the order of merging, whose copy is in use."""
    return [None if place.key is None else place.key[0] for place in engine.merger._places]


def tables(engine: Engine) -> list:
    """The tile tables of the batches to come, in a list that grows."""
    found: list = []
    prepare = engine._runner.prepare

    def recorded(step, kv_cache):
        prepared = prepare(step, kv_cache)
        found.append(prepared.batch.tiles)
        return prepared

    engine._runner.prepare = recorded
    return found


def names(count: int) -> Iterable[str]:
    return (f"a{index:03}" for index in range(count))
