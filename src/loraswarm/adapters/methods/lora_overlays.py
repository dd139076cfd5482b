"""Whole modules and rows of tokens that an adapter brings along, as overlays.

modules_to_save and trained tokens by PEFT's rules: which modules a name means, and which tensors
stand for tied ones. Used by LoRA, by the methods that are nothing else, and by low_rank.
Source    peft 0.21: utils/other.py, set_additional_trainable_modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, OverlayInfo
from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.plan import PREFIX
from loraswarm.adapters.printable import shortened
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.adapters.tensors import TensorReader

TABLES = (EMBEDDING, LM_HEAD)
_COPY_SUFFIXES = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
SERVED = "norms, embed_tokens and lm_head"


@dataclass(frozen=True, slots=True)
class Replacement:
    """One overlay and the tensors it is read from.

    Tied modules have a tensor each in `names`, which must be equal. Row i of the overlay is row
    `order[i]` of the tensor; all rows as they are if `order` is None.
    """

    info: OverlayInfo
    names: tuple[str, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None


def whole_module(paths: Sequence[str], suffix: str, shape: BaseShape) -> Replacement:
    """The weight of a norm, of the embedding or of the lm_head, by PEFT's name for its tensor."""
    size = shape.norm_sizes().get(paths[0])
    names = tuple(f"{PREFIX}{path}{suffix}" for path in paths)
    if size is not None:
        return Replacement(OverlayInfo(tuple(paths), 1, size), names, (size,))
    rows = (shape.vocab_size, shape.hidden_size)
    return Replacement(OverlayInfo(tuple(paths), *rows), names, rows)


def token_rows(
    paths: Sequence[str], names: Sequence[str], token_ids: Sequence[int], shape: BaseShape
) -> Replacement:
    """Rows of some tokens in the embedding and, tied to it, in the lm_head.

    Raises    AdapterError for a token that is listed twice or that the base does not have.
    """
    seen: set[int] = set()
    for token_id in token_ids:
        if token_id >= shape.vocab_size:
            raise AdapterError(
                f"{CONFIG_FILE}: the trained token {token_id} is none of this base's"
                f" {shape.vocab_size} tokens; serve the base whose vocabulary was extended for it"
            )
        if token_id in seen:
            raise AdapterError(
                f"{CONFIG_FILE}: the trained token {token_id} is listed twice; which row counts is"
                " not defined"
            )
        seen.add(token_id)
    order = tuple(sorted(range(len(token_ids)), key=token_ids.__getitem__))
    ascending = tuple(token_ids[row] for row in order)
    size = (len(token_ids), shape.hidden_size)
    return Replacement(OverlayInfo(tuple(paths), *size, ascending), tuple(names), size, order)


def saved_paths(names: Iterable[str], shape: BaseShape) -> list[str]:
    """The modules that modules_to_save names: all whose path ends with a name, words or not.

    Raises    AdapterError for a name that means anything but a norm, the embedding or the lm_head.
    """
    names = tuple(names)
    served = [EMBEDDING, *shape.norm_sizes(), LM_HEAD]
    for path in _other_paths(shape) if names else ():
        for name in names:
            if path.endswith(name):
                raise AdapterError(
                    f"{CONFIG_FILE}: modules_to_save names {shortened(name)}, which means"
                    f" {path or 'the whole model'!r}; of fully trained modules only {SERVED} are"
                    " served: adapt the others with LoRA"
                )
    return [path for path in served if any(path.endswith(name) for name in names)]


def token_paths(name: str, shape: BaseShape) -> list[str]:
    """The tables that a name in trainable_token_indices means; "" is the embedding.

    Raises    AdapterError for a name that means nothing, or anything else.
    """
    if not name:
        return [EMBEDDING]
    others = [path for path in (*_other_paths(shape), *shape.norm_sizes()) if path.endswith(name)]
    paths = [path for path in TABLES if path.endswith(name)]
    if others or not paths:
        raise AdapterError(
            f"{CONFIG_FILE}: trainable_token_indices names {shortened(name)}, which is"
            f" {'the ' + others[0] if others else 'no module'} of this base; tokens can be trained"
            " in embed_tokens and lm_head"
        )
    return paths


