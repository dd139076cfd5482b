"""Copies run in a thread of their own: in order, each shared matrix once, and failures alone."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from image_cases import DIRTY, SHAPE, Places
from loraswarm.memory.page_copier import PageCopier
from memory_cases import kinds, lora

KINDS = kinds(SHAPE)


class Copier:
    """A copier over dirty pages, and the events of its wake-ups."""

    def __init__(self) -> None:
        self.places = Places(torch.float32)
        self.woken = threading.Semaphore(0)
        self.copier = PageCopier(self.places.buffer, self.places.tiles, self.woken.release)

    def take(self, num_copies: int):
        """What is done after so many copies."""
        for _ in range(num_copies):
            assert self.woken.acquire(timeout=60)
        return self.copier.take_done()

    def hold(self, monkeypatch, failing=()):
        """Copies wait for the event that is returned; those of `failing` arrays raise."""
        gate, copy_pieces = threading.Event(), self.places.buffer.copy_pieces

        def copy(image, packing, starts):
            assert gate.wait(timeout=60)
            if any(image is array for array in failing):
                raise OSError("broken memory")
            copy_pieces(image, packing, starts)

        monkeypatch.setattr(self.places.buffer, "copy_pieces", copy)
        return gate


@pytest.fixture
def copying():
    before = set(threading.enumerate())
    copier = Copier()
    assert set(threading.enumerate()) != before
    yield copier
    copier.copier.close()
    assert set(threading.enumerate()) == before


def has_shared(copying: Copier, place, values: np.ndarray) -> bool:
    """Whether the pool has these bytes at the first piece of a shared matrix's place."""
    begin = place.starts[0] * copying.places.geometry.element_bytes
    size = copying.places.geometry.page_bytes if place.layout.packing.num_pages else 64
    return np.array_equal(copying.places.bytes[begin : begin + size], values[:size])


def test_an_adapter_can_be_used_once_its_copy_has_been_taken(copying, monkeypatch):
    gate = copying.hold(monkeypatch)
    load = copying.places.load(KINDS["lora"])
    image = copying.places.image(load.info)
    copying.copier.submit(load, image)
    mix = ((load.info.key, 1.0),)
    assert copying.copier.is_copying(load.info.key)
    assert copying.copier.num_copying == 1
    assert copying.copier.take_done() == []
    assert (copying.places.bytes == DIRTY).all()
    with pytest.raises(KeyError):
        copying.places.tiles.table([(mix, 1)])
    gate.set()
    (done,) = copying.take(1)
    assert (done.key, done.num_bytes, done.error) == (load.info.key, image.num_bytes, None)
    assert done.seconds > 0
    assert not copying.copier.is_copying(load.info.key)
    assert copying.copier.num_copying == 0
    assert copying.places.tiles.table([(mix, 1)]) is not None
    assert copying.copier.take_done() == []


def test_copies_are_done_in_the_order_of_their_loads(copying, monkeypatch):
    gate = copying.hold(monkeypatch)
    infos = [lora(f"adapter-{number}", SHAPE, 1 + number) for number in range(7)]
    for info in infos:
        copying.copier.submit(copying.places.load(info), copying.places.image(info))
    assert copying.copier.num_copying == 7
    gate.set()
    assert [done.key for done in copying.take(7)] == [info.key for info in infos]


def test_a_matrix_that_two_loads_share_is_copied_with_the_first(copying):
    loads = [copying.places.load(KINDS[name]) for name in ("vera", "vera-other")]
    images = [copying.places.image(load.info) for load in loads]
    other = {matrix: np.zeros_like(values) for matrix, values in images[1].shared.items()}
    images[1] = replace(images[1], shared=other)
    for load, image in zip(loads, images, strict=True):
        copying.copier.submit(load, image)
    first, second = copying.take(2)
    assert first.num_bytes > images[0].num_bytes
    assert second.num_bytes == images[1].num_bytes
    for place in loads[0].shared:
        assert has_shared(copying, place, images[0].shared[place.matrix])
        assert not has_shared(copying, place, other[place.matrix])


