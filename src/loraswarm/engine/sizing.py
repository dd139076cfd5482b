"""How a device's memory is shared out once the weights are loaded: pages, and merged weights.

Raises what cannot be as a ConfigError that names the option. Called by engine/setup.
"""

from __future__ import annotations

import dataclasses

import psutil
import torch

from loraswarm.config import EngineConfig
from loraswarm.engine.devices import default_pool_bytes, memory_report
from loraswarm.engine.headroom import graph_bytes, step_bytes
from loraswarm.engine.merge_places import linears_in_order
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
    is_merging = config.merge != "off"
    if pool_bytes is not None and not is_merging:
        return pool_bytes, None
    free_bytes = _free_bytes(config, geometry, decoder, backend)
    if not is_merging:
        return free_bytes, None
    linear_bytes = sum(linear.weight.nbytes for linear in linears_in_order(decoder))
    wanted = min(linear_bytes, config.merge_bytes or linear_bytes)
    if pool_bytes is None and device.type == "cuda":
        copy_bytes = min(wanted, int(MAX_MERGE_SHARE * free_bytes))
        return free_bytes - copy_bytes, copy_bytes
    pool_bytes = free_bytes if pool_bytes is None else pool_bytes
    if device.type != "cuda":
        free_bytes = int(config.memory_utilization * psutil.virtual_memory().available)
    return pool_bytes, min(wanted, max(0, free_bytes - pool_bytes))


def _free_bytes(
    config: EngineConfig, geometry: PageGeometry, decoder: Decoder, backend: Backend
) -> int:
    """What `memory_utilization` leaves to the pool."""
    sizes = config.max_step_tokens, config.max_num_sequences
    try:
        num_bytes = step_bytes(decoder, backend, geometry, *sizes)
        num_bytes += graph_bytes(decoder, backend, geometry, config.max_num_sequences)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {config.max_step_tokens} tokens does not fit beside the weights:"
            f" {memory_report(backend.device)}; lower max_step_tokens"
        ) from error
    return default_pool_bytes(backend.device, config.memory_utilization, num_bytes)
