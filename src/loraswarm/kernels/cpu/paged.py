"""Records attention over paged K and V, and the writing of K and V. Called through kernels/cpu.

What depends on the step alone is found once for all its layers: it is the same as long as the
batch's objects are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loraswarm.kernels import AttentionWork, HeadNorms, reference
from loraswarm.kernels.arguments import check_head_norms, check_rotate
from loraswarm.kernels.cpu.attention_plan import Plan, Shape, make_plan
from loraswarm.kernels.cpu.elements import check_elements, float_bits
from loraswarm.kernels.cpu.operations import ATTENTION, ROTATE_WRITE, WRITE_KV
from loraswarm.kernels.cpu.program import SCRATCH_FLOATS, programs

LOG2_E = 1.4426950408889634
ITEM_ELEMENTS = 1 << 12
"""Elements of an item of writing: about a microsecond of one core."""
WRITE_PRODUCTS = 8
"""Multiply-adds that take as long as one element that is rotated or copied."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """What the calls of all layers have in common; `plan` is what `arguments` point into."""

    arguments: tuple[int, ...]
    plan: Plan
    num_items: int


@dataclass(frozen=True, slots=True)
class _Writing:
    """Where K and V of a batch's tokens go in any layer; but for the address of the pages."""

    arguments: tuple[int, ...]
    num_items: int


class _Step(threading.local):
    """What was found for the objects that the last calls were given."""

    def __init__(self) -> None:
        self.attention_of: tuple[Any, ...] = ()
        self.attentions: dict[Any, _Attention] = {}
        self.writing_of: tuple[Any, ...] = ()
        self.writing: _Writing | None = None
        self.rotation_of: tuple[Any, ...] = ()


_step = _Step()


def write_kv_(pages: Tensor, layer: int, k_TKE: Tensor, v_TKE: Tensor, slots_T: Tensor) -> None:
    """See `kernels.reference.write_kv_`; while recording, `slots_T` must stay as it is."""
    reference.check_write_kv(pages, k_TKE, v_TKE, slots_T)
    _check_vectors("k_TKE", k_TKE)
    _check_vectors("v_TKE", v_TKE)
    writing = _writing(pages, slots_T)
    num_elements = k_TKE.numel()
    if num_elements == 0:
        return
    arguments = (
        _layer_address(pages, layer),
        *writing.arguments,
        k_TKE.data_ptr(),
        *k_TKE.stride()[:2],
        v_TKE.data_ptr(),
        *v_TKE.stride()[:2],
    )
    programs.hold(slots_T)
    programs.add(WRITE_KV, writing.num_items, arguments, pages.dtype, num_elements)


