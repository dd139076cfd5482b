"""Adapters applied the plain way: to the weights of a transformers model.

For tests of adapters/methods: what a method reads, put into the general form
y = g * (W x + v * (B (scale * u * (A x)))) + bias, must give the logits that PEFT gives. Knows no
files and no methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_factory import load_peft_adapter, peft_warnings_ignored, shape_of
from loraswarm.adapters.adapter import EMBEDDING_A, Adapter, ModuleWeights
from loraswarm.adapters.reading import read_adapter, read_adapter_info
from loraswarm.core.base_shape import EMBEDDING, BaseShape
from tolerance import TOLERANCE, assert_close

TOKENS = torch.tensor([[3, 7, 1, 132, 7, 21, 64], [5, 5, 130, 2, 9, 88, 3]])


class ModelBase:
    """A transformers model as `BaseWeights`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shape: BaseShape = shape_of(model)
        self._modules = dict(model.named_modules())

    def weight(self, path: str) -> Tensor:
        return self._modules[path].weight.detach()

    def bias(self, path: str) -> Tensor | None:
        bias = getattr(self._modules[path], "bias", None)
        return None if bias is None else bias.detach()


def save_peft(
    model: PreTrainedModel,
    path: Path,
    config: Any,
    *,
    seed: int = 0,
    randomize: Callable[[str, Tensor, torch.Generator], Tensor | None] | None = None,
) -> None:
    """Adapt a copy of `model` with PEFT's `config` (any PeftConfig), make every trainable
    parameter random, save to `path`.

    `randomize(name, parameter, generator)` may return other values for a parameter; None keeps the
    default, N(0, 0.2) around what PEFT initialised.
    """
    from peft import get_peft_model

    with peft_warnings_ignored():
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad or not parameter.is_floating_point():
                continue
            values = randomize(name, parameter, generator) if randomize else None
            if values is None:
                values = parameter + torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(values)
    with peft_warnings_ignored():
        adapted.save_pretrained(str(path))


def logits_of(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def read(model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32) -> Adapter:
    """Describe and read the adapter in `path` for `model`."""
    base = ModelBase(model)
    return read_adapter(read_adapter_info(path, "a", base.shape), base, dtype)


def check_equals_peft(model: PreTrainedModel, path: Path) -> Adapter:
    """Assert that what we read from `path` gives PEFT's logits, and others than the base's."""
    adapter = read(model, path)
    expected = logits_of(load_peft_adapter(model, path))
    relative, absolute = TOLERANCE[torch.float32]
    assert not torch.allclose(expected, logits_of(model), rtol=10 * relative, atol=10 * absolute)
    assert_close(logits_of(applied(model, adapter)), expected, torch.float32)
    return adapter


def applied(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of `model` whose weights have the adapter in them; a tied lm_head is untied."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight = nn.Parameter(changed.lm_head.weight.detach().clone())
        modules = dict(changed.named_modules())
        shape = shape_of(model)
        for info, rows in zip(adapter.info.overlays, adapter.overlays, strict=True):
            assert rows.shape == (info.num_rows, info.width)
            for path in info.paths:
                _replace(path, info.token_ids, rows, modules)
        overlays = {
            info.paths[0]: rows
            for info, rows in zip(adapter.info.overlays, adapter.overlays, strict=True)
        }
        for module in adapter.modules:
            path = shape.site_path(module.info.site)
            a_RI = overlays[EMBEDDING_A].T.contiguous() if path == EMBEDDING else None
            _apply(modules[path], module, a_RI, adapter.shared)
    return changed


def _replace(
    path: str, token_ids: tuple[int, ...] | None, rows: Tensor, modules: Mapping[str, nn.Module]
) -> None:
    if path == EMBEDDING_A:
        return
    weight = modules[path].weight
    if token_ids is not None:
        weight[list(token_ids)] = rows.to(weight.dtype)
    else:
        weight.copy_(rows.reshape(weight.shape))


def _apply(
    linear: nn.Module, module: ModuleWeights, a_RI: Tensor | None, shared: Mapping[str, Tensor]
) -> None:
    info, vectors = module.info, module.vectors
    assert set(vectors) == set(info.vectors)
    assert all(vector.dtype == torch.float32 and vector.dim() == 1 for vector in vectors.values())
    is_embedding = isinstance(linear, nn.Embedding)
    weight_OI = linear.weight.T.clone() if is_embedding else linear.weight.clone()
    out_size, in_size = weight_OI.shape
    if info.rank > 0:
        a_RI = _matrix(module.a_RI if a_RI is None else a_RI, info.shared_a, shared)[:, :in_size]
        bt_RO = _matrix(module.bt_RO, info.shared_bt, shared)[:, :out_size]
        assert a_RI.shape == (info.rank, in_size)
        assert bt_RO.shape == (info.rank, out_size)
        u_R = vectors.get("u", torch.ones(info.rank))
        v_O = vectors.get("v", torch.ones(out_size))
        weight_OI += v_O[:, None] * (bt_RO.T.float() @ (info.scale * u_R[:, None] * a_RI.float()))
    g_O = vectors.get("g", torch.ones(out_size))
    weight_OI *= g_O[:, None]
    bias = getattr(linear, "bias", None)
    if bias is not None or "c" in vectors:
        old_O = torch.zeros(out_size) if bias is None else bias
        linear.bias = nn.Parameter(g_O * old_O + vectors.get("c", torch.zeros(out_size)))
    linear.weight.copy_(weight_OI.T if is_embedding else weight_OI)


def _matrix(own: Tensor | None, shared_info: Any, shared: Mapping[str, Tensor]) -> Tensor:
    assert (own is None) != (shared_info is None)
    if own is not None:
        assert own.is_contiguous()
        return own
    return shared[shared_info.digest]
