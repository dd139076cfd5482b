"""What a LoRA config means for one base: modules, overlays, and the names and shapes of tensors.

Knows PEFT's names and its rules for tied embeddings; reads no files and no weights. Asked by
adapters/methods/lora and lora_weights.
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from loraswarm.adapters.adapter import EMBEDDING_A, ModuleInfo, OverlayInfo, VectorName
from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.methods.lora_config import LoraConfig
from loraswarm.adapters.methods.lora_overlays import (
    TABLES,
    Replacement,
    one_role_each,
    saved_paths,
    table_copies,
    token_paths,
    token_rows,
    whole_module,
)
from loraswarm.adapters.module_selection import compiled, replaced_expression
from loraswarm.adapters.plan import PREFIX, AdapterPlan
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape
from loraswarm.errors import AdapterError

# PEFT's word for "adapt nothing", for adapters that only replace modules.
NO_TARGETS = "dummy-target-modules"
DELTA = ".token_adapter.trainable_tokens_delta"
_TABLE_NAMES = tuple(path.rpartition(".")[2] for path in TABLES)


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """A plan and what reading needs besides: `config` as it is in force on this base."""

    config: LoraConfig
    plan: AdapterPlan
    replacements: tuple[Replacement, ...]


def tensor_name(config: LoraConfig, path: str, part: str) -> str:
    """`part` is a tensor's own name (lora_A.weight), into which PEFT puts the adapter's name."""
    head, _, tail = part.partition(".")
    if config.name_infix:
        head = f"{head}.{config.name_infix}"
        tail = tail or ("weight" if part == "lora_magnitude_vector" else "")
    return f"{PREFIX}{path}.{head}.{tail}" if tail else f"{PREFIX}{path}.{head}"


def matrix_names(config: LoraConfig, path: str) -> tuple[str, str]:
    """Names of A [rank, in] and B [out, rank] of the module at `path`."""
    suffixes = ("lora_A.weight", "lora_B.weight")
    if path == EMBEDDING:
        suffixes = ("lora_embedding_A", "lora_embedding_B")
    return tensor_name(config, path, suffixes[0]), tensor_name(config, path, suffixes[1])


def bias_name(path: str, is_adapted: bool) -> str:
    """The name of a trained bias of the base: inside the adapted module, or where it was."""
    return f"{PREFIX}{path}.base_layer.bias" if is_adapted else f"{PREFIX}{path}.bias"


def block_side(config: LoraConfig, path: str) -> str:
    """Which matrix of the module at `path` is block-diagonal: "A", "B" or ""."""
    return config.block_diagonal.side(path) if config.block_diagonal is not None else ""


def trains_bias(config: LoraConfig, shape: BaseShape, module: ModuleInfo) -> bool:
    """Whether the file has a bias of its own for the base's linear at this site."""
    is_adapted = module.rank > 0
    is_trained = config.bias == "all" or (config.bias == "lora_only" and is_adapted)
    return is_trained and shape.has_bias(module.site)


def has_lora_bias(config: LoraConfig, path: str) -> bool:
    """Whether B of the adapted module at `path` has a bias; a block-diagonal B has none."""
    return config.has_lora_bias and block_side(config, path) != "B"


