"""A checked adapter: where its tensors belong, and the tensors themselves in the form tiles take.

`AdapterInfo` is known from headers alone (no torch, no weights read); `Adapter` holds host weights.
Neither knows pages, batches or the base model's weights. Built by adapters/peft, held by the
catalog, read by memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.core.base_shape import TARGETS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One adapted linear: `site` is `layer * len(TARGETS) + target`; `scale` multiplies B A x."""

    site: int
    rank: int
    scale: float

    @property
    def layer(self) -> int:
        return self.site // len(TARGETS)

    @property
    def target(self) -> int:
        return self.site % len(TARGETS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One immutable generation of a named adapter.

    `digest` identifies the content of config and weights; (name, digest) is the identity that
    caches use. `modules` is sorted by site. `num_bytes` is the size of the weights file.
    """

    name: str
    path: Path
    digest: str
    method: str
    modules: tuple[ModuleInfo, ...]
    num_bytes: int

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.digest

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules)


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """A [rank, in] and B transposed [rank, out] of one module, contiguous, in the base's dtype."""

    info: ModuleInfo
    a_RI: Tensor
    bt_RO: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Host weights of one adapter generation, ready to be cut into tiles."""

    info: AdapterInfo
    modules: tuple[ModuleWeights, ...]
