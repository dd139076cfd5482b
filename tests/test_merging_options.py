"""`--merge`: what it takes, what it refuses in one line, and what it costs between steps."""

from __future__ import annotations

import time

import pytest

from engine_factory import GREEDY, make_engine, make_request, prompt_of, run_tokens
from loraswarm import LLM
from loraswarm.__main__ import main
from loraswarm.config import EngineConfig
from loraswarm.core.request import SamplingParams
from loraswarm.engine import merging
from loraswarm.errors import ConfigError
from merging_cases import key_of, merge, merged_names, merging_engine, save_weak_swarm
from tiny_tokenizers import byte_level

NUM_LINEARS = 8
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    tokenizer = byte_level()
    save_weak_swarm(path, 3, vocab_size=tokenizer.vocab_size)
    tokenizer._loaded.save_pretrained(path / "model")
    return path


def test_an_adapter_named_at_start_is_merged_before_anything_is_served(swarm):
    lines: list[str] = []
    engine = make_engine(swarm, lines.append, merge="a001")
    assert merged_names(engine) == ["a001"] * NUM_LINEARS
    assert engine.merger.share_merged == 1.0
    assert any(line.startswith("merged adapter=a001 linears=8 share=1.00") for line in lines)
    plain = make_engine(swarm)
    for name in ("a001", "a002", None):
        request = make_request("r", name, prompt_of(2, 17), GREEDY)
        assert run_tokens(engine, [request]) == run_tokens(plain, [request])
    assert merged_names(engine) == ["a001"] * NUM_LINEARS
    assert engine.merger.num_switches == 1


def test_nothing_is_merged_by_default_or_of_itself(swarm):
    assert make_engine(swarm).merger is None
    assert EngineConfig(model="m").merge == "off"
    engine = merging_engine(swarm)
    run_tokens(engine, [make_request("r", "a001", prompt_of(2, 17), GREEDY)])
    assert (engine.merger.num_merged, engine.merger.bytes) == (0, 0)