@lru_cache(maxsize=256)
def layout_of(config: LoraConfig, shape: BaseShape) -> LoraLayout:
    """A few milliseconds for a new config; nothing for one seen before.

    Raises    AdapterError naming the key and the module that cannot be applied.
    """
    config, saved_together, adapted_together = _tied(config, shape)
    sites = range(shape.head_site + 1)
    adapted = [site for site in sites if config.selection.selects(shape.site_path(site))]
    if adapted_together and shape.head_site not in adapted:
        adapted.append(shape.head_site)
    replacements = _replacements(config, shape, saved_together)
    if not adapted and not (config.selection.targets == NO_TARGETS and replacements):
        raise AdapterError(
            f"{CONFIG_FILE}: target_modules selects no linear of the base"
            f" ({shape.num_layers} layers of {', '.join(TARGETS)}), nor embed_tokens or lm_head"
        )
    _check_modules(config, shape, adapted, adapted_together)
    paths = {shape.site_path(site) for site in adapted}
    one_role_each({"target_modules": paths, "an overlay": _replaced_alone(config, replacements)})
    modules = _modules(config, shape, frozenset(adapted))
    overlays = [found.info for found in replacements]
    if EMBEDDING in paths:
        rank = config.rank_of(EMBEDDING)
        overlays.insert(0, OverlayInfo((EMBEDDING_A,), shape.vocab_size, rank))
    plan = AdapterPlan(
        config.method,
        modules,
        _tensor_shapes(config, shape, modules) | _replacement_shapes(replacements),
        overlays=tuple(overlays),
        invocation_tokens=config.invocation_tokens,
        copies=_copies(config, shape, modules, replacements),
        advice=_advice(config, shape, adapted),
    )
    return LoraLayout(config, plan, replacements)


