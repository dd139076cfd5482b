"""`loraswarm bench calibrate`: measures a machine with a base model and fits what serving costs.

Puts the parts together: an engine, adapters, what to time, the fit. Imports torch inside. Called by
the command line.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraswarm.bench.cost_fit import TimedStep, fit_step_costs, fit_transfer, residuals
from loraswarm.bench.cost_table import cost_lines, rate_lines, step_lines
from loraswarm.bench.environment import environment
from loraswarm.bench.machine_rates import machine_rates
from loraswarm.bench.merge_times import time_merges
from loraswarm.bench.offline import set_engine_environment
from loraswarm.bench.random_adapters import rank_bytes, write_adapters
from loraswarm.bench.step_grid import (
    Limits,
    checked_batches,
    fitted_batches,
    possible,
    time_batches,
)
from loraswarm.bench.step_times import Batch, StepTimer
from loraswarm.bench.transfer_times import Transfer, time_transfers
from loraswarm.config import EngineConfig
from loraswarm.core.cost_model import CostFigures
from loraswarm.errors import ConfigError

if TYPE_CHECKING:
    from loraswarm.engine.engine import Engine

Report = Callable[[str], None]
Clock = Callable[[], float]
ENGINE_FIELDS = (
    "device",
    "dtype",
    "max_model_len",
    "max_num_sequences",
    "max_step_tokens",
    "memory_utilization",
    "num_threads",
    "pool_bytes",
    "quantize",
)
POOL_SHARE = 0.4
"""How much of the pool adapters may take; the rest is for K and V of the steps that are timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What is measured. `adapters` are stores, of which the first `num_adapters` by name are used;
    without any, random ones of `ranks` in turn are made, of `adapters_bytes` at most.

    `engine` are further fields of EngineConfig, of ENGINE_FIELDS. Every step is timed in
    `num_rounds` rounds; in each, decodes `num_steps` times.
    """

    model: str
    adapters: tuple[str, ...] = ()
    num_adapters: int = 32
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    adapters_bytes: int = 3 << 29
    num_rounds: int = 3
    num_steps: int = 8
    seed: int = 0
    engine: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_adapters", "adapters_bytes", "num_rounds", "num_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be >= 1")
        if not self.ranks or min(self.ranks) < 1:
            raise ConfigError(f"ranks are {self.ranks}; there must be some, each >= 1")
        for name, _ in self.engine:
            if name not in ENGINE_FIELDS:
                raise ConfigError(
                    f"{name} cannot be set here; it must be one of {', '.join(ENGINE_FIELDS)}"
                )


def calibrate(
    options: CalibrateOptions, report: Report, clock: Clock = time.perf_counter
) -> CostFigures:
    """Measure this machine; minutes. `report` gets lines of progress, and tables at the end.

    The engine's environment is set first: call it before anything has imported torch.
    Raises   ConfigError for an option, a model or adapters that cannot work.
    """
    set_engine_environment()
    from loraswarm.engine.setup import build_engine

    # Options are checked before adapters are made, which takes gigabytes.
    if dict(options.engine).get("device", "auto") not in ("auto", "cpu"):
        raise ConfigError("device 'cuda' cannot be calibrated; leave it out or set cpu")
    fields = {"model": options.model, "prefix_caching": False, "device": "cpu"}
    config = EngineConfig.from_options(dict(options.engine) | fields)
    with _stores(options, report) as stores:
        config = replace(config, adapters=stores, merge="auto", merge_policy="never")
        engine = build_engine(config, report)
        try:
            return _Calibration(engine, config, options, report, clock).run()
        finally:
            engine.close()


@contextmanager
def _stores(options: CalibrateOptions, report: Report) -> Iterator[tuple[str, ...]]:
    """The stores that are given, or one of random adapters for as long as it takes."""
    if options.adapters:
        yield options.adapters
        return
    from loraswarm.models.families import decoder_config
    from loraswarm.models.quantization import without_quantization
    from loraswarm.models.source import read_config, resolve_model

    raw = read_config(resolve_model(options.model))
    shape = decoder_config(without_quantization(raw)).shape()
    ranks = ranks_within(options, rank_bytes(shape))
    report(f"making random adapters={len(ranks)} ranks={','.join(map(str, options.ranks))}")
    with tempfile.TemporaryDirectory(prefix="loraswarm-calibrate-") as directory:
        write_adapters(Path(directory), shape, ranks, options.seed)
        yield (directory,)


def ranks_within(options: CalibrateOptions, bytes_of_rank: int) -> list[int]:
    """A rank for each random adapter, in turn: as many as are asked for and may take the bytes, at
    least one."""
    ranks: list[int] = []
    for index in range(options.num_adapters):
        ranks.append(options.ranks[index % len(options.ranks)])
        if len(ranks) > 1 and sum(ranks) * bytes_of_rank > options.adapters_bytes:
            return ranks[:-1]
    return ranks


@dataclass(frozen=True, slots=True)
class _Calibration:
    """One engine being measured."""

    engine: Engine
    config: EngineConfig
    options: CalibrateOptions
    report: Report
    clock: Clock

    def run(self) -> CostFigures:
        import torch

        self.report("measuring memory and products")
        decoder, info = self.engine.decoder, self.engine.info
        machine = machine_rates(decoder, self.clock)
        transfers = self._time_transfers()
        fitted, checked = self._time_steps(transfers)
        step = fit_step_costs(fitted)
        self.report("merging")
        merge_s = time_merges(self.engine, [each.adapter for each in transfers], self.clock)
        sizes = [each.num_bytes for each in transfers]
        figures = CostFigures(
            model=info.model,
            dtype=str(decoder.dtype).removeprefix("torch."),
            quantize=self.config.quantize,
            num_threads=self.config.num_threads or torch.get_num_threads(),
            weight_bytes=info.weight_bytes,
            kv_token_bytes=info.page_bytes // info.page_tokens,
            step=step,
            load=fit_transfer(sizes, [each.load_s for each in transfers]),
            copy=fit_transfer(sizes, [each.copy_s for each in transfers]),
            merge_s=merge_s,
            machine=machine,
            fitted=residuals(step, fitted),
            checked=residuals(step, checked),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=environment(),
        )
        lines = rate_lines(machine) + step_lines(step, fitted, checked) + cost_lines(figures)
        for line in lines:
            self.report(line)
        return figures

    def _time_transfers(self) -> list[Transfer]:
        served = [row for row in self.engine.adapters() if row.refusal is None]
        served = served[: self.options.num_adapters]
        info = self.engine.info
        room_bytes = int(POOL_SHARE * info.num_pages * info.page_bytes)
        self.report(f"loading adapters={len(served)} room_bytes={room_bytes}")
        transfers = time_transfers(self.engine, served, room_bytes, self.report)
        self.report(f"loaded adapters={len(transfers)}")
        return transfers

    def _time_steps(self, transfers: list[Transfer]) -> tuple[list[TimedStep], list[TimedStep]]:
        """Of what figures are fitted to, and of what they are checked with."""
        sizes = {each.adapter: each.num_bytes for each in transfers}
        max_step_tokens, names = self.config.max_step_tokens, sorted(sizes)
        timer = StepTimer(self.engine, sizes, max_step_tokens, self.clock)
        fitted = self._time_batches(timer, fitted_batches(names))
        return fitted, self._time_batches(timer, checked_batches(names))

    def _time_batches(self, timer: StepTimer, batches: list[Batch]) -> list[TimedStep]:
        config, info, num_steps = self.config, self.engine.info, self.options.num_steps
        limits = Limits(
            num_sequences=config.max_num_sequences,
            max_step_tokens=config.max_step_tokens,
            max_model_len=info.max_model_len,
            pool_tokens=int((1.0 - POOL_SHARE) * info.num_pages) * info.page_tokens,
            page_tokens=info.page_tokens,
        )
        found = possible(batches, limits, num_steps, self.report)
        return time_batches(timer, found, self.options.num_rounds, num_steps, self.report)