def rotate_and_write_kv_(
    qkv_TNE: Tensor,
    num_heads: int,
    cos_T1E: Tensor,
    sin_T1E: Tensor,
    pages: Tensor,
    layer: int,
    slots_T: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """See `kernels.reference.rotate_and_write_kv_`.

    While recording, cosines, sines and slots must stay as they are; they are checked when they are
    first seen.
    """
    qkv = qkv_TNE.shape, qkv_TNE.stride(), qkv_TNE.dtype
    found_for = (_place(pages), slots_T, cos_T1E, sin_T1E, qkv, num_heads)
    if not _is_same(found_for, _step.rotation_of):
        check_rotate(qkv_TNE, num_heads, (cos_T1E, sin_T1E), pages, slots_T, None)
        _step.rotation_of = found_for
    if norms is not None:
        check_head_norms(norms, pages.shape[5], pages.dtype)
    writing = _writing(pages, slots_T)
    num_elements = qkv_TNE.numel()
    if num_elements == 0:
        return
    arguments = (
        _layer_address(pages, layer),
        *writing.arguments,
        qkv_TNE.data_ptr(),
        num_heads,
        cos_T1E.data_ptr(),
        sin_T1E.data_ptr(),
        norms.q_weight_E.data_ptr() if norms is not None else 0,
        norms.k_weight_E.data_ptr() if norms is not None else 0,
        float_bits(norms.eps) if norms is not None else 0,
    )
    programs.hold(slots_T, cos_T1E, sin_T1E)
    num_products = WRITE_PRODUCTS * num_elements
    programs.add(ROTATE_WRITE, writing.num_items, arguments, pages.dtype, num_products)


def paged_attention(
    q_THE: Tensor,
    pages: Tensor,
    layer: int,
    work: AttentionWork,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `kernels.reference.paged_attention`; while recording, `work` must stay as it is."""
    attention = _attention(q_THE, pages, work, scale, window)
    out_THE = programs.buffer(q_THE.shape, q_THE.dtype)
    address = _layer_address(pages, layer)
    if attention.num_items == 0:
        return out_THE
    arguments = (*attention.arguments, q_THE.data_ptr(), address, out_THE.data_ptr())
    programs.hold(attention)
    num_products = attention.plan.num_products
    programs.add(ATTENTION, attention.num_items, arguments, q_THE.dtype, num_products)
    return out_THE


def _place(pages: Tensor) -> tuple[Any, ...]:
    """What plans depend on; the pages themselves must not be kept by a plan that is."""
    return pages.shape, pages.stride(), pages.dtype


def _is_same(objects: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether all tensors are the same objects and all else is equal."""
    if len(objects) != len(others):
        return False
    for one, other in zip(objects, others, strict=True):
        if one is not other and (isinstance(one, Tensor) or one != other):
            return False
    return True


def _attention(
    q_THE: Tensor, pages: Tensor, work: AttentionWork, scale: float, window: int | None
) -> _Attention:
    last = _step.attention_of
    place = _place(pages)
    if not last or last[0] is not work or last[1] != place:
        _step.attentions.clear()
        _step.attention_of = (work, place)
    key = (q_THE.shape, q_THE.stride(), q_THE.dtype, scale, window)
    found = _step.attentions.get(key)
    if found is None:
        found = _step.attentions[key] = _new_attention(q_THE, pages, work, scale, window)
    return found


def _new_attention(
    q_THE: Tensor, pages: Tensor, work: AttentionWork, scale: float, window: int | None
) -> _Attention:
    reference.check_attention(q_THE, pages, work)
    reference.check_window(window)
    _check_vectors("q_THE", q_THE)
    _check_vectors("pages", pages)
    num_tokens, num_heads, head_size = q_THE.shape
    num_pages, _, _, num_kv_heads, page_tokens, _ = pages.shape
    page, _, value, head, token, _ = pages.stride()
    shape = Shape(
        num_tokens, num_heads, num_kv_heads, head_size, num_pages, page_tokens, window or 0
    )
    plan = make_plan(work, shape, SCRATCH_FLOATS)
    q_token, q_head, _ = q_THE.stride()
    arguments = (
        plan.items.ctypes.data,
        plan.partials.ctypes.data,
        plan.partials.shape[1],
        plan.num_done.ctypes.data,
        plan.page_table.ctypes.data,
        plan.page_table.shape[1],
        float_bits(scale * LOG2_E),
        shape.window,
        num_heads,
        num_heads // num_kv_heads,
        head_size,
        page,
        head,
        token,
        value,
        page_tokens,
        q_token,
        q_head,
    )
    return _Attention(arguments, plan, len(plan.items))


def _writing(pages: Tensor, slots_T: Tensor) -> _Writing:
    """Raises ValueError if a slot does not exist."""
    found_for = (_place(pages), slots_T)
    if _step.writing is None or not _is_same(found_for, _step.writing_of):
        _step.writing = _new_writing(pages, slots_T)
        _step.writing_of = found_for
    return _step.writing


def _new_writing(pages: Tensor, slots_T: Tensor) -> _Writing:
    _check_vectors("pages", pages)
    num_pages, _, _, num_kv_heads, page_tokens, head_size = pages.shape
    slots = slots_T.numpy()
    if slots.min(initial=0) < 0 or slots.max(initial=0) >= num_pages * page_tokens:
        raise ValueError("slots_T names a slot outside of pages")
    page, _, value, head, token, _ = pages.stride()
    num_tokens = len(slots)
    tokens_per_item = max(1, ITEM_ELEMENTS // (4 * num_kv_heads * head_size))
    arguments = (
        page,
        head,
        token,
        value,
        page_tokens,
        num_kv_heads,
        head_size,
        slots_T.data_ptr(),
        slots_T.stride(0),
        num_tokens,
        tokens_per_item,
    )
    return _Writing(arguments, -(-num_tokens // tokens_per_item))


def _layer_address(pages: Tensor, layer: int) -> int:
    if not 0 <= layer < pages.shape[1]:
        raise ValueError(f"layer is {layer}; pages have {pages.shape[1]} layers")
    return pages.data_ptr() + layer * pages.stride(1) * pages.itemsize


def _check_vectors(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless kernels know the type and device, and the last stride is 1."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last one must be 1")
    check_elements(name, tensor)
