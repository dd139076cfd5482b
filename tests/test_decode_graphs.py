"""Decode steps that are captured once and replayed equal steps that are run; padding does nothing.

Without a CUDA device the recorder repeats the Python of the step, over the same fixed tensors, and
the steps that replays are compared with are run by the reference kernels, which take no time; with
one they are run by the kernels that are captured.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from batch_factory import AdapterPool, BatchFactory, HandAdapter, Rows
from device_under_test import DEVICE
from loraswarm.core.base_shape import FINAL_NORM
from loraswarm.engine import graphs as engine_graphs
from loraswarm.engine.graphs import CudaRecorder, DecodeGraphs
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.prepare import PreparedBatch
from loraswarm.engine.transfer import to_device
from loraswarm.errors import ConfigError
from loraswarm.kernels import reference, triton
from loraswarm.kernels.triton import words
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.weight import Weight
from loraswarm.models.loader import load_decoder
from loraswarm.models.source import read_config
from model_factory import VOCAB_SIZE, save_tiny_model
from tile_factory import SiteWeights
from tolerance import assert_close

PAGE_TOKENS = 16
MAX_PAGES = 4
MAX_ROWS = 6
RANKS = (5, 40, 16, 8)

pytestmark = pytest.mark.usefixtures("interpreted_triton")


class Repeated:
    """Counts what is captured; a replay runs the step's Python again."""

    def __init__(self):
        self.count = 0
        self._record = CudaRecorder(DEVICE) if DEVICE.type == "cuda" else lambda run: run

    def __call__(self, run):
        self.count += 1
        return self._record(run)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2-tied")


@pytest.fixture(scope="module")
def decoder(path) -> Decoder:
    """What is captured."""
    backend = Backend(triton, torch.float32, DEVICE)
    return load_decoder(path, decoder_config(read_config(path)), backend)


@pytest.fixture(scope="module")
def model(path, decoder) -> Decoder:
    """What says what a step must be."""
    if DEVICE.type == "cuda":
        return decoder
    backend = Backend(reference, torch.float32, DEVICE)
    return load_decoder(path, decoder_config(read_config(path)), backend)


@pytest.fixture
def recorder() -> Repeated:
    return Repeated()


@pytest.fixture
def graphs(decoder, recorder) -> DecodeGraphs:
    return DecodeGraphs(decoder, recorder, MAX_PAGES, PAGE_TOKENS, MAX_ROWS)


class Swarm:
    """Sequences with a context each, made up, and adapters of several ranks; two have the same."""

    def __init__(self, decoder: Decoder, num_sequences: int):
        self._decoder = decoder
        self._factory = BatchFactory(decoder.shape, torch.float32, page_tokens=PAGE_TOKENS)
        self._factory.pages = self._factory.pages.to(DEVICE)
        self.pages = self._factory.pages
        self._pool = AdapterPool(
            {f"a{index}": _adapter(decoder, index) for index in range(len(RANKS))}
            | {"normed": HandAdapter(overlays=[Rows((FINAL_NORM,), torch.ones(1, 48))])},
            decoder.shape,
            torch.float32,
        )
        self._pool.pool = self._pool.pool.to(DEVICE)
        self.names = [f"s{index}" for index in range(num_sequences)]
        generator = torch.Generator().manual_seed(0)
        for index, name in enumerate(self.names):
            work = self._batch({name: [0] * (3 + 7 * index)}).attention
            pages = work.page_table[0]
            values = torch.randn(self.pages[pages].shape, generator=generator)
            beyond = work.context_lens[0] - PAGE_TOKENS * (len(pages) - 1)
            values[-1, :, :, :, beyond:] = float("nan")
            self.pages[pages] = values.to(DEVICE)

    def decode(self, adapters: list[str | None]) -> Batch:
        """One token more of as many sequences; adapters are in order, equal ones adjacent."""
        chunks = {name: [7 + index] for index, name in enumerate(self.names[: len(adapters)])}
        batch = self._batch(chunks)
        if not any(adapters):
            return batch
        batch = self._pool.adapt(batch, [(name, 1) for name in adapters])
        return dataclasses.replace(batch, head_tiles=batch.tiles)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        return self._decoder.forward(to_device(batch, DEVICE)).cpu()

    def _batch(self, chunks) -> Batch:
        return self._factory.batch(chunks)


