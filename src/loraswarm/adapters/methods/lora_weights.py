"""The values of a LoRA adapter in the general form: matrices, gains, biases and overlays.

Recomputes from the base what PEFT recomputes: DoRA's norms, and the parts of base weights that
PiSSA and OLoRA moved into A and B. Called by adapters/methods/lora; the file has been checked.
Legend: R rank, I in features, O out features, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights, VectorName
from loraswarm.adapters.methods.lora_config import LoraConfig
from loraswarm.adapters.methods.lora_overlays import TABLES, check_copies, read_replacement
from loraswarm.adapters.methods.lora_plan import (
    LoraLayout,
    bias_name,
    block_side,
    has_lora_bias,
    matrix_names,
    tensor_name,
    trains_bias,
)
from loraswarm.adapters.plan import AdapterWeights
from loraswarm.adapters.tensors import TensorReader
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD
from loraswarm.errors import AdapterError

# Elements of a base weight that are held in float32 at a time: few enough for a core's cache.
CHUNK_ELEMENTS = 1 << 18


def read_lora(
    layout: LoraLayout, copies: Iterable[str], tensors: TensorReader, base: BaseWeights
) -> AdapterWeights:
    """Weights of the layout's modules and overlays; `copies` are those that the file has.

    Cost      DoRA reads every adapted base weight once; PiSSA and OLoRA decompose each.
    Raises    AdapterError naming the tensor that is not finite, out of range or not the base's.
    """
    check_copies(copies, tensors, base)
    config = layout.config
    modules, overlays = [], []
    for module in layout.plan.modules:
        weights, table_VR = _read_module(module, config, tensors, base)
        modules.append(weights)
        if table_VR is not None:
            overlays.append(table_VR)
    if config.head_is_tied:
        _check_tied(config, tensors)
    overlays += [read_replacement(found, tensors) for found in layout.replacements]
    return AdapterWeights(tuple(modules), tuple(overlays))


def _read_module(
    module: ModuleInfo, config: LoraConfig, tensors: TensorReader, base: BaseWeights
) -> tuple[ModuleWeights, Tensor | None]:
    """The module, and of the embedding its A transposed [vocabulary, rank]."""
    path = base.shape.site_path(module.site)
    if module.rank == 0:
        vectors = _vectors(module, config, None, tensors, base)
        return ModuleWeights(module, None, None, vectors), None
    name_a, name_b = matrix_names(config, path)
    gains_O: Tensor | None = None
    moved = config.decomposition and path not in TABLES
    if moved or config.variant in ("dora", "bdlora", "qalora"):
        a_RI, b_OR = _wide_matrices(module, config, tensors, base)
        if config.variant == "dora":
            gains_O = _gains(module, config, (a_RI, b_OR), tensors, base)
        a_RI, b_OR = tensors.fit(name_a, a_RI), tensors.fit(name_b, b_OR)
    else:
        a_RI, b_OR = _stored_matrices(path, config, tensors.cast)
    vectors = _vectors(module, config, gains_O, tensors, base)
    bt_RO = b_OR.t().contiguous()
    if path == EMBEDDING:
        return ModuleWeights(module, None, bt_RO, vectors), a_RI.t().contiguous()
    return ModuleWeights(module, a_RI, bt_RO, vectors), None


def _wide_matrices(
    module: ModuleInfo, config: LoraConfig, tensors: TensorReader, base: BaseWeights
) -> tuple[Tensor, Tensor]:
    """A and B in float32 as they multiply the base's inputs."""
    path = base.shape.site_path(module.site)
    a_RI, b_OR = _stored_matrices(path, config, tensors.wide)
    if config.variant == "qalora":
        # Inputs are averaged over groups and scaled by the number of groups.
        weight = a_RI.shape[1] / config.group_size
        a_RI = (a_RI * weight).repeat_interleave(config.group_size, dim=1)
    if config.block_diagonal is not None:
        num_blocks = config.block_diagonal.num_blocks
        side = block_side(config, path)
        a_RI = _spread(a_RI, num_blocks) if side == "A" else a_RI
        b_OR = _spread(b_OR, num_blocks) if side == "B" else b_OR
    if config.decomposition and path not in TABLES:
        moved_a_RI, moved_b_OR = _moved(config, path, base)
        a_RI = torch.cat([a_RI, moved_a_RI])
        b_OR = torch.cat([b_OR, -moved_b_OR], dim=1)
    return a_RI, b_OR


