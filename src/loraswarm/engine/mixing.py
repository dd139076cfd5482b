"""Which adapters a request's tokens are computed with, and from which token on.

Knows descriptions of adapters, no weights. Called by the engine when a request arrives.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraswarm.adapters.adapter import EMBEDDING_A, AdapterInfo
from loraswarm.core.sequence import AdapterMix
from loraswarm.errors import InvalidRequest


def resolve_mix(infos: Sequence[AdapterInfo], weights: Sequence[float]) -> AdapterMix:
    """The keys of the adapters and their weights.

    One adapter of weight 1 is applied as it is; anything else is a weighted sum of updates, which
    only adapters have whose whole effect is an update B A x.

    Raises    InvalidRequest naming the adapter that cannot be part of a sum, and why.
    """
    mix = tuple((info.key, float(weight)) for info, weight in zip(infos, weights, strict=True))
    if len(mix) == 1 and mix[0][1] == 1.0:
        return mix
    for info in infos:
        reason = _why_not_additive(info)
        if reason is not None:
            raise InvalidRequest(
                f"adapter {info.name!r} cannot be combined with others or weighted: {reason}; ask"
                " for it alone",
                "adapters",
            )
    return mix


def first_adapted(infos: Sequence[AdapterInfo], prompt: Sequence[int]) -> int | None:
    """The first token that the adapters act on; None if they act on none.

    An activated LoRA acts from the start of the last match of its invocation tokens in the prompt;
    every other adapter acts from the beginning.
    Source    Greenewald et al. 2025 (activated LoRA, arXiv 2504.12397); as PEFT does in generate.
    """
    if not infos or infos[0].invocation_tokens is None:
        return 0
    tokens = infos[0].invocation_tokens
    for start in range(len(prompt) - len(tokens), -1, -1):
        if tuple(prompt[start : start + len(tokens)]) == tokens:
            return start
    return None


def _why_not_additive(info: AdapterInfo) -> str | None:
    if info.invocation_tokens is not None:
        return "it is activated by tokens of the prompt"
    replaced = [path for overlay in info.overlays for path in overlay.paths if path != EMBEDDING_A]
    if replaced:
        return f"it replaces weights ({replaced[0]})"
    if any({"g", "c"} & set(module.vectors) for module in info.modules):
        return f"a {info.method} adapter also scales the base's outputs or changes its biases"
    return None