def _adapter(decoder: Decoder, index: int) -> HandAdapter:
    generator = torch.Generator().manual_seed(index)
    sites = {}
    for site in range(decoder.shape.num_linears):
        if index == 3 and site % 7 != 1:  # k_proj alone
            continue
        in_size, out_size = decoder.shape.site_sizes(site)
        a = torch.randn(RANKS[index], in_size, generator=generator) * in_size**-0.5
        b = torch.randn(out_size, RANKS[index], generator=generator) * RANKS[index] ** -0.5
        sites[site] = SiteWeights(a, b, scale=0.5)
    return HandAdapter(sites)


@torch.inference_mode()
def replayed(graphs: DecodeGraphs, batch: Batch, weights_version: int = 0) -> Tensor:
    logits_ZV = graphs.try_run(batch, weights_version)
    assert logits_ZV is not None
    return logits_ZV.clone().cpu()


@pytest.mark.parametrize("num_rows", [1, 3, 6])
def test_a_replayed_step_of_the_base_equals_the_step(decoder, graphs, recorder, num_rows):
    swarm = Swarm(decoder, num_rows)
    for _ in range(2):
        batch = swarm.decode([None] * num_rows)
        expected_ZV = swarm.run(batch)
        assert expected_ZV.shape == (num_rows, VOCAB_SIZE)
        found_ZV = replayed(graphs, batch)
        if num_rows in (1, MAX_ROWS):  # no padding, which torch's products may round otherwise with
            assert torch.equal(found_ZV, expected_ZV)
        assert_close(found_ZV, expected_ZV, torch.float32)
    assert recorder.count == 1


def test_one_graph_serves_any_adapters_of_as_many_tiles(model, graphs, recorder):
    swarm = Swarm(model, 5)
    base_ZV = swarm.run(swarm.decode([None] * 5))
    mixes = [
        [None, "a1", "a1", "a2", "a0"],
        ["a1", "a2", None, None, None],
        ["a0", "a2", "a1", "a3", None],
    ]
    for adapters in mixes:
        batch = swarm.decode(adapters)
        expected_ZV = swarm.run(batch)
        assert not torch.allclose(expected_ZV, base_ZV)
        assert_close(replayed(graphs, batch), expected_ZV, torch.float32)
    assert recorder.count == 1


def test_adapters_of_fewer_targets_or_tiles_have_graphs_of_their_own(model, graphs, recorder):
    swarm = Swarm(model, 2)
    for adapters in (["a1", None], ["a3", None], ["a2", "a0"], [None, None], ["a1", "a2"]):
        batch = swarm.decode(adapters)
        assert_close(replayed(graphs, batch), swarm.run(batch), torch.float32)
    assert recorder.count == 4


def test_graphs_are_captured_anew_when_a_table_outgrows_its_place(
    model, graphs, recorder, monkeypatch
):
    monkeypatch.setattr(words, "ROOM", 1)
    swarm = Swarm(model, 4)
    for adapters in (["a3"], ["a3", None, "a3", None], ["a3"]):
        batch = swarm.decode(adapters)
        assert_close(replayed(graphs, batch), swarm.run(batch), torch.float32)
    assert recorder.count == 3


def test_graphs_of_signatures_that_were_long_not_used_are_forgotten(
    model, graphs, recorder, monkeypatch
):
    monkeypatch.setattr(engine_graphs, "MAX_SIGNATURES", 2)
    swarm = Swarm(model, 1)
    for adapter in (None, "a1", None, "a3", None, "a1"):
        batch = swarm.decode([adapter])
        assert_close(replayed(graphs, batch), swarm.run(batch), torch.float32)
    assert recorder.count == 4


def test_a_graph_is_never_replayed_over_other_weights_than_it_was_captured_with(
    model, graphs, recorder
):
    """Version 0 are the base's weights, which come back; other versions come once."""
    swarm = Swarm(model, 2)
    for version, count in ((0, 1), (3, 2), (3, 2), (0, 2), (4, 3), (0, 3), (4, 3)):
        batch = swarm.decode(["a3", None])
        assert_close(replayed(graphs, batch, version), swarm.run(batch), torch.float32)
        assert recorder.count == count
    assert sorted(version for version, _ in graphs._graphs) == [0, 4]


