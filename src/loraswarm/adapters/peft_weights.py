"""The weights of a described adapter: bytes of a file to checked tensors in the base's dtype.

The only torch in this package. Knows names and places of tensors from the header, and nothing about
config keys. Called by adapters/peft.read_adapter.
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

import math
from io import BufferedReader

import torch
from torch import Tensor

from loraswarm.adapters.adapter import ModuleInfo, ModuleWeights
from loraswarm.adapters.peft_plan import tensor_names
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE, TensorEntry
from loraswarm.errors import AdapterError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_modules(
    file: BufferedReader,
    modules: tuple[ModuleInfo, ...],
    tensors: dict[str, TensorEntry],
    dtype: torch.dtype,
) -> tuple[ModuleWeights, ...]:
    """Read A and B of each module, cast to `dtype`, B transposed.

    Cost      one read of the file and one copy of B; no more host memory than the result and the
              largest tensor.
    Raises    AdapterError naming the tensor that is cut short, not finite or out of range.
    """
    return tuple(_read_module(file, module, tensors, dtype) for module in modules)


def _read_module(
    file: BufferedReader, module: ModuleInfo, tensors: dict[str, TensorEntry], dtype: torch.dtype
) -> ModuleWeights:
    name_a, name_b = tensor_names(module.site)
    a_RI = _read_tensor(file, name_a, tensors[name_a], dtype)
    b_OR = _read_tensor(file, name_b, tensors[name_b], dtype)
    return ModuleWeights(module, a_RI, b_OR.t().contiguous())


def _read_tensor(file: BufferedReader, name: str, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    file.seek(entry.begin)
    if file.readinto(buffer.numpy().data) != entry.num_bytes:
        raise AdapterError(f"{WEIGHTS_FILE} was cut short while tensor {name!r} was read")
    stored = buffer.view(_DTYPES[entry.dtype]).view(entry.shape)
    cast = stored.to(dtype)
    if not _is_finite(cast):
        raise _value_error(name, stored, dtype)
    return cast


def _is_finite(values: Tensor) -> bool:
    """One pass without a temporary: minimum and maximum carry NaN and infinity."""
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _value_error(name: str, stored: Tensor, dtype: torch.dtype) -> AdapterError:
    if not _is_finite(stored):
        return AdapterError(f"{WEIGHTS_FILE}: tensor {name!r} has NaN or infinite values")
    largest = stored.abs().max().item()
    dtype_name = str(dtype).removeprefix("torch.")
    return AdapterError(
        f"{WEIGHTS_FILE}: tensor {name!r} has values up to {largest:g}; {dtype_name} ends at"
        f" {torch.finfo(dtype).max:g}; serve with a wider --dtype"
    )
