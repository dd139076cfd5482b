"""An image has, byte for byte, what lies in the pool, and a copy puts it there and nowhere else."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from image_cases import DIRTY, SHAPE, Places, dirty_memory, pack, write_plainly
from loraswarm.adapters.adapter import Adapter
from loraswarm.errors import AdapterError
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.image import image_bytes, pack_adapter, piece_bytes, write_own
from loraswarm.memory.tile_layout import adapter_bytes, adapter_layout
from memory_cases import describe, kinds, lora, random_adapter

KINDS = kinds(SHAPE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pieces_of(places: Places, load) -> np.ndarray:
    """For each byte of the pool whether the load or a matrix that it shares has it."""
    mask = np.zeros(len(places.bytes), dtype=bool)
    packings = [(load.layout.packing, load.starts)]
    packings += [(place.layout.packing, place.starts) for place in load.shared]
    for packing, starts in packings:
        sizes = piece_bytes(packing, places.geometry)
        for start, size in zip(starts, sizes, strict=True):
            begin = start * places.geometry.element_bytes
            assert not mask[begin : begin + size].any()
            mask[begin : begin + size] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_a_copied_image_has_the_bytes_of_the_plain_way_and_zeros_between(name, dtype):
    torch.manual_seed(0)
    places = Places(dtype)
    places.load(KINDS["mixed"])
    load = places.load(KINDS[name] if name != "mixed" else replace(KINDS[name], name="again"))
    adapter = random_adapter(load.info, SHAPE, dtype)
    image = pack(adapter, places.geometry)
    assert places.tiles.copy(load, image) == image.num_bytes + sum(
        values.nbytes for values in image.shared.values()
    )
    plain = torch.zeros_like(places.buffer.pool)
    write_plainly(plain, load, adapter)
    mask = pieces_of(places, load)
    assert mask.any()
    plain_bytes = plain.view(torch.uint8).numpy()
    assert np.array_equal(places.bytes[mask], plain_bytes[mask])
    assert plain_bytes[mask].any()
    assert (places.bytes[~mask] == DIRTY).all(), "a byte beside the pieces was written"
    assert not plain_bytes[~mask].any()


def test_every_byte_of_an_image_is_written_and_padding_is_zero():
    torch.manual_seed(0)
    geometry = page_geometry(SHAPE, 2)
    num_padded = 0
    for info in KINDS.values():
        adapter = random_adapter(info, SHAPE, torch.bfloat16)
        first = pack(adapter, geometry)
        second = pack_adapter(adapter, SHAPE, geometry, lambda n: np.zeros(n, dtype=np.uint8))
        assert np.array_equal(first.own, second.own)
        packing = adapter_layout(info, SHAPE, geometry).packing
        assert first.num_bytes == image_bytes(packing, geometry)
        num_padded += first.num_bytes > adapter_bytes(info, SHAPE, geometry).own
    assert num_padded, "no adapter has a page that is not full"


def test_an_image_is_read_only_and_has_no_plan():
    info = replace(KINDS["vera"], plan=SimpleNamespace())
    image = pack(random_adapter(info, SHAPE, torch.float32), page_geometry(SHAPE, 4))
    assert image.info.plan is None
    assert image.info == info
    for array in (image.own, *image.shared.values()):
        assert not array.flags.writeable
        assert array.dtype == np.uint8


def test_memory_is_asked_for_own_bytes_then_for_each_shared_matrix_that_is_not_skipped():
    geometry = page_geometry(SHAPE, 2)
    adapter = random_adapter(KINDS["vera-head"], SHAPE, torch.float16)
    matrices = adapter.info.shared_matrices()
    asked: list[np.ndarray] = []

    def allocate(num_bytes: int) -> np.ndarray:
        asked.append(dirty_memory(num_bytes))
        return asked[-1]

    image = pack_adapter(adapter, SHAPE, geometry, allocate)
    assert list(image.shared) == list(matrices)
    arrays = [image.own, *image.shared.values()]
    assert all(np.shares_memory(*pair) for pair in zip(arrays, asked, strict=True))
    asked.clear()
    partial = pack_adapter(adapter, SHAPE, geometry, allocate, skip={matrices[0]})
    assert list(partial.shared) == list(matrices[1:])
    assert len(asked) == len(matrices)
    assert np.array_equal(partial.own, image.own)


def test_an_adapter_without_bytes_of_its_own_has_an_empty_image():
    geometry = page_geometry(SHAPE, 2)
    image = pack_adapter(Adapter(describe("empty", []), ()), SHAPE, geometry, pytest.fail)
    assert image.num_bytes == 0


def test_matrices_that_are_not_contiguous_are_packed_by_value():
    torch.manual_seed(0)
    geometry = page_geometry(SHAPE, 4)
    adapter = random_adapter(KINDS["lora"], SHAPE, torch.float32)
    modules = tuple(
        replace(module, a_RI=module.a_RI.T.contiguous().T, bt_RO=torch.cat([module.bt_RO] * 2)[:5])
        for module in adapter.modules
    )
    strided = replace(adapter, modules=modules)
    assert not modules[0].a_RI.is_contiguous()
    assert np.array_equal(pack(strided, geometry).own, pack(adapter, geometry).own)


def test_tensors_of_another_dtype_or_room_of_another_size_are_bugs_of_ours():
    geometry = page_geometry(SHAPE, 2)
    adapter = random_adapter(KINDS["lora"], SHAPE, torch.float32)
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        pack(adapter, geometry)
    layout = adapter_layout(adapter.info, SHAPE, geometry)
    with pytest.raises(AssertionError):
        write_own(adapter, layout, geometry, np.empty(7, dtype=np.uint8))


def test_an_adapter_with_a_row_longer_than_a_page_is_refused():
    info = replace(lora("long", SHAPE, 1), modules=(replace(KINDS["tied"].modules[0]),))
    wide = replace(info.modules[0], rank=100_000, shared_a=None)
    with pytest.raises(AdapterError, match="lower rank"):
        pack(Adapter(replace(info, modules=(wide,)), ()), page_geometry(SHAPE, 2))


@pytest.mark.parametrize("order", ["forward", "backward", "scattered"])
def test_pages_are_copied_to_their_places_in_whatever_order_these_lie(order):
    places = Places(torch.bfloat16)
    info = lora("many", SHAPE, 133)
    packing = adapter_layout(info, SHAPE, places.geometry).packing
    assert packing.num_pages >= 7
    image = places.image(info)
    sizes = piece_bytes(packing, places.geometry)
    pages = list(range(3, 3 + len(sizes)))
    if order == "backward":
        pages.reverse()
    elif order == "scattered":
        pages = [3 + (7 * index) % 190 for index in range(len(sizes))]
        assert len(set(pages)) == len(sizes)
    starts = [page * places.geometry.page_elements for page in pages]
    places.buffer.copy_pieces(image.own, packing, starts)
    begin = 0
    for page, size in zip(pages, sizes, strict=True):
        first = page * places.geometry.page_bytes
        found = places.bytes[first : first + size]
        assert np.array_equal(found, image.own[begin : begin + size])
        begin += size
    num_written = np.count_nonzero(places.bytes != DIRTY)
    assert 0 < num_written <= image.num_bytes


def test_other_threads_run_python_while_a_piece_is_copied():
    places = Places(torch.float32, num_pages=6000)
    packing = SimpleNamespace(num_pages=6000, bins=())
    image = np.zeros(6000 * places.geometry.page_bytes, dtype=np.uint8)
    starts = [page * places.geometry.page_elements for page in range(6000)]
    turns, has_ended = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not has_ended.is_set():
            turns += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    try:
        # Whoever has the GIL now keeps it unless it lets go.
        sys.setswitchinterval(1000)
        before = turns
        sum(range(300_000))
        assert turns == before, "the other thread ran although nothing let it"
        places.buffer.copy_pieces(image, packing, starts)
        assert turns > before
    finally:
        has_ended.set()
        sys.setswitchinterval(interval)
        thread.join()