def test_a_runner_replays_over_weights_at_rest_only(decoder, recorder, monkeypatch):
    seen = []

    def try_run(self, batch, version, drawn_ids):
        seen.append(version)

    monkeypatch.setattr(DecodeGraphs, "try_run", try_run)
    graphs = DecodeGraphs(decoder, recorder, MAX_PAGES, PAGE_TOKENS, MAX_ROWS)
    swarm = Swarm(decoder, 1)
    runner = ModelRunner(decoder, SimpleNamespace(pool=swarm.pages), None, graphs)
    linear, other = decoder.layers[0].linears()[:2]
    copy = Weight(linear.weight.rows.clone())
    prepared = PreparedBatch(swarm.decode([None]), ())

    def run():
        runner.run(prepared)
        return seen[-1] if seen else None

    assert run() == 0
    runner.use(linear, copy, ("a", "1"))
    assert linear.merged is copy
    assert runner.merged[:4] == (("a", "1"),) * 3 + (None,)
    first = run()
    assert first > 0
    runner.use(other, copy, ("a", "1"))
    second = runner._version
    assert second not in (0, first)
    runner.use(other, None, None)
    assert run() not in (0, first, second)
    runner.is_switching = True
    count = len(seen)
    run()
    assert len(seen) == count
    runner.is_switching = False
    runner.use(linear, None, None)
    assert runner.merged == ()
    assert run() == 0


def test_padding_changes_no_page(model, graphs):
    swarm = Swarm(model, 3)
    replayed(graphs, swarm.decode([None] * 3))
    batch = swarm.decode([None] * 3)
    before = swarm.pages.clone().cpu()
    replayed(graphs, batch)
    after = swarm.pages.cpu()
    changed = (before.view(torch.int32) != after.view(torch.int32)).any(dim=-1)
    slots = changed.any(dim=1).any(dim=1).any(dim=1).flatten().nonzero()[:, 0]
    assert slots.tolist() == sorted(batch.slots.tolist())


def test_what_is_no_plain_decode_step_is_left_to_others(model, graphs, recorder):
    swarm = Swarm(model, 2)
    decode = swarm.decode([None, None])
    prefill = swarm._batch({"new": [5, 6, 7]})
    normed = swarm._pool.adapt(decode, [("normed", 2)])
    assert normed.head_overlays
    for batch in (prefill, normed, dataclasses.replace(decode, logit_rows=torch.tensor([1]))):
        assert graphs.try_run(batch) is None
    assert recorder.count == 0
    assert graphs.try_run(decode) is not None


def test_steps_of_all_sizes_write_their_logits_to_one_place(model, graphs):
    swarm = Swarm(model, 3)
    places = set()
    for adapters in ([None], [None] * 3, ["a1"], ["a3", None, None]):
        logits_ZV = graphs.try_run(swarm.decode(adapters))
        places.add((logits_ZV.data_ptr(), logits_ZV.dtype))
        assert logits_ZV.shape == (len(adapters), VOCAB_SIZE)
    assert places == {(graphs._logits_BV.data_ptr(), torch.float32)}
    assert graphs._logits_BV.shape == (MAX_ROWS, VOCAB_SIZE)


def test_steps_of_the_base_can_all_be_captured_before_the_first(model, graphs, recorder):
    swarm, lines = Swarm(model, 3), []
    buffer = SimpleNamespace(pages=swarm.pages, pool=swarm.pages.view(-1))
    before = swarm.pages.clone().cpu().view(torch.int32)
    graphs.capture_base(buffer, lines.append)
    assert recorder.count == len(graphs._buckets)
    assert len(lines) == 1
    assert f"rows={','.join(map(str, graphs._buckets))}" in lines[0]
    assert torch.equal(swarm.pages.cpu().view(torch.int32), before)
    for adapters, num_more in (([None], 0), ([None] * 3, 0), (["a1"], 1)):
        batch = swarm.decode(adapters)
        assert_close(replayed(graphs, batch), swarm.run(batch), torch.float32)
        assert recorder.count == len(graphs._buckets) + num_more


def test_graphs_of_the_base_are_never_forgotten(model, graphs, recorder, monkeypatch):
    monkeypatch.setattr(engine_graphs, "MAX_SIGNATURES", 2)
    swarm = Swarm(model, 1)
    for adapter, count in ((None, 1), ("a1", 2), ("a3", 3), (None, 3)):
        batch = swarm.decode([adapter])
        assert_close(replayed(graphs, batch), swarm.run(batch), torch.float32)
        assert recorder.count == count


