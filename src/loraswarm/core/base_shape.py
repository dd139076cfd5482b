"""The sizes of a base model that adapters and memory must agree with.

Knows nothing about files, tensors or devices. Written by models/families, read by adapters and
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_TARGETS = TARGETS[:4]


@dataclass(frozen=True, slots=True)
class BaseShape:
    """Sizes of one decoder.

    `target_sizes[i]` is (in_features, out_features) of `TARGETS[i]`, equal in every layer.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    target_sizes: tuple[tuple[int, int], ...]

    def num_sites(self) -> int:
        """Adapted linears in the whole model; a site is `layer * len(TARGETS) + target`."""
        return self.num_layers * len(TARGETS)

    def kv_elements_per_token(self) -> int:
        """Elements of K and V of all layers for one token."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_size

    def widest(self) -> int:
        """The largest in or out size of any target."""
        return max(max(sizes) for sizes in self.target_sizes)


def module_path(layer: int, target: int) -> str:
    """The Hugging Face path of a target linear, e.g. `model.layers.0.self_attn.q_proj`."""
    block = "self_attn" if target < len(ATTENTION_TARGETS) else "mlp"
    return f"model.layers.{layer}.{block}.{TARGETS[target]}"
