"""Builds an engine from its options: resolves every "auto", loads the base, sizes the pool.

The only place that knows how the parts fit together. Called by LLM and engine/child.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from loraswarm.adapters.catalog import Catalog
from loraswarm.adapters.describing import describe_entries
from loraswarm.adapters.stores import open_store
from loraswarm.config import Dtype, EngineConfig
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.client import EngineInfo
from loraswarm.core.cost_model import CostFigures
from loraswarm.engine.devices import load_kernels, memory_report, resolve_device, set_threads
from loraswarm.engine.engine import Engine
from loraswarm.engine.loader import Loader, ThreadLoader
from loraswarm.engine.loader_jobs import JobFailed, ScanDone, ScanJob
from loraswarm.engine.loader_process import ProcessLoader
from loraswarm.engine.loader_worker import LoadWorker, WorkerSpec
from loraswarm.engine.merge_holds import MergeHolds
from loraswarm.engine.merge_setup import (
    check_options,
    merge_at_start,
    merge_facts,
    merge_policy,
    resolve_merge,
)
from loraswarm.engine.merging import Merger
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.parts import EngineParts
from loraswarm.engine.policies import FirstComeFirstServed
from loraswarm.engine.residency import Residency
from loraswarm.engine.scheduler import Scheduler, StepLimits
from loraswarm.engine.sizing import size_memory
from loraswarm.engine.wakeup import Wakeup, wait_readable
from loraswarm.errors import ConfigError
from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import EvictionOrder
from loraswarm.memory.geometry import PageGeometry, page_geometry
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.memory import Memory, MemoryOptions
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.page_copier import PageCopier
from loraswarm.memory.tile_store import TileStore
from loraswarm.models.config import DecoderConfig
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.loader import checkpoint_dtype, load_decoder
from loraswarm.models.quantization import Quantization, quantization_of, without_quantization
from loraswarm.models.quantized.loading import load_quantized_decoder
from loraswarm.models.source import eos_token_ids, read_config, resolve_model

if TYPE_CHECKING:
    from loraswarm.engine.graphs import DecodeGraphs

Report = Callable[[str], None]
MAX_HOST_CACHE_BYTES = 4 << 30
HOST_CACHE_SHARE = 0.2
DESCRIBING_S = 1.0
SECOND_LOOK_S = 0.55
FIRST_SCAN = -1
DTYPES: dict[torch.dtype, Dtype] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}
log = logging.getLogger(__name__)


def build_engine(
    config: EngineConfig, report: Report = log.info, has_loader_process: bool = False
) -> Engine:
    """Load the base model and everything around it; takes seconds to minutes.

    `report` gets one line per stage, and the resolved options. Adapters are loaded by threads of
    this process, or by a process of their own, which never keeps a step waiting.
    Raises   ConfigError if the model, an option or their combination cannot work.
    """
    path = resolve_model(config.model)
    raw = read_config(path)
    quantization = quantization_of(raw, config.quantize)
    model_config = decoder_config(without_quantization(raw))
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else checkpoint_dtype(path, raw)
    for root in config.adapters:
        open_store(root)
    if config.host_cache_dir is not None:
        _make_directory(config.host_cache_dir)
    config = _resolve(config, dtype)
    figures = None if config.cost_model is None else CostFigures.read(config.cost_model)
    spec = _worker_spec(config, path, model_config.shape())
    loader = _start_loader(spec, has_loader_process)
    try:
        return _build(config, loader, Model(path, model_config, quantization, figures), report)
    except BaseException:
        loader.close()
        raise


class Model(NamedTuple):
    """The base's directory, its sizes, how its matrices are kept as integers, if they are, and
    what it was measured to cost, if it was."""

    path: Path
    config: DecoderConfig
    quantization: Quantization | None
    figures: CostFigures | None


def _build(config: EngineConfig, loader: Loader, model: Model, report: Report) -> Engine:
    path, model_config, _, figures = model
    check_options(config)
    dtype = getattr(torch, config.dtype)
    loader.submit(ScanJob(FIRST_SCAN))
    report(f"loading model={config.model_name} path={path} dtype={config.dtype}")
    device = resolve_device(config.device)
    backend = Backend(load_kernels(device), dtype, device)
    decoder = _load(model, backend, report)
    backend.kernels.warm_up(config.dtype, lambda line: report(f"kernel {line}"))
    geometry = page_geometry(model_config.shape(), dtype.itemsize)
    config = size_memory(resolve_merge(config, decoder, report), geometry, decoder, backend)
    info = _info(config, path, decoder, geometry)
    unknown = [token_id for token_id in eos_token_ids(path) if token_id >= info.vocab_size]
    if unknown:
        report(f"ignored end_token_ids={unknown} vocab_size={info.vocab_size}")
    report(_summary(config, info))
    if figures is not None:
        _report_differences(figures, config, info, report)
    catalog = Catalog(config.model_name)
    failures = _fill(catalog, loader, model_config.shape(), report)
    base = Base(decoder, backend, report)
    adapters = Adapters(catalog, loader, failures)
    engine = _assemble(config, info, adapters, base, CostModel(figures))
    try:
        merge_at_start(engine, config, report)
    except BaseException:
        engine.close()
        raise
    policy = merge_policy(config, figures, engine.merger)
    if policy is not None:
        engine.merge_by(policy, merge_facts(config, catalog, model_config.shape(), geometry))
    return engine


def _load(model: Model, backend: Backend, report: Report) -> Decoder:
    """The base with its weights. Raises ConfigError if it does not fit the device's memory."""
    path, config, quantization, _ = model
    if quantization is not None and backend.device.type != "cpu":
        raise ConfigError(
            f"{path} would be served as integers, which is done on the CPU only; use --device cpu"
        )
    before = memory_report(backend.device)
    try:
        if quantization is not None:
            return load_quantized_decoder(path, config, backend, quantization, report)
        return load_decoder(path, config, backend, report)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{path} does not fit: in {backend.dtype} it takes {_weight_bytes(config, backend):,} "
            f"bytes, and {before}; use a smaller model or --dtype"
        ) from error


