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
from loraswarm.engine.merge_places import linears_in_order, update_bytes
from loraswarm.engine.merging import Merger
from loraswarm.engine.policies.merging import DEFAULT, MergeCosts, MergePolicy, make_policy
from loraswarm.engine.scheduler import StepLimits
from loraswarm.errors import ConfigError, LoRASwarmError
from loraswarm.memory.geometry import PageGeometry
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

    Raises    ConfigError with the reason if it is not served, cannot be had, or is in no linear
              then.
    """
    name, merger = config.merge, engine.merger
    if merger is None:
        return
    if name in MODES:
        if not merger.has_room:
            report(f"merge={name} merges nothing: {_no_room(merger)}")
        return
    if name == config.model_name:
        raise ConfigError(f"--merge {name!r}: that is the base model; give an adapter's name")
    begin_s = time.perf_counter()
    try:
        engine.require_adapter(name)
    except LoRASwarmError as error:
        raise ConfigError(f"--merge {name!r}: {error}") from error
    engine.merge_policy = lambda: merger.holds.key_of(name)
    problem = engine.merge_now()
    if problem is not None:
        raise ConfigError(f"--merge {name!r}: {problem}")
    if merger.num_merged == 0:
        raise ConfigError(f"--merge {name!r} is in no linear: {_why_nowhere(merger)}")
    report(
        f"merged adapter={name} linears={merger.num_merged} share={merger.share_merged:.2f}"
        f" bytes={merger.bytes} seconds={time.perf_counter() - begin_s:.1f}"
    )


def _why_nowhere(merger: Merger) -> str:
    """Why what was merged at start is in no linear."""
    assert merger.target is not None
    reason = merger.why_not(merger.target)
    if reason is None and not merger.has_room:
        reason = _no_room(merger)
    return reason or "each is left unmerged for the reason that is logged"


def _no_room(merger: Merger) -> str:
    return (
        f"merged weights may take {merger.budget_bytes:,} bytes, less than any linear that would"
        " change (--merge-bytes, and what --pool-bytes leaves)"
    )


def check_options(config: EngineConfig) -> None:
    """Raises ConfigError for a policy that there is not, and for what would not be heeded."""
    for name in ("merge", "merge_policy"):
        if not isinstance(getattr(config, name), str):
            raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be a name")
    make_policy(config.merge_policy)
    if config.merge != "auto" and config.merge_policy != DEFAULT:
        raise ConfigError(
            f"merge_policy is {config.merge_policy!r}, but merge is {config.merge!r}: policies"
            " decide what 'auto' merges"
        )
    if config.merge == "off" and config.merge_bytes is not None:
        raise ConfigError(
            f"--merge-bytes is {config.merge_bytes:,}, but nothing is merged: --merge is off"
        )


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
            known[key] = update_bytes(entry.info, shape, geometry.element_bytes) or None
        return known[key]

    return MergeFacts(
        limits=StepLimits(config.max_num_sequences, config.max_step_tokens),
        kv_token_bytes=geometry.page_bytes // geometry.page_tokens,
        bytes_of=bytes_of,
    )