def one_role_each(roles: Mapping[str, Iterable[str]]) -> None:
    """Refuse a module that two config keys change: `roles` has the paths that each key names."""
    seen: dict[str, str] = {}
    for key, paths in roles.items():
        for path in paths:
            if path in seen:
                raise AdapterError(
                    f"{CONFIG_FILE}: {path!r} is changed by {seen[path]} and by {key}, which is not"
                    " one exact update; keep one of them"
                )
            seen[path] = key


def table_copies(shape: BaseShape, suffixes: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """PEFT's copies of the embedding and the lm_head: by path the suffix of the tensor's name."""
    size = (shape.vocab_size, shape.hidden_size)
    return {f"{PREFIX}{path}{suffix}": size for path, suffix in suffixes.items()}


def check_vocabulary(
    source: AdapterSource, shapes: Mapping[str, tuple[int, ...]], shape: BaseShape
) -> None:
    """A tensor for another number of tokens than the base's gets a message of its own."""
    for path in TABLES:
        for name, spec in source.tensors.items():
            expected = shapes.get(name)
            if expected is None or not name.startswith(PREFIX + path):
                continue
            wrong = [
                found
                for found, size in zip(spec.shape, expected, strict=False)
                if size == shape.vocab_size and found != size
            ]
            if wrong and len(spec.shape) == len(expected):
                raise AdapterError(
                    f"{source.label}: tensor {name!r} is for a vocabulary of {wrong[0]} tokens;"
                    f" this base has {shape.vocab_size}: serve the base whose embeddings were"
                    " resized for it"
                )


def read_replacement(replacement: Replacement, tensors: TensorReader) -> Tensor:
    """Rows [num_rows, width] in the base's dtype.

    Raises    AdapterError naming two tensors of tied modules that differ.
    """
    # PEFT keeps the last.
    *others, last = replacement.names
    rows = tensors.cast(last)
    for name in others:
        if not tensors.agree(name, last):
            raise AdapterError(
                f"tensors {name!r} and {last!r} differ although the config ties them; train"
                " with ensure_weight_tying set to false, or make them equal"
            )
    if replacement.order is not None and list(replacement.order) != sorted(replacement.order):
        rows = rows[list(replacement.order)]
    return rows.reshape(replacement.info.num_rows, replacement.info.width)


def check_copies(names: Iterable[str], tensors: TensorReader, base: BaseWeights) -> None:
    """Refuse a copy of the embedding or the lm_head that is not the base's own: PEFT would load it.

    Other names are passed over. Copies may have been rounded, or be kept wider, than the base as
    it is served.
    """
    # Imported here: planning must not need torch.
    import torch

    paths = {f"{PREFIX}{path}{end}": path for path in TABLES for end in _COPY_SUFFIXES}
    for name in [name for name in names if name in paths]:
        path = paths[name]
        weight, copied = base.weight(path), tensors.cast(name)
        widths = (weight.dtype, torch.bfloat16, torch.float16)
        if not any(copied.equal(weight.to(width).to(copied.dtype)) for width in widths):
            raise AdapterError(
                f"tensor {name!r} is a copy of a base weight, but not of this base's; if it was"
                f" trained, name {path.rpartition('.')[2]!r} in modules_to_save"
            )


def _other_paths(shape: BaseShape) -> list[str]:
    """Modules with weights inside that are no norm and no table."""
    paths = ["", "model", "model.layers"]
    for layer in range(shape.num_layers):
        block = f"model.layers.{layer}"
        paths += [block, f"{block}.self_attn", f"{block}.mlp"]
    return paths + [shape.site_path(site) for site in range(shape.num_linears)]