def _weight_bytes(config: DecoderConfig, backend: Backend) -> int:
    """What the base's weights take, by a model whose tensors have no memory."""
    return Decoder(dataclasses.replace(backend, device=torch.device("meta")), config).num_bytes()


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--host-cache-dir {path!r} cannot be made: {error.strerror or error}"
        ) from error


def _worker_spec(config: EngineConfig, path: Path, shape: BaseShape) -> WorkerSpec:
    dtype: torch.dtype = getattr(torch, config.dtype)
    assert config.host_cache_bytes is not None
    return WorkerSpec(
        roots=config.adapters,
        shape=shape,
        geometry=page_geometry(shape, dtype.itemsize),
        dtype_name=config.dtype,
        model_path=str(path),
        model_name=config.model_name,
        quantize=config.quantize,
        host_cache_dir=config.host_cache_dir,
        host_cache_bytes=config.host_cache_bytes,
    )


def _start_loader(spec: WorkerSpec, has_process: bool) -> Loader:
    return ProcessLoader(spec) if has_process else ThreadLoader(LoadWorker(spec))


class Adapters(NamedTuple):
    """Where adapters come from, and which stores could not be listed at start."""

    catalog: Catalog
    loader: Loader
    failures: tuple[str, ...]


def _fill(catalog: Catalog, loader: Loader, shape: BaseShape, report: Report) -> tuple[str, ...]:
    """Enter what the stores hold; what is still being written gets a second look. Returns which
    stores could not be listed.

    As many adapters as take DESCRIBING_S are described now, the others beside the requests.
    """
    for look in range(2):
        result = _wait_for_scan(loader)
        found = catalog.apply(result.change)
        for failure in found.failures:
            log.error("store not listed reason=%r", failure)
        if look == 1 or not found.pending:
            break
        time.sleep(SECOND_LOOK_S)
        loader.submit(ScanJob(FIRST_SCAN))
    describe_entries(catalog, catalog.undescribed(), shape, DESCRIBING_S)
    report(f"adapters found={len(catalog.summaries())} undescribed={len(catalog.undescribed())}")
    return found.failures


def _wait_for_scan(loader: Loader) -> ScanDone:
    """The result of the only job that is open. Raises ConfigError if it fails."""
    while not (results := loader.take_done()):
        wait_readable([loader.fileno()], 1.0)
    (result,) = results
    if isinstance(result, JobFailed):
        raise ConfigError(result.error.message)
    assert isinstance(result, ScanDone)
    return result


class Base(NamedTuple):
    """The base with its weights, what computes it, and who is told of the rest of the start."""

    decoder: Decoder
    backend: Backend
    report: Report