def test_a_policy_is_asked_before_every_step(swarm):
    engine = merging_engine(swarm)
    engine._look_ahead.is_on = False
    keys = [key_of(engine, "a000"), None, key_of(engine, "a001")]
    asked = []

    def policy():
        asked.append(keys[len(asked) // 3 % 3])
        return asked[-1]

    engine.merge_policy = policy
    run_tokens(engine, [make_request("r", "a002", prompt_of(2, 17), GREEDY)])
    assert len(asked) >= 9
    assert engine.merger.target == asked[-1]
    assert engine.merger.num_switches >= 3


def test_llm_takes_the_option(swarm):
    adapters = str(swarm / "adapters")
    options = {"pool_bytes": 8 << 20, "num_threads": 2, "seed": 0}
    with LLM(str(swarm / "model"), adapters, merge="a000", **options) as llm:
        assert llm._engine.merger.num_merged == NUM_LINEARS
        merged = llm.generate(["abc", "abc"], SHORT, ["a000", None], use_progress_bar=False)
    with LLM(str(swarm / "model"), adapters, **options) as llm:
        plain = llm.generate(["abc", "abc"], SHORT, ["a000", None], use_progress_bar=False)
    assert [each.token_ids for each in merged] == [each.token_ids for each in plain]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "nobody"}, "--merge 'nobody': .*a000"),
        ({"merge": ""}, "merge is empty"),
        ({"merge": "a000", "merge_bytes": 0}, "merge_bytes is 0"),
        ({"merge": "a000", "quantize": "int8"}, "--merge 'a000' cannot be: .*integers"),
        ({"merge": "a002", "pool_bytes": 5 << 13}, "--merge 'a002': .*--pool-bytes"),
        ({"merge": "model"}, "--merge 'model': that is the base model"),
        ({"merge": "a000", "merge_bytes": 1}, "'a000' is in no linear: .* may take 1 bytes"),
        ({"merge": True}, "merge is True; it must be a name"),
        ({"merge": "auto", "merge_policy": ["cost"]}, "merge_policy is .* must be a name"),
        (
            {"merge": "a000", "merge_policy": "dlora"},
            "merge_policy is 'dlora', but merge is 'a000'",
        ),
        ({"merge_bytes": 1 << 20}, "--merge-bytes is 1,048,576, but .* --merge is off"),
    ],
)
def test_what_cannot_be_merged_is_refused(swarm, options, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(swarm, **options)


def test_auto_says_that_integers_are_not_merged_and_serves_on(swarm):
    lines: list[str] = []
    engine = make_engine(swarm, lines.append, merge="auto", quantize="int8")
    assert engine.merger is None
    assert [line for line in lines if line.startswith("merge=off reason=")]


def test_an_adapter_whose_every_update_is_too_large_is_refused(swarm, monkeypatch):
    monkeypatch.setattr(merging, "MAX_UPDATE", 0.0)
    with pytest.raises(ConfigError, match="'a000' is in no linear: each is left unmerged"):
        make_engine(swarm, merge="a000")


def test_auto_says_that_there_is_no_memory_for_any_linear(swarm):
    said: dict[int | None, list[str]] = {}
    for merge_bytes in (1, None):
        lines: list[str] = []
        make_engine(swarm, lines.append, merge="auto", merge_bytes=merge_bytes)
        said[merge_bytes] = [line for line in lines if "merges nothing" in line]
    assert said[None] == []
    assert len(said[1]) == 1
    assert "--merge-bytes" in said[1][0]


def test_the_command_line_answers_an_unknown_name_in_one_line(swarm, capsys, monkeypatch):
    arguments = ["serve", str(swarm / "model"), "--adapters", str(swarm / "adapters")]
    arguments += ["--merge", "nobody", "--port", "0", "--pool-bytes", "8MiB"]
    monkeypatch.setattr("sys.argv", ["loraswarm", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "--merge 'nobody'" in lines[0]
    assert "a000" in lines[0]


def test_an_adapter_that_cannot_be_read_is_refused_with_the_reason(swarm, tmp_path):
    broken = tmp_path / "adapters" / "broken"
    broken.mkdir(parents=True)
    for file in (swarm / "adapters" / "a000").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    content = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ConfigError, match="--merge 'broken': "):
        make_engine(swarm, adapters=(str(tmp_path / "adapters"),), merge="broken")


class FakeTime:
    """A clock that merging moves on: so many seconds a byte."""

    def __init__(self, s_per_byte: float) -> None:
        self.now_s = 0.0
        self.s_per_byte = s_per_byte

    def perf_counter(self) -> float:
        return self.now_s


@pytest.mark.parametrize("s_per_byte", [1e-9, 1e-6])
def test_a_budget_is_kept_by_what_was_learned_and_large_linears_are_split(
    tmp_path, monkeypatch, s_per_byte
):
    monkeypatch.setattr(merging, "MAX_UPDATE", 100.0)
    save_weak_swarm(tmp_path, 1, hidden_size=192, intermediate_size=640)
    engine = merging_engine(tmp_path, pool_bytes=32 << 20)
    merger, clock = engine.merger, FakeTime(s_per_byte)
    merger.set_target(key_of(engine, "a000"))
    while not merger.holds.try_hold(merger.target):
        engine._collect()
    monkeypatch.setattr(merging, "time", clock)
    extend = merging.MergedCopy.extend
    pieces = []

    def timed(copy, num_rows, pool, tiles):
        num_bytes = extend(copy, num_rows, pool, tiles)
        clock.now_s += s_per_byte * num_bytes
        pieces.append(num_bytes)
        return num_bytes

    monkeypatch.setattr(merging.MergedCopy, "extend", timed)
    total = sum(place.num_bytes for place in merger._places)
    budget_s = 0.1 * total * s_per_byte
    spent = []
    while not merger.is_settled:
        before_s = clock.now_s
        merger.advance(budget_s)
        spent.append(clock.now_s - before_s)
    assert sum(pieces) == total
    assert len(pieces) > NUM_LINEARS  # some linear was made in several pieces
    assert merger.s_per_byte == pytest.approx(s_per_byte, rel=0.05)
    assert max(spent[8:]) <= 1.1 * budget_s
    assert len(spent) <= 40


def test_switching_goes_on_while_requests_run_and_within_a_share_of_a_step(swarm, monkeypatch):
    engine = merging_engine(swarm)
    budgets = []
    advance = engine.merger.advance
    monkeypatch.setattr(
        engine.merger, "advance", lambda budget_s: (budgets.append(budget_s), advance(budget_s))
    )
    engine.merger.set_target(key_of(engine, "a000"))
    begin_s = time.perf_counter()
    run_tokens(engine, [make_request("r", "a001", prompt_of(2, 17), GREEDY)])
    elapsed_s = time.perf_counter() - begin_s
    assert budgets[0] == 0.0
    assert all(0 < budget_s < elapsed_s for budget_s in budgets[-5:])
    assert engine.merger.num_merged > 0


def test_what_is_not_served_is_no_target(swarm):
    engine = merging_engine(swarm)
    key = key_of(engine, "a000")
    assert engine.merger.why_not(key) is None
    gone = (key[0], "another digest")
    assert "not served" in engine.merger.why_not(gone)
    engine.merger.set_target(gone)
    assert (engine.merger.target, engine.merger.num_switches) == (None, 0)


def test_a_copy_that_is_being_made_counts_as_memory(swarm):
    engine = merging_engine(swarm)
    merger, sizes = engine.merger, [place.num_bytes for place in engine.merger._places]
    merger.set_target(key_of(engine, "a000"))
    while merger._making is None:
        engine._collect()
        merger.advance(0.0)
    assert merger.num_merged == 0
    assert (merger.bytes, merger.bytes_left) == (sizes[0], sum(sizes) - _made(merger))
    assert merger.reserved_bytes >= sizes[0]
    merger.set_target(None)
    assert merger.bytes == 0


def _made(merger) -> int:
    copy = merger._making[1]
    return (copy.num_rows - copy.num_left) * copy.row_bytes


def test_merged_weights_are_reported(swarm):
    engine = merging_engine(swarm)
    assert (engine.merger.bytes_left, engine.merger.share_merged) == (0, 0.0)
    merge(engine, "a000", 3)
    total = sum(place.num_bytes for place in engine.merger._places)
    merged = sum(place.num_bytes for place in engine.merger._places[:3])
    assert engine.merger.bytes == merged
    assert engine.merger.share_merged == pytest.approx(merged / total)
    state = engine.stats().merging
    assert (state.target, state.share) == ("a000", engine.merger.share_merged)
    assert (state.num_merged_linears, state.merged_bytes, state.total_switches) == (3, merged, 1)
    assert make_engine(swarm).stats().merging is None
