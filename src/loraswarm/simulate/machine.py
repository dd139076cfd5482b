"""The machine that is simulated: what a step takes with some share of the layers merged.

Seconds are those of a cost model of `loraswarm bench calibrate`; one measured on four CPU cores
with Qwen2.5-0.5B's dimensions comes with the package. Adapters are on all linears of a model of
that shape; their bytes are scaled to the cost model's weights. Knows no requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.cost_model import CostFigures
from loraswarm.core.sequence import AdapterKey
from loraswarm.core.step_cost import StepWork
from loraswarm.engine.policies.merging.effect import lora_s, merged_work, shared_lora_s
from loraswarm.engine.policies.merging.view import MergeCosts
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.tile_layout import adapter_bytes

DEFAULT_FILE = "default_costs.json"
SHAPE = BaseShape(
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
    biased_targets=(True, True, True, False, False, False, False),
    ties_embeddings=True,
)
ELEMENT_BYTES = 2
GEOMETRY = page_geometry(SHAPE, ELEMENT_BYTES)
LINEAR_BYTES = ELEMENT_BYTES * SHAPE.num_layers * sum(i * o for i, o in SHAPE.target_sizes)
HEAD_BYTES = ELEMENT_BYTES * SHAPE.vocab_size * SHAPE.hidden_size
LINEAR_SHARE = LINEAR_BYTES / (LINEAR_BYTES + HEAD_BYTES)
COPY_SHARE = 0.5
"""Where it was not measured, merging is taken to move a weight's bytes at this share of the rate at
which memory is copied."""


def default_figures() -> CostFigures:
    """The cost model that comes with the package."""
    text = resources.files(__package__).joinpath(DEFAULT_FILE).read_text(encoding="utf-8")
    return CostFigures.from_document(json.loads(text))


def read_figures(path: str | Path | None) -> CostFigures:
    """Those of a file, or the package's. Raises ConfigError naming the file and what is wrong."""
    return default_figures() if path is None else CostFigures.read(path)


def make_info(name: str, rank: int) -> AdapterInfo:
    """A LoRA of one rank on all linears; nothing is on disk."""
    return AdapterInfo(
        name=name,
        path=Path("nowhere"),
        digest="simulated",
        method="lora",
        modules=tuple(ModuleInfo(site, rank, 1.0) for site in range(SHAPE.num_linears)),
        num_bytes=0,
    )


@dataclass(frozen=True)
class Machine:
    """One cost model, and how fast it merges."""

    figures: CostFigures

    @cached_property
    def merge_s(self) -> float:
        """Seconds to merge an adapter into everything; restoring takes none."""
        if self.figures.merge_s is not None:
            return self.figures.merge_s
        rate = max(1.0, COPY_SHARE * self.figures.machine.copy_bytes_per_s)
        return LINEAR_SHARE * self.figures.weight_bytes / rate

    @cached_property
    def _scale(self) -> float:
        """An adapter's bytes over those it would have for `SHAPE`: widths grow as the root of the
        weights' bytes."""
        return math.sqrt(self.figures.weight_bytes / (LINEAR_BYTES + HEAD_BYTES))

    def merge_costs(self, budget_share: float = 0.1) -> MergeCosts:
        """What a policy is told beforehand."""
        return MergeCosts(step=self.figures.step, merge_s=self.merge_s, budget_share=budget_share)

    def infos_of(self, ranks: Mapping[str, int]) -> list[AdapterInfo]:
        """Adapters of these ranks, by name."""
        return [make_info(name, rank) for name, rank in ranks.items()]

    def bytes_of(self, info: AdapterInfo) -> int:
        """What the adapter takes in pages."""
        return round(self._scale * adapter_bytes(info, SHAPE, GEOMETRY).own)

    def step_s(self, work: StepWork, num_hot_tokens: int, merged_bytes: int, share: float) -> float:
        """Seconds of a step; `work` is that with nothing merged."""
        step = self.figures.step
        base_s = step.step_s(work) - lora_s(step, work)
        merged = merged_work(work, num_hot_tokens, merged_bytes)
        return base_s + shared_lora_s(step, work, merged, share)


@dataclass(slots=True)
class Switcher:
    """What is merged: works towards `target`, a share of the bytes at a time.

    What another adapter was merged into is restored at once, as pointers are set back. `total`
    counts changes of target.
    """

    merge_s: float
    target: AdapterKey | None = None
    merged: AdapterKey | None = None
    share: float = 0.0
    total: int = 0

    def set_target(self, target: AdapterKey | None) -> None:
        if target == self.target:
            return
        self.target = target
        self.total += 1
        if target != self.merged:
            self.merged, self.share = None, 0.0

    def advance(self, budget_s: float) -> tuple[float, float]:
        """Merge for at most so long; returns seconds taken and the share that was merged."""
        if self.target is None or self.share == 1.0:
            return 0.0, 0.0
        before = self.share
        self.merged = self.target
        self.share = min(1.0, before + budget_s / max(self.merge_s, 1e-12))
        return (self.share - before) * self.merge_s, self.share - before
