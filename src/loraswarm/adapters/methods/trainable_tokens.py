"""Trained rows of single tokens, as a method of its own: peft_type TRAINABLE_TOKENS.

Owns the config's keys and PEFT's names; the rows become overlays as those of LoRA's
trainable_token_indices do. Called through adapters/methods.
Source    peft 0.21: tuners/trainable_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods.lora_overlays import (
    TABLES,
    Replacement,
    check_copies,
    check_vocabulary,
    read_replacement,
    table_copies,
    token_rows,
)
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import PREFIX, AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = frozenset({"token_indices", "target_modules"})
INERT_KEYS = frozenset({"init_weights"})
DELTA = ".trainable_tokens_delta"


class TrainableTokens:
    """`Method` of peft_type TRAINABLE_TOKENS."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        keys.check(READ_KEYS, INERT_KEYS, {})
        replacements = _replacements(keys, shape)
        paths = [path for found in replacements for path in found.info.paths]
        suffixes = {path: ".base_layer.weight" if path in paths else ".weight" for path in TABLES}
        copies = table_copies(shape, suffixes)
        shapes = {name: found.shape for found in replacements for name in found.names}
        check_vocabulary(source, copies, shape)
        return AdapterPlan(
            "trainable_tokens",
            (),
            shapes,
            overlays=tuple(found.info for found in replacements),
            copies={name: size for name, size in copies.items() if name in source.tensors},
        )

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        check_copies(plan.copies, tensors, base)
        found = _replacements(keys, base.shape)
        return AdapterWeights((), tuple(read_replacement(each, tensors) for each in found))


def _replacements(keys: ConfigKeys, shape: BaseShape) -> tuple[Replacement, ...]:
    token_ids = keys.token_ids("token_indices")
    if not token_ids:
        raise keys.refusal("token_indices", "it must list the trained tokens")
    selection = ModuleSelection(keys.names("target_modules") or frozenset({EMBEDDING}))
    paths = [path for path in TABLES if selection.selects(path)]
    _check_others(selection, shape)
    if not paths:
        raise keys.refusal("target_modules", "it selects neither embed_tokens nor lm_head")
    if not (shape.ties_embeddings and EMBEDDING in paths):
        return tuple(
            token_rows((path,), [f"{PREFIX}{path}{DELTA}"], token_ids, shape) for path in paths
        )
    if LM_HEAD in paths:
        raise keys.refusal(
            "target_modules",
            "this base ties lm_head to embed_tokens, and PEFT cannot run an adapter that names"
            " both; name embed_tokens only",
        )
    return (token_rows(TABLES, [f"{PREFIX}{path}{DELTA}" for path in TABLES], token_ids, shape),)


def _check_others(selection: ModuleSelection, shape: BaseShape) -> None:
    others = [shape.site_path(site) for site in range(shape.num_linears)]
    for path in (*others, *shape.norm_sizes()):
        if selection.selects(path):
            raise AdapterError(
                f"{CONFIG_FILE}: target_modules selects {path!r}, which has no rows of tokens;"
                " tokens can be trained in embed_tokens and lm_head"
            )
