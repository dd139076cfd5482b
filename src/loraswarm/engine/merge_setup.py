"""What `--merge` means for one base: merging at start, or by a policy.

Called by engine/setup.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from loraswarm.adapters.catalog import Catalog
from loraswarm.config import EngineConfig
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.cost_model import CostFigures
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.engine import MERGE_SHARE, Engine
from loraswarm.engine.merge_control import MergeFacts
from loraswarm.engine.merge_places import linears_in_order
from loraswarm.engine.merging import Merger
from loraswarm.engine.policies.merging import MergeCosts, MergePolicy, make_policy
from loraswarm.engine.scheduler import StepLimits
from loraswarm.errors import ConfigError, LoRASwarmError
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.tile_layout import adapter_bytes
from loraswarm.models.decoder import Decoder

MODES = ("off", "auto")


def resolve_merge(
    config: EngineConfig, decoder: Decoder, report: Callable[[str], None]
) -> EngineConfig:
    """The config with `merge` off where "auto" has nothing that it could merge into.

    Raises    ConfigError if an adapter is named and cannot be merged into this base.
    """
    if config.merge == "off":
        return replace(config, merge_bytes=None)
    reason = why_not_merged(decoder)
    if reason is None:
        return config
    if config.merge not in MODES:
        raise ConfigError(f"--merge {config.merge!r} cannot be: {reason}")
    report(f"merge=off reason={reason!r}")
    return replace(config, merge="off", merge_bytes=None)


def why_not_merged(decoder: Decoder) -> str | None:
    """Why no adapter can be merged into this base; None if any can."""
    if all(linear.weight.can_be_merged for linear in linears_in_order(decoder)):
        return None
    return (
        "the base's matrices are integers, which cannot hold the sum of a weight and an update"
        " (--quantize)"
    )


def merge_at_start(engine: Engine, config: EngineConfig, report: Callable[[str], None]) -> None:
    """Merge the adapter that `merge` names, all that there is memory for, and go on with its name:
    a new generation is merged in the place of the last one.

    Raises    ConfigError with the reason if it is not served or cannot be had.
    """
    name = config.merge
    if name in MODES:
        return
    merger = engine.merger
    assert merger is not None
    begin_s = time.perf_counter()
    try:
        engine.require_adapter(name)
    except LoRASwarmError as error:
        raise ConfigError(f"--merge {name!r}: {error}") from error
    engine.merge_policy = lambda: merger.holds.key_of(name)
    problem = engine.merge_now()
    if problem is not None:
        raise ConfigError(f"--merge {name!r}: {problem}")
    report(
        f"merged adapter={name} linears={merger.num_merged} share={merger.share_merged:.2f}"
        f" bytes={merger.bytes} seconds={time.perf_counter() - begin_s:.1f}"
    )


def check_policy(config: EngineConfig) -> None:
    """Raises ConfigError if there is no merge policy of that name."""
    make_policy(config.merge_policy)


def merge_policy(
    config: EngineConfig, figures: CostFigures | None, merger: Merger | None
) -> MergePolicy | None:
    """The policy of `--merge auto`, of its own for one engine; None where none decides."""
    if merger is None or config.merge != "auto" or config.merge_policy == "never":
        return None
    costs = MergeCosts(merge_s=merger.merge_s, budget_share=MERGE_SHARE)
    if figures is not None:
        costs = replace(costs, step=figures.step, merge_s=figures.merge_s or costs.merge_s)
    return make_policy(config.merge_policy, costs)


def merge_facts(
    config: EngineConfig, catalog: Catalog, shape: BaseShape, geometry: PageGeometry
) -> MergeFacts:
    """What that policy is told of the engine."""
    known: dict[AdapterKey, int | None] = {}

    def bytes_of(key: AdapterKey) -> int | None:
        entry = catalog.entry_of(key)
        if entry is None or entry.info is None:
            return None
        if key not in known:
            size = adapter_bytes(entry.info, shape, geometry)
            known[key] = size.own + size.shared if entry.info.max_rank > 0 else None
        return known[key]

    return MergeFacts(
        limits=StepLimits(config.max_num_sequences, config.max_step_tokens),
        kv_token_bytes=geometry.page_bytes // geometry.page_tokens,
        bytes_of=bytes_of,
    )
