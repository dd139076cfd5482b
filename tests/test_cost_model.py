"""The cost model: known costs are found again in timed steps, and files keep every figure."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cost_cases import BRACKETS, KNOWN, KV_TOKEN_BYTES, figures
from loraswarm.bench.cost_fit import (
    TimedStep,
    fit_step_costs,
    fit_transfer,
    non_negative_least_squares,
    residuals,
    typical,
)
from loraswarm.bench.cost_table import cost_lines
from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import ChunkWork, StepCosts, StepWork
from loraswarm.errors import ConfigError
from loraswarm.memory.costs import LOAD_STEPS, CostModel


def works(seed: int = 0, num_steps: int = 133) -> list[StepWork]:
    """Steps of all kinds: decodes, prompts and both, of 0 to 7 adapters."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_steps):
        num_rows, num_prompts = int(rng.integers(0, 50)), int(rng.integers(0, 3))
        sizes = [1] * num_rows + [int(size) for size in rng.integers(2, 300, num_prompts)]
        chunks = []
        for size in sizes or [1]:
            adapter = int(rng.integers(0, 8)) or None
            chunks.append(
                ChunkWork(
                    num_tokens=size,
                    num_computed=int(rng.integers(0, 2000)),
                    adapter=adapter,
                    adapter_bytes=0 if adapter is None else adapter * 1_000_000,
                    samples=bool(rng.integers(0, 2)),
                )
            )
        found.append(StepWork.of(chunks, KV_TOKEN_BYTES))
    return found


def timed(costs: StepCosts, noise: float = 0.0, seed: int = 0) -> list[TimedStep]:
    rng = np.random.default_rng(seed)
    return [
        TimedStep(str(i), work, costs.step_s(work) * float(np.exp(noise * rng.normal())))
        for i, work in enumerate(works(seed))
    ]


def test_a_step_is_the_sum_of_what_it_does():
    chunks = [
        ChunkWork(num_tokens=1, num_computed=99, adapter="a", adapter_bytes=1000),
        ChunkWork(num_tokens=1, num_computed=9, adapter="a", adapter_bytes=1000),
        ChunkWork(num_tokens=3, num_computed=7, adapter="b", adapter_bytes=500, samples=False),
        ChunkWork(num_tokens=33, num_computed=0),
    ]
    work = StepWork.of(chunks, kv_token_bytes=10)
    assert work == StepWork(
        num_tokens=38,
        num_logit_rows=3,
        num_adapters=2,
        num_adapted_tokens=5,
        tile_bytes=1500,
        lora_products=2 * 1000 + 3 * 500,
        kv_bytes=(100 + 10) * 10,
        attention_pairs=(8 + 9 + 10) + 33 * 34 // 2,
    )
    tokens_s = 4 * 1e-5 + 12 * 2e-4 + 22 * 9e-4
    others_s = (
        3 * 3e-4
        + 7e-4
        + 2 * 5e-5
        + 5 * 3e-5
        + 1500 * 3e-11
        + 3500 * 2e-12
        + 1100 * 4e-11
        + 588 * 2e-8
    )
    assert KNOWN.step_s(work) == pytest.approx(0.02 + tokens_s + others_s)


def test_known_costs_are_found_in_steps_without_noise():
    found = fit_step_costs(timed(KNOWN), BRACKETS)
    for name, value in dataclasses.asdict(KNOWN).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    assert residuals(found, timed(KNOWN, seed=1)).worst_error < 1e-6


def test_noise_moves_predictions_less_than_it_moves_steps():
    found = fit_step_costs(timed(KNOWN, noise=0.05), BRACKETS)
    checked = residuals(found, timed(KNOWN, seed=1))
    assert checked.num_points == 133
    assert 0 < checked.median_error < 0.05
    assert residuals(found, timed(KNOWN, noise=0.05)).median_error > checked.median_error


def test_what_costs_nothing_is_never_found_to_cost_less():
    free = dataclasses.replace(KNOWN, adapter_s=0.0, kv_byte_s=0.0, token_s=(0.0, 2e-4, 0.0, 7e-4))
    found = fit_step_costs(timed(free, noise=0.1, seed=3), BRACKETS)
    values = [*found.token_s, *(getattr(found, name) for name in ("adapter_s", "kv_byte_s"))]
    assert min(values) >= 0.0
    assert residuals(found, timed(free, seed=4)).median_error < 0.1


