"""How a device's memory is shared out once the weights are loaded: pages, and merged weights.

Raises what cannot be as a ConfigError that names the option. Called by engine/setup.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import psutil
import torch

from loraswarm.config import EngineConfig
from loraswarm.engine.devices import default_pool_bytes, free_bytes, memory_report
from loraswarm.engine.headroom import graph_bytes, step_bytes
from loraswarm.engine.merge_places import linears_in_order
from loraswarm.engine.step_budget import MAX_SCORED_TOKENS
from loraswarm.errors import ConfigError
from loraswarm.memory.geometry import PageGeometry
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.backend import Backend

MAX_MERGE_SHARE = 0.5
"""Of a device's free memory, what merged copies may take from the pool."""


def size_memory(
    config: EngineConfig, geometry: PageGeometry, decoder: Decoder, backend: Backend
) -> EngineConfig:
    """Fill in the bytes of the pool and, unless `merge` is off, of merged copies, and the context
    length; all must be possible together."""
    limit = decoder.config.max_position
    pool_bytes, merge_bytes = _share_bytes(config, geometry, decoder, backend)
    pool_tokens = pool_bytes // geometry.page_bytes * geometry.page_tokens
    if pool_tokens == 0:
        raise ConfigError(
            f"pool_bytes is {pool_bytes:,}; one page of this model takes {geometry.page_bytes:,}"
            f" ({memory_report(backend.device)})"
        )
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}; this model was made for {limit:,} tokens"
        )
    if config.max_model_len is not None and config.max_model_len > pool_tokens:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}; the pool of {pool_bytes:,} bytes holds "
            f"{pool_tokens:,} tokens (--pool-bytes)"
        )
    max_model_len = config.max_model_len or min(limit, pool_tokens)
    return dataclasses.replace(
        config, pool_bytes=pool_bytes, max_model_len=max_model_len, merge_bytes=merge_bytes
    )


def _share_bytes(
    config: EngineConfig, geometry: PageGeometry, decoder: Decoder, backend: Backend
) -> tuple[int, int | None]:
    """Bytes of the pool and of merged copies; None where nothing is merged.

    On a CUDA device the copies are taken from what would be the pool's, on the CPU from what
    remains beside it.
    """
    pool_bytes, device = config.pool_bytes, backend.device
    taken = _taken_bytes(config, geometry, decoder, backend)
    if pool_bytes is not None and device.type == "cuda":
        _require_fit(pool_bytes, taken.step, config, device)
    if pool_bytes is not None and config.merge == "off":
        return pool_bytes, None
    left_bytes = default_pool_bytes(device, config.memory_utilization, sum(taken))
    if pool_bytes is None and left_bytes < geometry.page_bytes:
        raise ConfigError(
            f"memory_utilization {config.memory_utilization} leaves {left_bytes:,} bytes to the "
            f"page pool; one page of this model takes {geometry.page_bytes:,} "
            f"({memory_report(device)}, weights taken; steps take {sum(taken):,})"
        )
    if config.merge == "off":
        return left_bytes, None
    linear_bytes = sum(linear.weight.nbytes for linear in linears_in_order(decoder))
    wanted = min(linear_bytes, config.merge_bytes or linear_bytes)
    if pool_bytes is None and device.type == "cuda":
        copy_bytes = min(wanted, int(MAX_MERGE_SHARE * left_bytes))
        return left_bytes - copy_bytes, copy_bytes
    pool_bytes = left_bytes if pool_bytes is None else pool_bytes
    if device.type != "cuda":
        left_bytes = int(config.memory_utilization * psutil.virtual_memory().available)
    if left_bytes <= pool_bytes:
        raise ConfigError(
            f"merge is {config.merge!r}; the pool's {pool_bytes:,} bytes leave nothing for merged "
            f"weights ({memory_report(device)}); lower pool_bytes, or leave merge off"
        )
    return pool_bytes, min(wanted, left_bytes - pool_bytes)


class _Taken(NamedTuple):
    """Bytes of a device that are neither weights nor pages."""

    step: int
    graphs: int


def _taken_bytes(
    config: EngineConfig, geometry: PageGeometry, decoder: Decoder, backend: Backend
) -> _Taken:
    """What steps and their graphs take. Raises ConfigError if there is not so much."""
    before = memory_report(backend.device)
    num_rows = config.max_num_sequences
    max_tokens = config.max_model_len or decoder.config.max_position
    try:
        return _Taken(
            step_bytes(
                decoder, backend, geometry, config.max_step_tokens, num_rows + MAX_SCORED_TOKENS
            ),
            graph_bytes(decoder, backend, geometry, num_rows, max_tokens),
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {config.max_step_tokens:,} tokens does not fit beside the weights, which "
            f"take {decoder.num_bytes():,} bytes: {before}; lower max_step_tokens"
        ) from error


def _require_fit(
    pool_bytes: int, num_step_bytes: int, config: EngineConfig, device: torch.device
) -> None:
    """Refuse a pool beside which a step would fail."""
    if pool_bytes + num_step_bytes > free_bytes(device):
        raise ConfigError(
            f"pool_bytes is {pool_bytes:,} and a step of {config.max_step_tokens:,} tokens takes "
            f"{num_step_bytes:,} beside it: {memory_report(device)}, weights taken; lower "
            "pool_bytes or max_step_tokens"
        )