def matrix_shapes(
    config: LoraConfig, shape: BaseShape, site: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B in the file.

    Raises    AdapterError for groups or blocks that do not divide the sizes.
    """
    path = shape.site_path(site)
    in_size, out_size = shape.site_sizes(site)
    rank, side = config.rank_of(path), block_side(config, path)
    num_blocks = config.block_diagonal.num_blocks if config.block_diagonal is not None else 1
    sizes = {"A": (in_size, rank), "B": (rank, out_size)}.get(side, (num_blocks,))
    if any(size % num_blocks for size in sizes):
        raise AdapterError(
            f"{CONFIG_FILE}: use_bdlora.nblocks is {num_blocks}, which does not divide the sizes"
            f" {sizes} of {path!r}"
        )
    if config.variant == "qalora":
        if in_size % config.group_size:
            raise AdapterError(
                f"{CONFIG_FILE}: qalora_group_size is {config.group_size}, which does not divide"
                f" the {in_size} inputs of {path!r}"
            )
        return (rank, in_size // config.group_size), (out_size, rank)
    in_blocks, rank_blocks = {"A": (num_blocks, 1), "B": (1, num_blocks)}.get(side, (1, 1))
    return (rank, in_size // in_blocks), (out_size, rank // rank_blocks)


def _tied(config: LoraConfig, shape: BaseShape) -> tuple[LoraConfig, bool, bool]:
    """What ensure_weight_tying makes of a config: if a table is named, both are meant.

    Returns the config, whether both are saved together, and whether both are adapted together.
    """
    if not (config.ensures_tying and shape.ties_embeddings):
        return config, False, False
    selection = config.selection
    if any(name.rpartition(".")[2] in _TABLE_NAMES for name in config.replaced):
        names = list(config.replaced)
        if EMBEDDING not in names:
            names.append(EMBEDDING)
        head = (name for name in names if compiled(replaced_expression(name)).match(LM_HEAD))
        found = next(head, None)
        if found is not None:
            names.remove(found)
        replaced = tuple(names)
        selection = replace(selection, replaced=replaced)
        return replace(config, replaced=replaced, selection=selection), True, False
    targets = selection.targets
    if isinstance(targets, str):
        if not any(compiled(targets).fullmatch(name) for name in _TABLE_NAMES):
            return config, False, False
        wider: str | frozenset[str] = f"(?:{targets}|^{re.escape(EMBEDDING)}$)"
    else:
        if not any(name.rpartition(".")[2] in _TABLE_NAMES for name in targets):
            return config, False, False
        wider = targets | {EMBEDDING}
    selection = replace(selection, targets=wider)
    head_is_tied = not config.init_unties
    return replace(config, selection=selection, head_is_tied=head_is_tied), False, True


def _replaced_alone(config: LoraConfig, replacements: Iterable[Replacement]) -> list[str]:
    """Overlaid modules that cannot be adapted as well.

    PEFT puts LoRA around the lm_head's tied tokens; the norms of DoRA would be theirs.
    """
    paths = [path for found in replacements for path in found.info.paths]
    for found in replacements:
        are_tied = found.info.token_ids is not None and found.info.paths == TABLES
        if are_tied and config.variant != "dora":
            paths.remove(LM_HEAD)
    return paths


def _replacements(
    config: LoraConfig, shape: BaseShape, saved_together: bool
) -> tuple[Replacement, ...]:
    saved = saved_paths(config.replaced, shape)
    tokens: dict[str, tuple[int, ...]] = {}
    for name, token_ids in config.token_ids:
        paths = token_paths(name, shape)
        one_role_each({"trainable_token_indices": [*tokens, *paths]})
        tokens |= dict.fromkeys(paths, token_ids)
    # PEFT ties the lm_head's tokens to the embedding's unless they are listed and differ.
    is_tied = shape.ties_embeddings and EMBEDDING in tokens
    same = tokens.get(LM_HEAD, tokens.get(EMBEDDING)) == tokens.get(EMBEDDING)
    if is_tied and config.ensures_tying and not same:
        raise AdapterError(
            f"{CONFIG_FILE}: trainable_token_indices lists other tokens for lm_head than for"
            " embed_tokens, which ensure_weight_tying ties; list the same, or set it to false"
        )
    if is_tied and same:
        tokens[LM_HEAD] = tokens[EMBEDDING]
    one_role_each({"modules_to_save": saved, "trainable_token_indices": tokens})
    found = []
    if saved_together:
        saved = [path for path in saved if path not in TABLES]
        found.append(whole_module(TABLES, ".weight", shape))
    found += [whole_module((path,), ".weight", shape) for path in saved]
    if is_tied and same:
        names = [f"{PREFIX}{EMBEDDING}{DELTA}"]
        return (*found, token_rows(TABLES, names, tokens[EMBEDDING], shape))
    for path, token_ids in tokens.items():
        found.append(token_rows((path,), [f"{PREFIX}{path}{DELTA}"], token_ids, shape))
    return tuple(found)


def _check_modules(
    config: LoraConfig, shape: BaseShape, adapted: list[int], adapted_together: bool
) -> None:
    """Refuse what PEFT does not do to the embedding, or cannot do again to the base."""
    has_embedding = shape.embedding_site in adapted
    if has_embedding and (config.variant not in ("", "dora") or config.has_lora_bias):
        key = config.variant if config.variant not in ("", "dora") else "lora_bias"
        raise AdapterError(
            f"{CONFIG_FILE}: target_modules selects {EMBEDDING!r}, which PEFT does not adapt with"
            f" {key}; take it out of target_modules"
        )
    if adapted_together and not has_embedding:
        raise AdapterError(
            f"{CONFIG_FILE}: ensure_weight_tying ties {LM_HEAD!r} to {EMBEDDING!r}, which is not"
            " adapted; take it out of exclude_modules"
        )
    for token_id in config.invocation_tokens or ():
        if token_id >= shape.vocab_size:
            raise AdapterError(
                f"{CONFIG_FILE}: alora_invocation_tokens has {token_id}, which is none of this"
                f" base's {shape.vocab_size} tokens; the adapter belongs to another base model"
            )
    if config.decomposition:
        _check_decomposition(config, shape, adapted)


def _check_decomposition(config: LoraConfig, shape: BaseShape, adapted: list[int]) -> None:
    """Refuse where the base cannot be changed again as PEFT changed it."""
    advice = (
        "save the adapter as plain LoRA with PEFT's save_pretrained(...,"
        " path_initial_model_for_weight_conversion=...)"
    )
    key = f"{CONFIG_FILE}: init_lora_weights is {config.decomposition!r}:"
    if shape.head_site in adapted:
        raise AdapterError(f"{key} it changed {LM_HEAD!r} before it was copied; {advice}")
    for site in adapted:
        path = shape.site_path(site)
        if site < shape.num_linears and config.rank_of(path) > min(shape.site_sizes(site)):
            raise AdapterError(f"{key} the rank of {path!r} exceeds its size; {advice}")
        if config.decomposition == "pissa" and config.scale_of(path) <= 0:
            raise AdapterError(f"{key} it needs a lora_alpha above 0 for {path!r}; {advice}")


def _advice(config: LoraConfig, shape: BaseShape, adapted: Iterable[int]) -> str:
    if not config.decomposition:
        return ""
    num_weights = sum(site < shape.num_linears for site in adapted)
    return (
        f"init_lora_weights is {config.decomposition!r}: each load decomposes {num_weights} base"
        " weights anew; convert the adapter once with PEFT's save_pretrained(...,"
        " path_initial_model_for_weight_conversion=...)"
    )


def _modules(
    config: LoraConfig, shape: BaseShape, adapted: frozenset[int]
) -> tuple[ModuleInfo, ...]:
    modules = []
    for site in range(shape.head_site + 1):
        path = shape.site_path(site)
        is_biased = shape.has_bias(site)
        if site not in adapted:
            if config.bias == "all" and is_biased:
                modules.append(ModuleInfo(site, 0, 1.0, ("c",)))
            continue
        vectors: list[VectorName] = ["g"] if config.variant == "dora" else []
        changes_bias = config.variant == "dora" or config.bias != "none"
        if has_lora_bias(config, path) or (is_biased and changes_bias):
            vectors.append("c")
        rank = config.rank_of(path)
        if config.decomposition and site < shape.num_linears:
            rank *= 2
        modules.append(ModuleInfo(site, rank, config.scale_of(path), tuple(vectors)))
    return tuple(modules)


def _tensor_shapes(
    config: LoraConfig, shape: BaseShape, modules: Iterable[ModuleInfo]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        path = shape.site_path(module.site)
        out_size = (shape.site_sizes(module.site)[1],)
        if trains_bias(config, shape, module):
            shapes[bias_name(path, module.rank > 0)] = out_size
        if module.rank == 0:
            continue
        name_a, name_b = matrix_names(config, path)
        shapes[name_a], shapes[name_b] = matrix_shapes(config, shape, module.site)
        if "g" in module.vectors:
            shapes[tensor_name(config, path, "lora_magnitude_vector")] = out_size
        if has_lora_bias(config, path):
            shapes[tensor_name(config, path, "lora_B.bias")] = out_size
    return shapes


def _replacement_shapes(replacements: Iterable[Replacement]) -> dict[str, tuple[int, ...]]:
    return {name: found.shape for found in replacements for name in found.names}


def _copies(
    config: LoraConfig,
    shape: BaseShape,
    modules: Iterable[ModuleInfo],
    replacements: Iterable[Replacement],
) -> dict[str, tuple[int, ...]]:
    """Base weights that PEFT may have put into the file, and what only training looks at."""
    suffixes = dict.fromkeys(TABLES, ".weight")
    for found in replacements:
        for path in found.info.paths:
            if found.info.token_ids is None:
                suffixes.pop(path, None)
            else:
                suffixes[path] = ".token_adapter.base_layer.weight"
    copies: dict[str, tuple[int, ...]] = {}
    for module in modules:
        path = shape.site_path(module.site)
        if path in TABLES:
            suffixes[path] = ".base_layer.weight"
        in_size = shape.site_sizes(module.site)[0]
        state: dict[str, tuple[int, ...]] = {}
        if config.variant == "velora":
            state = {"lora_velora_embed": (-(-in_size // config.num_groups),)}
        elif config.variant == "monteclora":
            rank, samples = config.rank_of(path), config.num_samples
            sampler = {
                "std_prior": (rank,),
                "gaussian_var_prior": (rank, rank),
                "expert_weights": (samples,),
                "expert_weights_prior": (samples,),
            }
            state = {f"lora_monteclora_sampler.{name}": size for name, size in sampler.items()}
        if module.rank > 0:
            copies |= {tensor_name(config, path, part): size for part, size in state.items()}
    return copies | table_copies(shape, suffixes)
