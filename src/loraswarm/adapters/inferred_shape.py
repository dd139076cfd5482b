"""The sizes of a base, as far as a LoRA's own tensors give them away. No torch.

For checking adapters whose base is not at hand: only what the tensors themselves tell is taken to
be so, and where more is needed nothing is. Called by `loraswarm adapters check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.plan import PREFIX
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape

MAX_LAYERS = 10_000
MAX_VOCAB = 1 << 22
BIAS_PARTS = ("bias", "base_layer.bias")
LORA_LIKE = ("LORA", "ADALORA")
# A and B have other sizes than the linear, or the update is elsewhere.
_OPAQUE_KEYS = ("use_bdlora", "use_qalora", "target_parameters", "trainable_token_indices")
_LINEAR = re.compile(
    r"model\.layers\.(?P<layer>\d{1,6})\.(?:self_attn|mlp)\.(?P<target>\w+)\.(?P<part>.+)"
)
# Which side of a linear is as wide as the residual stream.
_RESIDUAL_SIDES = [
    (target, "out" if target in ("o_proj", "down_proj") else "in") for target in TARGETS
]


def infer_shape(source: AdapterSource) -> BaseShape | None:
    """A base that this adapter would fit; None if its tensors do not tell.

    Not known are: layers beyond the last that is adapted, linears that are not adapted, kv heads
    and vocabulary. They are set to something that no plan for this adapter objects to. Embeddings
    and lm_head depend on whether the base ties them, which no tensor tells.
    """
    keys = ConfigKeys.parse(source.config)
    if keys.get("peft_type") not in LORA_LIKE or any(keys.get(key) for key in _OPAQUE_KEYS):
        return None
    shapes = {name.removeprefix(PREFIX): spec.shape for name, spec in source.tensors.items()}
    if any(name.startswith((EMBEDDING, LM_HEAD)) for name in shapes):
        return None
    sizes: dict[tuple[str, str], int] = {}
    num_layers = 0
    for name, shape in shapes.items():
        match = _LINEAR.fullmatch(name)
        if match is None or match["target"] not in TARGETS:
            continue
        num_layers = max(num_layers, int(match["layer"]) + 1)
        for side, size in _sizes(match["part"], shape):
            sizes.setdefault((match["target"], side), size)
    hidden = next((sizes[side] for side in _RESIDUAL_SIDES if side in sizes), None)
    vocab_size = max(keys.token_ids("alora_invocation_tokens") or (), default=0) + 1
    if hidden is None or num_layers > MAX_LAYERS or vocab_size > MAX_VOCAB:
        return None
    head_size = sizes.get(("k_proj", "out"), hidden)
    norm = shapes.get("model.layers.0.self_attn.q_norm.weight")
    return BaseShape(
        num_layers=num_layers,
        num_kv_heads=1,
        head_size=norm[-1] if norm and norm[-1] > 0 else head_size,
        vocab_size=vocab_size,
        target_sizes=tuple(
            (sizes.get((target, "in"), hidden), sizes.get((target, "out"), hidden))
            for target in TARGETS
        ),
        biased_targets=tuple(_is_biased(shapes, target) for target in TARGETS),
        has_qk_norm=norm is not None,
    )


def _sizes(part: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """What one tensor of a linear tells: A [rank, in], B [out, rank], a whole weight or a bias."""
    if not shape or min(shape) < 1:
        return
    if len(shape) == 2 and part in ("lora_A.weight", "lora_A", "weight"):
        yield "in", shape[1]
    if len(shape) == 2 and part in ("lora_B.weight", "lora_B", "weight"):
        yield "out", shape[0]
    if len(shape) == 1 and part in BIAS_PARTS:
        yield "out", shape[0]


def _is_biased(names: Iterable[str], target: str) -> bool:
    """Trained biases of the base stand beside the linear's other tensors."""
    endings = tuple(f".{target}.{part}" for part in BIAS_PARTS)
    return any(name.endswith(endings) for name in names)
