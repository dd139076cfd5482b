"""A decoder in numbers: sizes, positions, attention windows and which optional parts it has.

Knows no files, tensors or family names; families differ in these fields only. Built by
models/families, read by the decoder and, through `shape`, by adapters and memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Rope scaling of Llama 3.1: slow frequencies are divided by `factor`, fast ones kept.

    A frequency that turns fewer than `low_freq_factor` times within `original_max_position` tokens
    is slow, one that turns more than `high_freq_factor` times is fast; between them it is blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Everything that decides what one decoder computes, apart from its weights.

    `windows[i]` is how many tokens, itself included, a token of layer i attends to; None: all.
    `max_position` tokens is the longest sequence; the rope table has that many rows.

    Raises    ConfigError naming the sizes, if they do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    windows: tuple[int | None, ...]
    rope_scaling: Llama3Scaling | None = None
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    ties_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_heads}; it must be a multiple of "
                f"num_key_value_heads, which is {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_dim is {self.head_size}; rope needs an even number")
        assert len(self.windows) == self.num_layers

    def shape(self) -> BaseShape:
        """The sizes that adapters and memory must agree with."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return BaseShape(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            vocab_size=self.vocab_size,
            target_sizes=(
                (hidden, q_size),
                (hidden, kv_size),
                (hidden, kv_size),
                (q_size, hidden),
                (hidden, mlp),
                (hidden, mlp),
                (mlp, hidden),
            ),
            biased_targets=(
                *(self.has_qkv_bias,) * 3,
                self.has_o_bias,
                *(self.has_mlp_bias,) * 3,
            ),
            has_qk_norm=self.has_qk_norm,
            ties_embeddings=self.ties_embeddings,
        )