def _stored_matrices(
    path: str, config: LoraConfig, read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """A and B of the file; where the lm_head is tied, PEFT keeps its ends for the embedding."""
    if path == EMBEDDING and config.head_is_tied:
        head_a, head_b = matrix_names(config, LM_HEAD)
        return read(head_b).t(), read(head_a).t()
    name_a, name_b = matrix_names(config, path)
    return read(name_a), read(name_b)


def _spread(stacked: Tensor, num_blocks: int) -> Tensor:
    """Blocks that are stored one above the other, put on the diagonal of a matrix of zeros."""
    width = stacked.shape[1]
    spread = stacked.new_zeros(stacked.shape[0], width * num_blocks)
    height = stacked.shape[0] // num_blocks
    for index, block in enumerate(stacked.chunk(num_blocks)):
        rows = slice(index * height, (index + 1) * height)
        spread[rows, index * width : (index + 1) * width] = block
    return spread


def _moved(config: LoraConfig, path: str, base: BaseWeights) -> tuple[Tensor, Tensor]:
    """A0 and B0 as PEFT initialised them; scale * B0 A0 was taken out of the base's weight."""
    rank = config.rank_of(path)
    weight_OI = base.weight(path).float()
    if config.decomposition == "olora":
        q_OK, r_KI = torch.linalg.qr(weight_OI)
        return r_KI[:rank], q_OK[:, :rank]
    left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    roots_R = (values_K[:rank] / config.scale_of(path)).sqrt()
    return roots_R[:, None] * right_KI[:rank], left_OK[:, :rank] * roots_R


def _gains(
    module: ModuleInfo,
    config: LoraConfig,
    matrices: tuple[Tensor, Tensor],
    tensors: TensorReader,
    base: BaseWeights,
) -> Tensor:
    """DoRA's magnitude over the norm of W + scale B A, for each output."""
    path = base.shape.site_path(module.site)
    name = tensor_name(config, path, "lora_magnitude_vector")
    norms = _table_norms if path == EMBEDDING else _row_norms
    gains_O = tensors.wide(name) / norms(base.weight(path), *matrices, module.scale)
    if not torch.isfinite(gains_O).all():
        raise AdapterError(
            f"tensor {name!r}: the norm of an updated row of {path!r} is 0 or not finite, so its"
            " magnitude cannot be applied"
        )
    return gains_O


def _row_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """[O] float32: norms of the rows of W + scale B A."""
    out_size, in_size = weight_OI.shape
    step = max(1, CHUNK_ELEMENTS // in_size)
    norms = []
    for start in range(0, out_size, step):
        rows = slice(start, start + step)
        updated_OI = torch.addmm(weight_OI[rows].float(), b_OR[rows], a_RI, alpha=scale)
        norms.append(torch.linalg.vector_norm(updated_OI, dim=1))
    return torch.cat(norms)


def _table_norms(weight_VD: Tensor, a_RV: Tensor, b_DR: Tensor, scale: float) -> Tensor:
    """[D] float32: norms over the vocabulary of W + scale (B A) transposed."""
    vocab_size, hidden_size = weight_VD.shape
    step = max(1, CHUNK_ELEMENTS // hidden_size)
    squares_D = torch.zeros(hidden_size, dtype=torch.float64)
    for start in range(0, vocab_size, step):
        rows = slice(start, start + step)
        updated_VD = torch.addmm(weight_VD[rows].float(), a_RV[:, rows].T, b_DR.T, alpha=scale)
        squares_D += updated_VD.double().square().sum(dim=0)
    return squares_D.sqrt().float()


def _vectors(
    module: ModuleInfo,
    config: LoraConfig,
    gains_O: Tensor | None,
    tensors: TensorReader,
    base: BaseWeights,
) -> dict[VectorName, Tensor]:
    """g, and c = bias' - g * bias, in float32; exactly those that the plan names."""
    vectors: dict[VectorName, Tensor] = {} if gains_O is None else {"g": gains_O}
    if "c" not in module.vectors:
        return vectors
    path = base.shape.site_path(module.site)
    left_O = torch.zeros(base.shape.site_sizes(module.site)[1])
    if base.shape.has_bias(module.site):
        bias_O = base.bias(path)
        assert bias_O is not None
        left_O = bias_O.float()
        kept_O = left_O if gains_O is None else gains_O * left_O
        if trains_bias(config, base.shape, module):
            left_O = tensors.wide(bias_name(path, module.rank > 0))
        left_O = left_O - kept_O
    if module.rank > 0 and has_lora_bias(config, path):
        left_O = left_O + module.scale * tensors.wide(tensor_name(config, path, "lora_B.bias"))
    vectors["c"] = left_O
    return vectors


def _check_tied(config: LoraConfig, tensors: TensorReader) -> None:
    """Both ends of a tied LoRA are saved; PEFT keeps one of them."""
    table_a, table_b = matrix_names(config, EMBEDDING)
    head_a, head_b = matrix_names(config, LM_HEAD)
    for name, other in ((head_a, table_b), (head_b, table_a)):
        if not tensors.agree(name, other, is_transposed=True):
            raise AdapterError(
                f"tensor {name!r} differs from {other!r}, transposed, although"
                " ensure_weight_tying ties them; train with it set to false, or make them equal"
            )
