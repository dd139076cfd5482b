"""Calibrate on a tiny model: steps are what they are taken for, and the whole of it runs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from cost_cases import figures
from engine_factory import make_engine, save_swarm
from loraswarm.bench import calibrate as module
from loraswarm.bench.calibrate import CalibrateOptions, calibrate, ranks_within
from loraswarm.bench.machine_rates import machine_rates
from loraswarm.bench.step_grid import Limits, checked_batches, fitted_batches, possible, rotated
from loraswarm.bench.step_times import Batch, StepTimer
from loraswarm.bench.transfer_times import time_transfers
from loraswarm.core.cost_model import CostFigures
from loraswarm.engine.engine import Engine
from loraswarm.errors import ConfigError, EngineError
from loraswarm.memory.costs import CostModel

BUDGET = 64
NAMES = [f"a{index:03}" for index in range(7)]
ENGINE = (
    ("pool_bytes", 8 << 20),
    ("num_threads", 2),
    ("max_num_sequences", 16),
    ("max_step_tokens", 133),
)


class TickingClock:
    """Every look at it is a millisecond later than the one before."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


def refuse_to_report(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 3, ranks=(1, 7, 16))
    return path


@pytest.fixture(scope="module")
def engine(swarm) -> Iterator[Engine]:
    engine = make_engine(swarm, max_num_sequences=16, max_step_tokens=BUDGET)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def sizes(engine) -> dict[str, int]:
    transfers = time_transfers(engine, engine.adapters(), 1 << 30, refuse_to_report)
    return {transfer.adapter: transfer.num_bytes for transfer in transfers}


@pytest.fixture
def timer(engine, sizes) -> StepTimer:
    return StepTimer(engine, sizes, BUDGET, TickingClock())


def test_every_adapter_is_brought_and_timed_once(engine, sizes):
    assert list(sizes) == ["a000", "a001", "a002"]
    assert 0 < sizes["a000"] < sizes["a001"] < sizes["a002"]
    assert engine.stats().num_resident_adapters == 3
    assert not engine.has_work


def test_adapters_that_would_not_fit_are_reported(swarm):
    lines: list[str] = []
    engine = make_engine(swarm)
    transfers = time_transfers(engine, engine.adapters(), 1, lines.append)
    engine.close()
    assert [transfer.adapter for transfer in transfers] == ["a000"]
    assert all(transfer.load_s > 0 and transfer.copy_s > 0 for transfer in transfers)
    assert len(lines) == 1
    assert "a001" in lines[0]


def test_a_broken_adapter_is_reported_and_none_that_loads_is_an_error(swarm, tmp_path):
    save_swarm(tmp_path, 2, ranks=(3,))
    weights = tmp_path / "adapters" / "a000" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    engine = make_engine(tmp_path)
    lines: list[str] = []
    broken, good = engine.adapters()
    assert [one.adapter for one in time_transfers(engine, [good], 1 << 30, lines.append)] == [
        "a001"
    ]
    assert not lines
    with pytest.raises(ConfigError, match="no adapter"):
        time_transfers(engine, [broken], 1 << 30, lines.append)
    engine.close()
    assert len(lines) == 1
    assert "a000" in lines[0]


