"""Builds an engine from its options: resolves every "auto", loads the base, sizes the pool.

The only place that knows how the parts fit together. Called by LLM and engine/child.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from loraswarm.adapters.catalog import Catalog
from loraswarm.adapters.peft import read_adapter
from loraswarm.config import EngineConfig
from loraswarm.core.client import EngineInfo
from loraswarm.engine.engine import Engine
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.policies import FirstComeFirstServed
from loraswarm.engine.scheduler import Scheduler
from loraswarm.errors import ConfigError
from loraswarm.kernels import cpu
from loraswarm.memory.geometry import PageGeometry, page_geometry
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore
from loraswarm.models.config import DecoderConfig
from loraswarm.models.families import decoder_config, read_config
from loraswarm.models.loader import checkpoint_dtype, load_decoder
from loraswarm.models.source import eos_token_ids, resolve_model

Report = Callable[[str], None]
MAX_CPU_POOL_BYTES = 4 << 30
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, report: Report = log.info) -> Engine:
    """Load the base model and everything around it; takes seconds to minutes.

    `report` gets one line per stage, and the resolved options.
    Raises   ConfigError if the model, an option or their combination cannot work.
    """
    path = resolve_model(config.model)
    raw = read_config(path)
    model_config = decoder_config(raw)
    config = _resolve(config, checkpoint_dtype(raw))
    torch.set_num_threads(config.num_threads or 1)
    cpu.set_num_threads(config.num_threads or 1)
    dtype = DTYPES[config.dtype]
    shape = model_config.shape()
    catalog = Catalog(config.adapters, shape, config.model_name)
    catalog.scan()
    report(f"loading {config.model_name} from {path} as {config.dtype}")
    device = torch.device(config.device)
    decoder = load_decoder(path, model_config, dtype, cpu, report)
    geometry = page_geometry(shape, dtype.itemsize)
    config = _size_pool(config, geometry, model_config)
    decoder.set_max_positions(config.max_model_len or 0)
    assert config.pool_bytes is not None
    num_pages = config.pool_bytes // geometry.page_bytes
    cpu.warm_up(config.dtype, lambda line: report(f"compiling {line}"))
    buffer = PageBuffer(num_pages, shape, geometry, dtype, device)
    memory = Memory.of_pages(num_pages, shape, geometry)
    scheduler = Scheduler(
        memory, FirstComeFirstServed(), config.max_num_sequences, config.max_step_tokens
    )
    report(_summary(config, num_pages, geometry))
    runner = ModelRunner(decoder, buffer, TileStore(buffer, shape), read_adapter)
    info = _info(config, path, model_config, catalog, geometry)
    return Engine(info, catalog, runner, memory, scheduler, config.seed)


def _resolve(config: EngineConfig, checkpoint: str) -> EngineConfig:
    """Fill in device, dtype and threads."""
    if config.device == "cuda":
        raise ConfigError("device 'cuda' is not supported by this version; use --device cpu")
    if config.max_step_tokens < config.max_num_sequences:
        raise ConfigError(
            f"max_step_tokens is {config.max_step_tokens} but max_num_sequences is "
            f"{config.max_num_sequences}; a step must have room for one token of each sequence"
        )
    return dataclasses.replace(
        config,
        device="cpu",
        dtype=checkpoint if config.dtype == "auto" else config.dtype,
        num_threads=config.num_threads or psutil.cpu_count(logical=False) or 1,
    )


def _size_pool(config: EngineConfig, geometry: PageGeometry, model: DecoderConfig) -> EngineConfig:
    """Fill in the pool's bytes and the context length; both must be possible together."""
    pool_bytes = config.pool_bytes
    if pool_bytes is None:
        available = psutil.virtual_memory().available
        pool_bytes = min(MAX_CPU_POOL_BYTES, int(config.memory_utilization * available))
    pool_tokens = pool_bytes // geometry.page_bytes * geometry.page_tokens
    if pool_tokens == 0:
        raise ConfigError(
            f"pool_bytes is {pool_bytes:,}; one page of this model takes {geometry.page_bytes:,}"
        )
    limit = model.max_position
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
    return dataclasses.replace(config, pool_bytes=pool_bytes, max_model_len=max_model_len)


def _info(
    config: EngineConfig,
    path: Path,
    model: DecoderConfig,
    catalog: Catalog,
    geometry: PageGeometry,
) -> EngineInfo:
    assert config.max_model_len is not None
    assert config.pool_bytes is not None
    return EngineInfo(
        model=config.model_name,
        model_path=str(path),
        max_model_len=config.max_model_len,
        vocab_size=model.vocab_size,
        end_token_ids=eos_token_ids(path),
        num_pages=config.pool_bytes // geometry.page_bytes,
        page_bytes=geometry.page_bytes,
        page_tokens=geometry.page_tokens,
        adapters=catalog.summaries(),
    )


def _summary(config: EngineConfig, num_pages: int, geometry: PageGeometry) -> str:
    options = " ".join(
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in ("model", "adapters")
    )
    return f"{options} pages={num_pages} page_bytes={geometry.page_bytes}"