def test_brackets_beyond_the_largest_step_are_not_free_but_go_on():
    small = [step for step in timed(KNOWN) if step.work.num_tokens <= 40]
    found = fit_step_costs(small, BRACKETS)
    assert found.brackets == (0, 4, 16)
    more, less = (StepWork(num_tokens=count, num_logit_rows=0) for count in (1000, 900))
    assert found.step_s(more) - found.step_s(less) == pytest.approx(100 * 9e-4, rel=1e-6)


def test_least_squares_keep_to_what_is_not_negative():
    a = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative_least_squares(a, a @ [2.0, 3.0]) == pytest.approx([2.0, 3.0])
    falling = np.array([3.0, 2.0, 1.0])
    assert non_negative_least_squares(a, falling) == pytest.approx([2.0, 0.0])
    assert np.linalg.lstsq(a, falling, rcond=None)[0][1] < 0  # what is avoided
    assert non_negative_least_squares(a, -falling).tolist() == [0.0, 0.0]
    scales = np.array([1e-9, 1e9])
    assert non_negative_least_squares(a * scales, a @ [2.0, 3.0]) * scales == pytest.approx(
        [2.0, 3.0]
    )


def test_least_squares_are_the_best_of_all_that_are_not_negative():
    """At the optimum no coefficient can move either way: the conditions of Karush, Kuhn, Tucker."""
    rng = np.random.default_rng(7)
    for _ in range(33):
        a, b = rng.normal(size=(13, 7)), rng.normal(size=13)
        x = non_negative_least_squares(a, b)
        gradient = a.T @ (b - a @ x)
        assert (x >= 0).all()
        assert gradient[x > 0] == pytest.approx(0.0, abs=1e-9)
        assert (gradient[x == 0] <= 1e-9).all()


def test_transfers_have_a_fixed_part_and_one_by_bytes():
    sizes = [1e6, 3e6, 7e6, 133e6]
    found = fit_transfer(sizes, [0.002 + 5e-10 * size for size in sizes])
    assert found.fixed_s == pytest.approx(0.002)
    assert found.byte_s == pytest.approx(5e-10)
    assert fit_transfer([1e6, 1e6], [0.5, 0.5]).seconds_for(1e6) == pytest.approx(0.5)


def test_measurements_of_one_step_become_one_that_nothing_else_has_slowed():
    sizes, seconds = (50, 10, 20, 40, 30), (2.0, 99.0, 1.0, 3.0, 9.0)
    work = [StepWork(num_tokens=1, num_logit_rows=1, kv_bytes=size) for size in sizes]
    steps = [TimedStep("a", each, s) for each, s in zip(work, seconds, strict=True)]
    other = TimedStep("b", work[0], 5.0)
    assert typical([*steps, other]) == [TimedStep("a", work[4], 2.0), other]


def test_figures_that_predict_badly_are_called_doubtful():
    good = figures(checked={"num_points": 7, "median_error": 0.1, "worst_error": 0.9})
    bad = figures(checked={"num_points": 7, "median_error": 0.2, "worst_error": 0.9})
    assert not any("doubtful" in line for line in cost_lines(good))
    assert any("doubtful" in line for line in cost_lines(bad))
    assert any("7 steps, median error 20.0%, worst 90.0%" in line for line in cost_lines(bad))


def test_what_cannot_be_merged_has_no_figure():
    assert any(
        "merge             300 ms into all linears" in line for line in cost_lines(figures())
    )
    assert figures(merge_s=None).merge_s is None
    assert any("merge             cannot be" in line for line in cost_lines(figures(merge_s=None)))


def test_a_file_keeps_every_figure(tmp_path):
    figures().write(tmp_path / "costs.json")
    assert CostFigures.read(tmp_path / "costs.json") == figures()
    assert figures().load_s(2e6) == pytest.approx(0.012)
    assert figures().copy_s(2e6) == pytest.approx(0.0012)


