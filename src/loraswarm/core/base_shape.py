"""The sizes of a base model that adapters and memory must agree with.

Knows nothing about files, tensors or devices. Written by models/config, read by adapters, memory
and models.
"""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_TARGETS = TARGETS[:4]
EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"
FINAL_NORM = "model.norm"


@dataclass(frozen=True, slots=True)
class BaseShape:
    """Sizes of one decoder, and the numbering of everything an adapter can change.

    `target_sizes[i]` is (in_features, out_features) of `TARGETS[i]`, equal in every layer;
    `biased_targets[i]` says whether that linear has a bias.

    Sites number the adapted modules. The lm_head is wider than a page holds and is cut by columns
    into parts, a site each, which are computed like the parts of a fused linear:

        site   0 .. 7 * num_layers - 1           | embedding | lm_head part 0 | part 1 | ...
               layer * len(TARGETS) + target       num_linears head_site
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    target_sizes: tuple[tuple[int, int], ...]
    biased_targets: tuple[bool, ...] = (False,) * len(TARGETS)
    has_qk_norm: bool = False
    ties_embeddings: bool = False

    @property
    def hidden_size(self) -> int:
        return self.target_sizes[0][0]

    @property
    def num_linears(self) -> int:
        """The linears of all layers: sites below this are `layer * len(TARGETS) + target`."""
        return self.num_layers * len(TARGETS)

    @property
    def embedding_site(self) -> int:
        return self.num_linears

    @property
    def head_site(self) -> int:
        """The lm_head's first part, and its name as a module."""
        return self.num_linears + 1

    def head_bounds(self) -> tuple[int, ...]:
        """Where the lm_head's columns are cut: ascending from 0 to the vocabulary's size."""
        return (*range(0, self.vocab_size, self.widest()), self.vocab_size)

    def num_sites(self) -> int:
        """Linears, the embedding and the parts of the lm_head."""
        return self.num_linears + len(self.head_bounds())

    def site_sizes(self, site: int) -> tuple[int, int]:
        """(in_features, out_features) of the module at `site`; the lm_head as a whole."""
        if site < self.num_linears:
            return self.target_sizes[site % len(TARGETS)]
        if site == self.embedding_site:
            return self.vocab_size, self.hidden_size
        return self.hidden_size, self.vocab_size

    def site_path(self, site: int) -> str:
        """The Hugging Face path of the module at `site`."""
        if site < self.num_linears:
            return module_path(*divmod(site, len(TARGETS)))
        return EMBEDDING if site == self.embedding_site else LM_HEAD

    def has_bias(self, site: int) -> bool:
        """Whether the base adds a bias at `site`."""
        return site < self.num_linears and self.biased_targets[site % len(TARGETS)]

    def norm_sizes(self) -> dict[str, int]:
        """Every norm of the base by its Hugging Face path, and the length of its weight."""
        sizes = {}
        for layer in range(self.num_layers):
            path = f"model.layers.{layer}"
            sizes[f"{path}.input_layernorm"] = self.hidden_size
            sizes[f"{path}.post_attention_layernorm"] = self.hidden_size
            if self.has_qk_norm:
                sizes[f"{path}.self_attn.q_norm"] = self.head_size
                sizes[f"{path}.self_attn.k_norm"] = self.head_size
        sizes[FINAL_NORM] = self.hidden_size
        return sizes

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