def test_tokens_that_are_on_the_device_take_the_place_of_the_batchs(model, graphs):
    swarm = Swarm(model, 3)
    batch = swarm.decode(["a2", "a3", None])
    expected_ZV = swarm.run(batch)
    unknown = dataclasses.replace(batch, token_ids=torch.zeros_like(batch.token_ids))
    assert not torch.allclose(replayed(graphs, unknown), expected_ZV)
    drawn_ids = batch.token_ids.to(DEVICE)
    with torch.inference_mode():
        found_ZV = graphs.try_run(unknown, drawn_ids=drawn_ids).clone().cpu()
    assert_close(found_ZV, expected_ZV, torch.float32)
    assert_close(replayed(graphs, batch), expected_ZV, torch.float32)


class Exhausted(Repeated):
    """After so many graphs the device has no memory left, and torch says so in its own ways."""

    def __init__(self, num_left: int, error: RuntimeError):
        super().__init__()
        self._num_left, self._error = num_left, error

    def __call__(self, run):
        if self._num_left == 0:
            raise self._error
        self._num_left -= 1
        return super().__call__(run)


def unjoined() -> RuntimeError:
    """What the end of a capture says that an allocation has ended."""
    error = RuntimeError("CUDA error: capturing stream has unjoined work")
    error.__context__ = torch.OutOfMemoryError("tried to allocate 2 MiB")
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 2 MiB"),
        unjoined(),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_without_memory_for_a_graph_steps_go_on_without(decoder, model, caplog, monkeypatch, error):
    """What has been captured is replayed still, and makes room for nothing that cannot be."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(engine_graphs, "MAX_SIGNATURES", 1)
    recorder = Exhausted(1, error)
    graphs = DecodeGraphs(decoder, recorder, MAX_PAGES, PAGE_TOKENS, MAX_ROWS)
    swarm = Swarm(model, 2)
    single, both, base = (swarm.decode(names) for names in (["a3"], ["a3", None], [None]))
    expected_ZV = swarm.run(single)
    assert_close(replayed(graphs, single), expected_ZV, torch.float32)
    for _ in range(2):
        assert graphs.try_run(both) is None
        assert graphs.try_run(base) is None
        assert_close(replayed(graphs, single), expected_ZV, torch.float32)
    assert recorder.count == 1
    (record,) = caplog.records
    assert "no more decode steps are captured as graphs rows=2" in record.getMessage()
    assert "bytes free" in record.getMessage()


def test_a_capture_that_fails_for_another_reason_fails_the_step(decoder, model):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    graphs = DecodeGraphs(decoder, Exhausted(0, error), MAX_PAGES, PAGE_TOKENS, MAX_ROWS)
    with pytest.raises(RuntimeError, match="illegal"):
        graphs.try_run(Swarm(model, 1).decode([None]))


def test_a_start_without_memory_for_the_graphs_says_so_with_numbers(decoder, model):
    recorder = Exhausted(1, torch.OutOfMemoryError("tried to allocate 2 MiB"))
    graphs = DecodeGraphs(decoder, recorder, MAX_PAGES, PAGE_TOKENS, MAX_ROWS)
    pages = Swarm(model, 1).pages
    buffer = SimpleNamespace(pages=pages, pool=pages.view(-1))
    with pytest.raises(ConfigError, match=r"of 4 rows does not fit .* [\d,]+ bytes free") as raised:
        graphs.capture_base(buffer, lambda line: None)
    assert "memory_utilization" in str(raised.value)


def test_a_capture_follows_a_run_and_collects_no_garbage(monkeypatch):
    """With torch's parts played: what they do on a device is not seen here."""
    done = []

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", "stream", "thread_local")
        done.append("begin")
        yield
        done.append("end")

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(engine_graphs, "_capture_stream", lambda device: "stream")
    recorder = CudaRecorder(torch.device("cpu"))
    done.clear()
    result = torch.ones(1)

    def run():
        done.append(f"run, garbage collected: {gc.isenabled()}")
        return result

    replay = recorder(run)
    outside, inside = (f"run, garbage collected: {is_on}" for is_on in (True, False))
    assert done == ["waited", outside, "waited", "begin", inside, "end"]
    assert gc.isenabled()
    assert replay() is result
    assert done[-1] == "replay"
    with pytest.raises(ZeroDivisionError):
        recorder(lambda: 1 / (gc.isenabled() and 1))
    assert gc.isenabled()
