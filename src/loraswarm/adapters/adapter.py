"""A checked adapter: what it changes in the base, and its tensors in the form that tiles take.

Every method we apply is one form, for each module it changes:

    y = g * (W x + v * (B (scale * u * (A x)))) + bias

`AdapterInfo` is known from headers alone (no torch, no weights read); `Adapter` holds host weights.
Neither knows pages or batches. Built by adapters/reading, held by the catalog, read by memory.
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from loraswarm.core.base_shape import TARGETS, BaseShape

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.adapters.plan import AdapterPlan

VectorName = Literal["u", "v", "g", "c"]
EMBEDDING_A = "model.embed_tokens.lora_A"
"""Where the overlay of a LoRA on the embedding goes: A transposed, [vocabulary, rank]."""


@dataclass(frozen=True, slots=True)
class SharedMatrix:
    """A matrix [num_rows, width] that several modules or adapters use, kept once in the pool.

    `digest` identifies its values. A module of fewer columns uses the first columns of each row;
    its rank is `num_rows`.
    """

    digest: str
    num_rows: int
    width: int


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One adapted module: where it is (core/base_shape numbers sites) and what is stored for it.

    `scale` multiplies B A x. Rank 0 has no A and B. `vectors` names those the module has: u [rank],
    v, g and c [out]; c is what remains to add after g: y = g * (W x + b + ...) + c. `shared_a` and
    `shared_bt` stand in for an A or Bt of the module's own. The embedding's A is an overlay.
    """

    site: int
    rank: int
    scale: float
    vectors: tuple[VectorName, ...] = ()
    shared_a: SharedMatrix | None = None
    shared_bt: SharedMatrix | None = None

    @property
    def layer(self) -> int:
        return self.site // len(TARGETS)

    @property
    def target(self) -> int:
        return self.site % len(TARGETS)


@dataclass(frozen=True, slots=True)
class OverlayInfo:
    """Rows [num_rows, width] that stand in for the weight of the modules at `paths`.

    A norm's weight is one row; embeddings and lm_head have a row for each token of the vocabulary,
    or only for `token_ids` (ascending).
    """

    paths: tuple[str, ...]
    num_rows: int
    width: int
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One immutable generation of a named adapter.

    `digest` identifies the content of config and weights; (name, digest) is the identity that
    caches use. `modules` is sorted by site. `num_bytes` is the size of the weights file. With
    `invocation_tokens` the adapter acts from the start of their last match in the prompt on, and
    not at all where they do not occur (activated LoRA). `plan` is what read_adapter follows: it is
    made once, since some methods read matrices for it.
    """

    name: str
    path: Path
    digest: str
    method: str
    modules: tuple[ModuleInfo, ...]
    num_bytes: int
    overlays: tuple[OverlayInfo, ...] = ()
    invocation_tokens: tuple[int, ...] | None = None
    file_format: str = "peft"
    plan: AdapterPlan | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.digest

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules), default=0)

    def shared_matrices(self) -> tuple[SharedMatrix, ...]:
        """Those that any module uses, each once, in the order of modules."""
        found = (
            shared for module in self.modules for shared in (module.shared_a, module.shared_bt)
        )
        return tuple(dict.fromkeys(shared for shared in found if shared is not None))


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """A [rank, in] and B transposed [rank, out] of one module, contiguous, in the base's dtype.

    None where the module has a shared matrix, rank 0, or (A of the embedding) an overlay instead.
    `vectors` holds exactly those that `info.vectors` names, in float32.
    """

    info: ModuleInfo
    a_RI: Tensor | None
    bt_RO: Tensor | None
    vectors: Mapping[VectorName, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Host weights of one adapter generation, ready to be cut into tiles.

    `overlays` is parallel to `info.overlays`; `shared` has one tensor [num_rows, width] by digest
    for each of `info.shared_matrices()`; both in the base's dtype.
    """

    info: AdapterInfo
    modules: tuple[ModuleWeights, ...]
    overlays: tuple[Tensor, ...] = ()
    shared: Mapping[str, Tensor] = field(default_factory=dict)


class BaseWeights(Protocol):
    """The base's sizes and, for methods whose update depends on them (DoRA, PiSSA, biases), its
    weights."""

    @property
    def shape(self) -> BaseShape: ...

    def weight(self, path: str) -> Tensor:
        """[out, in] of the linear or lm_head at `path`, [vocabulary, hidden] of the embedding.

        In the base's dtype; a view or a copy, not to be written to.
        """
        ...

    def bias(self, path: str) -> Tensor | None:
        """[out] of the linear at `path`, None if it has none."""
        ...