def test_pages_are_written_after_all_that_was_launched_before_the_load(copying, monkeypatch):
    """The event is the engine's thread's, taken when it submits; the copy waits for it first."""
    gate, seen, this = threading.Event(), [], threading.current_thread()
    buffer = copying.places.buffer
    copy_pieces = buffer.copy_pieces

    def moment():
        assert threading.current_thread() is this
        return len(seen)

    def wait_for(begun):
        assert gate.wait(timeout=60)
        assert threading.current_thread() is not this
        seen.append(("waited for", begun))

    def copy(image, packing, starts):
        seen.append("copied")
        copy_pieces(image, packing, starts)

    monkeypatch.setattr(buffer, "moment", moment)
    monkeypatch.setattr(buffer, "wait_for", wait_for)
    monkeypatch.setattr(buffer, "copy_pieces", copy)
    loads = [copying.places.load(KINDS[name]) for name in ("lora", "wide")]
    for load in loads:
        copying.copier.submit(load, copying.places.image(load.info))
    gate.set()
    copying.take(2)
    assert seen == [("waited for", 0), "copied"] * 2


@pytest.mark.parametrize("failing", ["own", "shared"])
def test_a_failed_copy_ends_its_own_load_only_and_shared_matrices_come_with_the_next(
    copying, monkeypatch, failing
):
    loads = [copying.places.load(KINDS[name]) for name in ("vera", "vera-other", "lora")]
    images = [copying.places.image(load.info) for load in loads]
    broken = images[0].own if failing == "own" else list(images[0].shared.values())[-1]
    gate = copying.hold(monkeypatch, [broken])
    for load, image in zip(loads, images, strict=True):
        copying.copier.submit(load, image)
    gate.set()
    failed, *others = copying.take(3)
    assert isinstance(failed.error, OSError)
    assert failed.num_bytes == 0
    assert [done.error for done in others] == [None, None]
    for place in loads[1].shared:
        assert has_shared(copying, place, images[1].shared[place.matrix])
    with pytest.raises(KeyError):
        copying.places.tiles.table([(((failed.key, 1.0),), 1)])
    table = copying.places.tiles.table([(((done.key, 1.0),), 1) for done in others])
    assert table is not None
    assert not copying.copier.is_copying(failed.key)


def test_an_image_that_lacks_a_matrix_of_its_load_fails_by_name(copying):
    load = copying.places.load(KINDS["vera"])
    image = replace(copying.places.image(load.info), shared={})
    copying.copier.submit(load, image)
    (done,) = copying.take(1)
    assert isinstance(done.error, KeyError)
    assert load.shared[0].matrix.digest in str(done.error)


def test_a_copy_that_is_done_keeps_no_image_alive(copying):
    load = copying.places.load(KINDS["vera"])
    image = copying.places.image(load.info)
    arrays = [weakref.ref(array.base) for array in (image.own, *image.shared.values())]
    copying.copier.submit(load, image)
    copying.take(1)
    assert all(array() is not None for array in arrays)
    del image
    gc.collect()
    assert all(array() is None for array in arrays)


def test_closing_waits_for_the_copy_under_way_and_drops_those_behind_it(monkeypatch):
    copying = Copier()
    gate = copying.hold(monkeypatch)
    loads = [copying.places.load(KINDS[name]) for name in ("lora", "wide")]
    for load in loads:
        copying.copier.submit(load, copying.places.image(load.info))
    closing = threading.Thread(target=copying.copier.close)
    closing.start()
    assert copying.copier.take_done() == []
    gate.set()
    closing.join(timeout=60)
    assert not closing.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "page-copier"]
    assert [done.key for done in copying.copier.take_done()] in ([], [loads[0].info.key])
    with pytest.raises(AssertionError, match="closed"):
        copying.copier.submit(loads[1], copying.places.image(loads[1].info))


def test_an_adapter_is_not_copied_twice_at_once(copying, monkeypatch):
    gate = copying.hold(monkeypatch)
    load = copying.places.load(KINDS["lora"])
    image = copying.places.image(load.info)
    copying.copier.submit(load, image)
    with pytest.raises(AssertionError, match="twice"):
        copying.copier.submit(load, image)
    gate.set()
    copying.take(1)
    copying.copier.submit(load, image)
    assert copying.take(1)[0].error is None