NO_TIME = dataclasses.asdict(KNOWN) | {"fixed_s": 0.0, "token_s": [0.0] * len(KNOWN.token_s)}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), "loraswarm-bench", "format is 'loraswarm-bench'"),
        (("format_version",), 2, "format_version is 2"),
        (("step", "kv_byte_s"), -1e-12, "step.kv_byte_s is -1e-12"),
        (("step", "token_s", 2), float("nan"), r"step.token_s\[2\] is nan"),
        (("step", "fixed_s"), float("inf"), "step.fixed_s is inf"),
        (("step", "brackets"), [0, 16, 4, 64], "step.brackets"),
        (("step", "brackets"), [0, 4], "step.token_s"),
        (("step", "token_s"), 3, "step.token_s is 3; it must be a list"),
        (("load", "byte_s"), "1", "load.byte_s is '1'"),
        (("num_threads",), 2.5, "num_threads is 2.5; it must be a whole number"),
        (("num_threads",), True, "num_threads is True"),
        (("weight_bytes",), 2**63, "weight_bytes is 9223372036854775808"),
        (("machine", "gemm", 0, "linear"), None, r"machine.gemm\[0\].linear is None"),
        (("surprise",), 1, "surprise is not known"),
        (("step",), NO_TIME, "step.fixed_s is 0.0; it must be above 0"),
        (("quantize",), 8, "quantize is 8"),
        (("copy",), None, "copy is None; it must be an object"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused_by_name(tmp_path, path, value, said):
    file = tmp_path / "costs.json"
    figures().write(file)
    document = json.loads(file.read_text())
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=said):
        CostFigures.read(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, "\ufeff{}"])
def test_what_is_no_cost_model_is_refused(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ConfigError, match="is no cost model"):
        CostFigures.read(tmp_path / "costs.json")


def test_a_missing_file_and_a_missing_field_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        CostFigures.read(tmp_path / "none.json")
    figures().write(tmp_path / "costs.json")
    document = json.loads((tmp_path / "costs.json").read_text())
    del document["step"]["adapter_s"]
    (tmp_path / "costs.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"step\.adapter_s is missing"):
        CostFigures.read(tmp_path / "costs.json")
    with pytest.raises(ConfigError, match="cannot write"):
        figures().write(tmp_path / "none" / "costs.json")


def test_eviction_starts_from_what_was_measured_and_follows_what_is_seen():
    costs = CostModel(figures())
    decodes = [ChunkWork(num_tokens=1, num_computed=256)] * 16
    step_s = figures().step_s(StepWork.of(decodes, KV_TOKEN_BYTES))
    in_host_s = LOAD_STEPS * step_s + figures().copy_s(5e6)
    assert costs.adapter_s(5_000_000, is_in_host=True) == pytest.approx(in_host_s)
    assert costs.adapter_s(5_000_000, is_in_host=False) == pytest.approx(
        in_host_s + figures().load_s(5e6)
    )
    assert costs.adapter_s(5_000_000, is_in_host=True) != pytest.approx(
        CostModel().adapter_s(5_000_000, is_in_host=True), rel=0.05
    )
    for _ in range(133):
        costs.saw_step(0.0)
        costs.saw_copy(5_000_000, 3 * figures().copy_s(5e6))
    # Three times as slow as measured, at every size.
    for num_bytes in (1_000_000, 5_000_000):
        assert costs.adapter_s(num_bytes, is_in_host=True) == pytest.approx(
            3 * figures().copy_s(num_bytes), rel=1e-4
        )


def test_measured_attention_says_what_a_later_page_costs():
    costs = CostModel(figures())
    chunk = ChunkWork(num_tokens=512, num_computed=0)
    token_s = figures().step_s(StepWork.of([chunk], KV_TOKEN_BYTES)) / 512
    assert costs.prefix_page_s(16, 0) == pytest.approx(16 * token_s)
    later_s = costs.prefix_page_s(16, 1000)
    assert later_s == pytest.approx(16 * (token_s + 1000 * KNOWN.attention_pair_s))


def test_measured_figures_of_nothing_are_no_division_by_it():
    step = dataclasses.asdict(KNOWN) | {"attention_pair_s": 0.0}
    nothing = {"fixed_s": 0.0, "byte_s": 0.0}
    costs = CostModel(figures(step=step, load=nothing, copy=nothing))
    assert 0 < costs.prefix_page_s(16, 0) < costs.prefix_page_s(16, 10_000)
    assert costs.adapter_s(10**6, is_in_host=False) > 0