def _assemble(
    config: EngineConfig, info: EngineInfo, adapters: Adapters, base: Base, costs: CostModel
) -> Engine:
    """Put the parts together."""
    catalog, loader, failures = adapters
    decoder, backend, report = base
    shape = decoder.config.shape()
    geometry = page_geometry(shape, backend.dtype.itemsize)
    try:
        buffer = PageBuffer(info.num_pages, shape, geometry, backend.dtype, backend.device)
    except RuntimeError as error:
        raise ConfigError(
            f"this machine cannot give {config.pool_bytes:,} bytes for the page pool "
            f"(--pool-bytes): {memory_report(backend.device)}"
        ) from error
    host = HostCache(info.host_cache_bytes, EvictionOrder(config.eviction), costs)
    options = MemoryOptions(
        policy=config.eviction,
        has_prefix_cache=config.prefix_caching,
        costs=costs,
        is_in_host=host.has,
    )
    memory = Memory.of_pages(info.num_pages, shape, geometry, options)
    tiles = TileStore(buffer, shape)
    graphs = _graphs(config, info, decoder, backend)
    if graphs is not None and config.capture_at_start:
        graphs.capture_base(buffer, report)
    wakeup = Wakeup()
    copier = PageCopier(buffer, tiles, wakeup.wake)
    residency = Residency(loader, host, copier, memory, catalog)
    limits = StepLimits(config.max_num_sequences, config.max_step_tokens)
    scheduler = Scheduler(memory, FirstComeFirstServed(), residency, limits)
    runner = ModelRunner(decoder, buffer, tiles, graphs)
    merger = None
    if config.merge_bytes is not None:
        holds = MergeHolds(catalog, residency, memory, scheduler.needs)
        merger = Merger(runner, tiles, buffer, holds, config.merge_bytes)
    parts = EngineParts(
        catalog=catalog,
        loader=loader,
        host=host,
        copier=copier,
        wakeup=wakeup,
        runner=runner,
        memory=memory,
        residency=residency,
        scheduler=scheduler,
        store_failures=failures,
        merger=merger,
    )
    return Engine(info, parts, config.seed, config.refresh_interval_s)


def _graphs(
    config: EngineConfig, info: EngineInfo, decoder: Decoder, backend: Backend
) -> DecodeGraphs | None:
    """None on the CPU, which has none."""
    if backend.device.type != "cuda":
        return None
    from loraswarm.engine.graphs import CudaRecorder, DecodeGraphs

    max_pages = -(-info.max_model_len // info.page_tokens)
    recorder = CudaRecorder(backend.device)
    max_rows = config.max_num_sequences
    return DecodeGraphs(decoder, recorder, max_pages, info.page_tokens, max_rows)


def _resolve(config: EngineConfig, dtype: torch.dtype) -> EngineConfig:
    """Fill in device, dtype, threads and the host cache's bytes, and set the threads."""
    device = resolve_device(config.device)
    if config.max_step_tokens < config.max_num_sequences:
        raise ConfigError(
            f"max_step_tokens is {config.max_step_tokens} but max_num_sequences is "
            f"{config.max_num_sequences}; a step must have room for one token of each sequence"
        )
    num_threads = set_threads(device, config.num_threads)
    host_cache_bytes = config.host_cache_bytes
    if host_cache_bytes is None:
        available = psutil.virtual_memory().available
        host_cache_bytes = min(MAX_HOST_CACHE_BYTES, int(HOST_CACHE_SHARE * available))
    return dataclasses.replace(
        config,
        device="cuda" if device.type == "cuda" else "cpu",
        dtype=DTYPES[dtype],
        num_threads=num_threads,
        host_cache_bytes=host_cache_bytes,
    )


def _info(
    config: EngineConfig,
    path: Path,
    decoder: Decoder,
    geometry: PageGeometry,
) -> EngineInfo:
    assert config.host_cache_bytes is not None
    assert config.max_model_len is not None
    assert config.pool_bytes is not None
    return EngineInfo(
        model=config.model_name,
        model_path=str(path),
        max_model_len=config.max_model_len,
        vocab_size=decoder.config.vocab_size,
        end_token_ids=tuple(
            token_id for token_id in eos_token_ids(path) if token_id < decoder.config.vocab_size
        ),
        weight_bytes=decoder.num_bytes(),
        num_pages=config.pool_bytes // geometry.page_bytes,
        page_bytes=geometry.page_bytes,
        page_tokens=geometry.page_tokens,
        host_cache_bytes=config.host_cache_bytes,
    )


def _report_differences(
    figures: CostFigures, config: EngineConfig, info: EngineInfo, report: Report
) -> None:
    """Say in what this engine is other than the one that the cost model was measured with."""
    here = {
        "dtype": config.dtype,
        "num_threads": config.num_threads,
        "quantize": config.quantize,
        "weight_bytes": info.weight_bytes,
    }
    for name, value in here.items():
        if (measured := getattr(figures, name)) != value:
            report(f"cost model of another engine: {name}={measured}, here {value}")


def _summary(config: EngineConfig, info: EngineInfo) -> str:
    options = " ".join(
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in ("model", "adapters")
    )
    return f"{options} pages={info.num_pages} page_bytes={info.page_bytes}"