def test_decode_steps_are_known_exactly(engine, timer, sizes):
    batch = Batch("three", ("a001", None, "a001"), context=33)
    steps = timer.time(batch, num_steps=3)
    kv_token_bytes = engine.info.page_bytes // engine.info.page_tokens
    contexts = [step.work.kv_bytes // kv_token_bytes for step in steps]
    assert [later - one for one, later in pairwise(contexts)] == [3, 3]
    # 31 + 33 + 2 tokens fill the first two steps; the third row reads the rest in a third.
    assert contexts[0] >= 3 * (33 + 2)
    for step in steps:
        assert step.label == "three"
        assert step.work.num_tokens == step.work.num_logit_rows == 3
        assert step.work.num_adapters == 1
        assert step.work.num_adapted_tokens == 2
        assert step.work.tile_bytes == sizes["a001"]
        assert step.work.lora_products == 2 * sizes["a001"]
        assert step.seconds == pytest.approx(0.001)
    assert not engine.has_work


def test_a_long_prompt_is_timed_part_by_part(timer, sizes):
    steps = timer.time(Batch("long", prompts=(("a002", 133),)), num_steps=3)
    assert [step.label for step in steps] == ["long from 0", "long from 64", "long from 128"]
    assert [step.work.num_tokens for step in steps] == [64, 64, 5]
    assert [step.work.num_logit_rows for step in steps] == [0, 0, 1]
    assert [step.work.attention_pairs for step in steps] == [
        64 * 65 // 2,
        64 * 64 + 64 * 65 // 2,
        5 * 128 + 15,
    ]
    assert steps[2].work.lora_products == 5 * sizes["a002"]


def test_prompts_beside_decodes_are_one_step(timer, sizes):
    batch = Batch("mixed", (None, "a000"), 7, prompts=(("a001", 13), ("a002", 17)))
    (step,) = timer.time(batch, num_steps=3)
    assert step.work.num_tokens == 32
    assert step.work.num_logit_rows == 4
    assert step.work.num_adapters == 3
    assert step.work.tile_bytes == sum(sizes.values())


def test_a_step_that_is_not_what_it_is_taken_for_is_an_error(engine, sizes):
    """This timer believes in larger steps than the engine makes."""
    wrong = StepTimer(engine, sizes, 2 * BUDGET, TickingClock())
    with pytest.raises(EngineError, match="not known"):
        wrong.time(Batch("two", prompts=((None, 60), (None, 60))), num_steps=1)
    assert not engine.has_work


def test_batches_have_the_rows_and_adapters_that_they_say():
    for batch in fitted_batches(NAMES):
        if " adapters" not in batch.label:
            continue
        num_rows, num_adapters = (int(part.split()[0]) for part in batch.label.split(","))
        assert len(batch.rows) == num_rows
        assert len(set(batch.rows) - {None}) == num_adapters
    labels = [batch.label for batch in (*fitted_batches(NAMES), *checked_batches(NAMES))]
    assert len(labels) == len(set(labels))
    assert rotated(NAMES, 3, 2, 6) == ("a006", "a000", "a006")
    assert fitted_batches(NAMES[:1])
    assert checked_batches(NAMES[:1])


def test_what_an_engine_cannot_run_is_left_out_and_said():
    batches = [*fitted_batches(NAMES), *checked_batches(NAMES)]
    roomy = Limits(
        num_sequences=128,
        max_step_tokens=512,
        max_model_len=32_768,
        pool_tokens=1 << 20,
        page_tokens=16,
    )
    assert possible(batches, roomy, 8, refuse_to_report) == batches
    narrow = Limits(
        num_sequences=8, max_step_tokens=64, max_model_len=133, pool_tokens=1000, page_tokens=7
    )
    lines: list[str] = []
    found = possible(batches, narrow, 8, lines.append)
    assert 0 < len(found) == len(batches) - len(lines)
    assert max(len(batch.rows) for batch in found) <= 8
    assert max(batch.context for batch in found) < 133


def test_rows_take_whole_pages_of_the_pool():
    batch = Batch("rows", (None,) * 3, 1)  # 7 tokens each at the end of a step
    limits = {"num_sequences": 8, "max_step_tokens": 64, "max_model_len": 99}
    pages_of_7 = Limits(**limits, pool_tokens=23, page_tokens=7)
    pages_of_8 = Limits(**limits, pool_tokens=23, page_tokens=8)
    used = next(
        n for n in range(99) if Limits(**limits, pool_tokens=n, page_tokens=1).allow(batch, 3)
    )
    assert used == 21
    assert pages_of_7.allow(batch, 3)
    assert not pages_of_8.allow(batch, 3)
    prompts = Batch(
        "prompts", prompts=((None, 7), (None, 7))
    )  # 8 tokens each with the first answer
    assert Limits(**limits, pool_tokens=16, page_tokens=8).allow(prompts, 3)
    assert not Limits(**limits, pool_tokens=17, page_tokens=9).allow(prompts, 3)


def test_engine_options_are_refused_before_adapters_are_made(swarm, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("adapters were made")

    monkeypatch.setattr(module, "write_adapters", refuse)
    options = CalibrateOptions(model=str(swarm / "model"), engine=(("dtype", "foo"),))
    with pytest.raises(ConfigError, match="dtype is 'foo'"):
        calibrate(options, refuse_to_report)


def test_random_adapters_keep_to_their_bytes():
    options = CalibrateOptions(model="m", num_adapters=7, ranks=(8, 64), adapters_bytes=100)
    assert ranks_within(options, bytes_of_rank=1) == [8, 64, 8]
    assert ranks_within(options, bytes_of_rank=1000) == [8]
    assert ranks_within(CalibrateOptions(model="m", num_adapters=3), 1) == [8, 16, 32]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_rounds": 0}, "num_rounds is 0"),
        ({"ranks": ()}, "ranks are"),
        ({"ranks": (8, 0)}, "ranks are"),
        ({"engine": (("host_cache_dir", "x"),)}, "host_cache_dir cannot be set"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        CalibrateOptions(model="m", **changes)


def test_rates_count_every_matrix_of_a_kind(engine):
    decoder = engine.decoder
    rates = machine_rates(decoder, TickingClock(), rows=(1, 3), array_bytes=1 << 12)
    assert rates.read_bytes_per_s == pytest.approx((1 << 12) / 0.001)
    assert [(rate.linear, rate.num_rows) for rate in rates.gemm[:2]] == [
        ("qkv_proj", 1),
        ("qkv_proj", 3),
    ]
    elements = sum(tensor.numel() for name, tensor in decoder.weights() if name.endswith("weight"))
    norms = sum(tensor.numel() for name, tensor in decoder.weights() if "norm" in name)
    rest = norms + (0 if decoder.config.ties_embeddings else decoder.embedding_VD.numel())
    ones = sum(rate.operations_per_s for rate in rates.gemm if rate.num_rows == 1)
    assert ones * 0.001 / 2 == pytest.approx(elements - rest)


@pytest.mark.parametrize("has_adapters", [True, False])
def test_calibrate_measures_a_tiny_model(swarm, tmp_path, monkeypatch, has_adapters):
    monkeypatch.setattr(module, "machine_rates", few_rates)
    options = CalibrateOptions(
        model=str(swarm / "model"),
        adapters=(str(swarm / "adapters"),) if has_adapters else (),
        num_adapters=3,
        ranks=(1, 7),
        num_rounds=1,
        num_steps=2,
        engine=ENGINE,
    )
    lines: list[str] = []
    found = calibrate(options, lines.append, TickingClock())
    found.write(tmp_path / "costs.json")
    assert CostFigures.read(tmp_path / "costs.json") == found
    assert found.num_threads == 2
    assert found.dtype == "float32"
    assert found.fitted.num_points > 7
    assert found.checked.num_points > 0
    # By this clock every step takes as long as every other.
    assert found.step.fixed_s == pytest.approx(0.001, rel=1e-3)
    assert found.fitted.worst_error == pytest.approx(0.0, abs=1e-3)
    assert found.load_s(1000) > 0
    assert found.copy_s(1000) > 0
    assert math.isfinite(found.copy.byte_s)
    # The updates of the adapters given here are larger than the weights: they are not merged.
    assert (found.merge_s is None) == has_adapters
    assert found.merge_s is None or 0.0 < found.merge_s < math.inf
    assert any("left out" in line for line in lines)
    assert any("prompt of 48" in line for line in lines)


def test_an_engine_starts_from_a_cost_model_and_says_where_it_differs(swarm, tmp_path):
    file = tmp_path / "costs.json"
    lines: list[str] = []
    engine = make_engine(swarm, num_threads=1)
    weight_bytes, plausible_s = engine.info.weight_bytes, engine._memory.costs.prefix_page_s(16, 0)
    engine.close()
    figures(num_threads=2, weight_bytes=weight_bytes).write(file)
    engine = make_engine(swarm, lines.append, cost_model=str(file), num_threads=1)
    page_s = engine._memory.costs.prefix_page_s(16, 0)
    engine.close()
    assert page_s == CostModel(CostFigures.read(file)).prefix_page_s(16, 0)
    assert page_s != pytest.approx(plausible_s, rel=0.05)
    assert [line for line in lines if "cost model" in line] == [
        "cost model of another engine: num_threads=2, here 1"
    ]


def test_an_engine_refuses_a_cost_model_that_is_none(swarm, tmp_path):
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no cost model"):
        make_engine(swarm, cost_model=str(tmp_path / "costs.json"))


def test_calibrate_is_imported_without_torch():
    code = "import sys, loraswarm.bench.calibrate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def few_rates(decoder, clock):
    return machine_rates(decoder, clock, rows=(1, 3), array_bytes=1 << 12)
