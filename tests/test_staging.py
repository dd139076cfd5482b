"""Copies through pinned buffers: nothing is written over before it has been read.

Without a CUDA device torch's streams and events are played, and a copy is done as late as it may:
when its event, or its stream, is waited for.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from loraswarm.memory import staging
from loraswarm.memory.staging import Staging

BUFFER_BYTES = 64


class LateStream:
    """Work in order; none is done before somebody waits for it."""

    def __init__(self):
        self.work = []
        self.num_done = 0

    def do(self, num: int) -> None:
        while self.num_done < num:
            self.num_done += 1
            self.work[self.num_done - 1]()

    def synchronize(self) -> None:
        self.do(len(self.work))

    def wait_event(self, event) -> None:
        self.work.append(event.synchronize)


class LateEvent:
    def __init__(self):
        self._behind = None

    def record(self, stream: LateStream) -> None:
        self._behind = stream, len(stream.work)

    def synchronize(self) -> None:
        if self._behind is not None:
            stream, num = self._behind
            stream.do(num)


@pytest.fixture
def engine_stream() -> LateStream:
    return LateStream()


@pytest.fixture
def copies(monkeypatch, engine_stream):
    """A Staging over a late device."""
    stream, empty, copy_ = LateStream(), torch.empty, torch.Tensor.copy_

    def late_copy_(target, source, non_blocking=False):
        assert non_blocking
        stream.work.append(lambda: copy_(target, source))
        return target

    def pageable(*sizes, pin_memory, **options):
        assert pin_memory
        return empty(*sizes, **options)

    monkeypatch.setattr(staging, "BUFFER_BYTES", BUFFER_BYTES)
    monkeypatch.setattr(staging, "_copy_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: engine_stream)
    monkeypatch.setattr(torch, "empty", pageable)
    found = Staging(torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "copy_", late_copy_)
    return found


def test_no_buffer_is_filled_before_its_last_copy_is_done(copies):
    source = np.random.default_rng(0).integers(0, 256, 7 * BUFFER_BYTES + 5, dtype=np.uint8)
    target = torch.zeros(source.nbytes + 9, dtype=torch.uint8)
    parts = [(slice(0, 3), slice(6, 9)), (slice(3, source.nbytes), slice(9, source.nbytes + 6))]
    copies.copy(source, target, parts)
    assert np.array_equal(target[6 : source.nbytes + 6].numpy(), source)
    assert not target[:6].any()
    assert not target[-3:].any()
    again = source[::-1].copy()
    copies.copy(again, target, parts)
    assert np.array_equal(target[6 : source.nbytes + 6].numpy(), again)


def test_a_copy_follows_the_work_that_was_begun_before_it(copies, engine_stream):
    """A step that was launched still reads the pages that the copy is to write."""
    target, read = torch.zeros(8, dtype=torch.uint8), []
    engine_stream.work.append(lambda: read.append(target.clone().tolist()))
    moment = copies.moment()
    engine_stream.work.append(lambda: read.append("a later step"))
    copies.wait_for(moment)
    copies.copy(np.full(8, 7, np.uint8), target, [(slice(0, 8), slice(0, 8))])
    assert read == [[0] * 8]
    assert target.tolist() == [7] * 8
