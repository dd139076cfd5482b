"""The config of a LoRA adapter, checked key by key: what the update is, or why it is refused.

Knows no tensors and no base. Called by adapters/methods/lora.
Source    peft 0.21: tuners/lora/config.py; which keys go together: tuners/lora/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from loraswarm.adapters.config_keys import CONFIG_FILE, SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.module_selection import ModuleSelection, Patterns
from loraswarm.adapters.printable import shortened
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD
from loraswarm.errors import AdapterError

# Each names the method it makes of LoRA; PEFT allows one at a time.
VARIANTS = {
    "use_dora": "dora",
    "use_bdlora": "bdlora",
    "use_qalora": "qalora",
    "alora_invocation_tokens": "alora",
    "velora_config": "velora",
    "monteclora_config": "monteclora",
}
READ_KEYS = (
    SELECTION_KEYS
    | VARIANTS.keys()
    | {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "bias",
        "lora_bias",
        "trainable_token_indices",
        "ensure_weight_tying",
        "qalora_group_size",
    }
)
# About training, or in effect only together with a key that is read or refused. PEFT sets
# fan_in_fan_out to false for linears that store [out, in].
INERT_KEYS = frozenset(
    {
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "runtime_config",
    }
)
REFUSED_KEYS = {
    "arrow_config": "it routes between adapters; serve those adapters, one for each request",
    "kasa_config": "KaSA changes the base weights, which other adapters share; merge it with PEFT's"
    " merge_and_unload and serve the result as a base",
    "layer_replication": "it changes the depth of the base, which other adapters share; train"
    " LoRA on the base as it is",
    "megatron_config": "Megatron layers are not supported; save the adapter for transformers",
    "target_parameters": "it adapts parameters outside of linear modules; train with"
    " target_modules, or merge it with PEFT's merge_and_unload",
}
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# PEFT takes these in any case of letters, and others as they are.
FOLDED_INITS = ("gaussian", "mica", "olora")
UNTYING_INITS = ("orthogonal", "mica")
# Their base was changed in a way that follows from its weights alone.
DECOMPOSED_INITS = ("pissa", "olora")
CONVERTIBLE_INITS = ("pissa", "corda", "lora_ga")
_BLOCK_DIAGONAL_KEYS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
# But for the number of samples they are about training.
_MONTECLORA_KEYS = {
    "num_samples",
    "use_entropy",
    "dirichlet_prior",
    "sample_scaler",
    "kl_loss_weight",
    "buffer_size",
}
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """Options of BD-LoRA: paths with one of `a_names` in them have a block-diagonal A, and so on.

    A block-diagonal matrix is stored as its blocks, one above the other.
    """

    a_names: tuple[str, ...]
    b_names: tuple[str, ...]
    num_blocks: int
    is_strict: bool

    def side(self, path: str) -> str:
        """Which matrix of the module at `path` is block-diagonal: "A", "B", or "" for none.

        Raises    AdapterError where PEFT would not load it.
        """
        in_a = any(name in path for name in self.a_names)
        in_b = any(name in path for name in self.b_names)
        if in_a and in_b:
            raise AdapterError(
                f"{CONFIG_FILE}: use_bdlora names {path!r} for block-diagonal A and B; only one can"
                " be"
            )
        if self.is_strict and not (in_a or in_b):
            raise AdapterError(
                f"{CONFIG_FILE}: use_bdlora names {path!r} neither for block-diagonal A nor B;"
                " set its match_strict to false if that is meant"
            )
        return "A" if in_a else "B" if in_b else ""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The update a config describes: B A x times a scale for the selected modules, and the rest.

    `variant` is a value of VARIANTS or "". `decomposition` is one of DECOMPOSED_INITS or "".
    `replaced` are modules_to_save; `token_ids` has the trained tokens by name of the module, ""
    for the embedding. `init_unties` where PEFT's initialisation replaces matrices that it had tied;
    `head_is_tied` where the lm_head's are the embedding's, transposed. `name_infix` stands in
    tensor names where PEFT has the adapter's own name.
    """

    selection: ModuleSelection
    rank: int
    alpha: float
    is_rank_stabilized: bool
    rank_patterns: Patterns[int]
    alpha_patterns: Patterns[float]
    variant: str = ""
    decomposition: str = ""
    bias: str = "none"
    has_lora_bias: bool = False
    replaced: tuple[str, ...] = ()
    token_ids: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ensures_tying: bool = False
    init_unties: bool = False
    head_is_tied: bool = False
    invocation_tokens: tuple[int, ...] | None = None
    block_diagonal: BlockDiagonal | None = None
    group_size: int = 16
    num_groups: int = 64
    num_samples: int = 8
    name_infix: str = ""

    @property
    def method(self) -> str:
        """The name that listings show."""
        plain = "rslora" if self.is_rank_stabilized else "lora"
        return self.variant or self.decomposition or plain

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path`, as the file has it."""
        return self._configured_rank(self._owner(path))

    def rank_source(self, path: str) -> str:
        """The config key that sets the rank of the module at `path`, as messages name it."""
        found = self.rank_patterns.find(self._owner(path))
        return "r" if found is None else f"rank_pattern[{shortened(found[0])}]"

    def scale_of(self, path: str) -> float:
        """What multiplies B A x of the module at `path`."""
        rank = self._configured_rank(path)
        found = self.alpha_patterns.find(path)
        alpha = self.alpha if found is None else found[1]
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def _owner(self, path: str) -> str:
        return EMBEDDING if path == LM_HEAD and self.head_is_tied else path

    def _configured_rank(self, path: str) -> int:
        found = self.rank_patterns.find(path)
        return self.rank if found is None else found[1]


def parse_lora_config(keys: ConfigKeys) -> LoraConfig:
    """Check every key; absent ones have PEFT's defaults.

    Raises    AdapterError naming the key, its value and what to do.
    """
    keys.check(READ_KEYS, INERT_KEYS, REFUSED_KEYS)
    selection = keys.selection()
    velora = _sub_config(keys, "velora_config", {"num_groups", "scale", "init_type"})
    monteclora = _sub_config(keys, "monteclora_config", _MONTECLORA_KEYS)
    config = LoraConfig(
        selection=selection,
        rank=keys.rank("r", 8),
        alpha=keys.number("lora_alpha", 8),
        is_rank_stabilized=keys.flag("use_rslora"),
        rank_patterns=keys.rank_patterns("rank_pattern"),
        alpha_patterns=keys.number_patterns("alpha_pattern"),
        variant=_variant(keys),
        decomposition=_decomposition(keys, keys.get("init_lora_weights", True)),
        bias=_bias(keys),
        has_lora_bias=keys.flag("lora_bias"),
        replaced=selection.replaced,
        token_ids=_token_ids(keys),
        ensures_tying=keys.flag("ensure_weight_tying"),
        init_unties=_init_name(keys.get("init_lora_weights")) in UNTYING_INITS,
        invocation_tokens=keys.token_ids("alora_invocation_tokens") or None,
        block_diagonal=_block_diagonal(_sub_config(keys, "use_bdlora", _BLOCK_DIAGONAL_KEYS)),
        group_size=_group_size(keys),
        num_groups=velora.rank("velora_config.num_groups", 64) if velora else 64,
        num_samples=monteclora.rank("monteclora_config.num_samples", 8) if monteclora else 8,
    )
    _check_combination(keys, config)
    return config


def _sub_config(keys: ConfigKeys, key: str, names: Set[str]) -> ConfigKeys | None:
    found = keys.nested(key)
    if found is not None:
        found.check({f"{key}.{name}" for name in names}, frozenset(), {})
    return found


def _variant(keys: ConfigKeys) -> str:
    # Empty invocation tokens are none; an empty sub-config is one with PEFT's defaults.
    active = [
        key
        for key in VARIANTS
        if keys.get(key) is not None and keys.get(key) is not False and keys.get(key) != []
    ]
    if len(active) > 1:
        raise keys.refusal(active[1], f"PEFT does not combine it with {active[0]}; remove one")
    for key in ("use_dora", "use_qalora"):
        keys.flag(key)
    return VARIANTS[active[0]] if active else ""


def _group_size(keys: ConfigKeys) -> int:
    """Of inputs; null where nothing is grouped."""
    key = "qalora_group_size"
    is_off = keys.get(key, 16) is None and not keys.get("use_qalora")
    return 16 if is_off else keys.rank(key, 16)


def _bias(keys: ConfigKeys) -> str:
    bias = keys.get("bias", "none")
    if bias not in BIASES:
        raise keys.refusal("bias", f"it must be one of {', '.join(BIASES)}")
    return str(bias)


def _token_ids(keys: ConfigKeys) -> tuple[tuple[str, tuple[int, ...]], ...]:
    key = "trainable_token_indices"
    by_name = keys.nested(key) if isinstance(keys.get(key), dict) else None
    if by_name is None:
        listed = keys.token_ids(key)
        return (("", listed),) if listed else ()
    found = []
    for label in by_name.values:
        token_ids = by_name.token_ids(label)
        if not token_ids:
            raise by_name.refusal(label, "it must be a list of token ids")
        found.append((label.removeprefix(f"{key}."), token_ids))
    return tuple(found)


def _block_diagonal(keys: ConfigKeys | None) -> BlockDiagonal | None:
    if keys is None:
        return None
    prefix = "use_bdlora."
    a_names, b_names = (keys.name_list(f"{prefix}target_modules_bd_{side}") for side in ("a", "b"))
    if not a_names and not b_names:
        raise AdapterError(
            f"{CONFIG_FILE}: use_bdlora names no block-diagonal matrices: set"
            " target_modules_bd_a or target_modules_bd_b, or use_bdlora to null"
        )
    num_blocks = keys.rank(f"{prefix}nblocks", 1)
    return BlockDiagonal(a_names, b_names, num_blocks, keys.flag(f"{prefix}match_strict", True))


def _init_name(init: Any) -> str:
    """An init_lora_weights that is a name, as PEFT compares it; else ""."""
    name = init if isinstance(init, str) else ""
    return name.lower() if name.lower() in FOLDED_INITS else name


def _decomposition(keys: ConfigKeys, init: Any) -> str:
    if init is None or isinstance(init, bool):
        return ""
    name = _init_name(init)
    if name in PLAIN_INITS:
        return ""
    if name in DECOMPOSED_INITS:
        return name
    if name.startswith(CONVERTIBLE_INITS):
        advice = (
            "it changed the base weights; save the adapter as plain LoRA with PEFT's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif name == "loftq":
        advice = "it belongs to a quantised base, not to this one; train it on the base as it is"
    else:
        advice = f"it must be true, false or one of {', '.join(PLAIN_INITS + DECOMPOSED_INITS)}"
    raise keys.refusal("init_lora_weights", advice)


def _check_combination(keys: ConfigKeys, config: LoraConfig) -> None:
    """Refuse what PEFT does not combine, and what one segment of tokens cannot express."""
    if config.has_lora_bias and (config.variant in ("dora", "qalora") or config.decomposition):
        other = config.variant or config.decomposition
        raise keys.refusal("lora_bias", f"PEFT does not combine it with {other}; set it to false")
    if config.variant != "alora":
        return
    reasons = {
        "bias": config.bias != "none",
        "init_lora_weights": bool(config.decomposition),
        "modules_to_save": bool(config.replaced),
        "trainable_token_indices": bool(config.token_ids),
    }
    for key, is_on in reasons.items():
        if is_on:
            raise keys.refusal(
                key,
                "with alora_invocation_tokens it would also act before the invocation; train the"
                " adapter without it",
            )
