"""With an adapter merged into any part of the weights, every row has the logits of PEFT."""

from __future__ import annotations

import pytest
import torch

from engine_factory import make_engine, make_request, prompt_of, run
from loraswarm.core.request import Request, SamplingParams
from loraswarm.errors import ConfigError
from loraswarm.kernels.cpu.dot import HAS_DOT
from merging_cases import (
    key_of,
    merge,
    merged_names,
    merging_engine,
    save_weak_swarm,
    shuffle_linears,
    tables,
    weights_digest,
)
from method_cases import METHOD_CASES
from served_logits import SCORED, served_logits
from test_mixing import peft_sum
from test_served_methods import Swarm, check, prompt_with_invocation, requests_for
from tolerance import TOLERANCE, assert_close

NUM_LINEARS = 8
PROMPT_ONLY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
HOT_METHODS = (
    "lora",
    "rslora",
    "lora-bias",
    "dora",
    "vera",
    "tied-lora",
    "alora",
    "lm-head",
    "embeddings",
    "ia3",
)


@pytest.fixture(scope="module")
def methods(tmp_path_factory) -> Swarm:
    return Swarm(tmp_path_factory.mktemp("methods"), "untied", sorted(METHOD_CASES))


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    path = tmp_path_factory.mktemp("weak")
    save_weak_swarm(path, 6)
    return path


@pytest.fixture
def any_size(monkeypatch):
    """Adapters of PEFT's tests may be larger than the weights: float32 stands that."""
    monkeypatch.setattr("loraswarm.engine.merging.MAX_UPDATE", 100.0)


def rows(hot: str) -> list[Request]:
    """The merged adapter twice, itself weakened, another, two sums, and the base."""
    mixes = {
        "hot half": ((hot, 0.5),),
        "hot and cold": ((hot, 1.0), ("a002", -0.4)),
        "cold sum": (("a002", 0.7), ("a003", 0.4)),
    }
    return [
        make_request("hot", hot, prompt_of(1, 21), SCORED),
        make_request("cold", "a003", prompt_of(2, 9), SCORED),
        make_request("base", None, prompt_of(3, 13), SCORED),
        make_request("again", hot, prompt_of(4, 7), SCORED),
        *(
            Request(request_id=name, prompt_token_ids=prompt_of(5, 11), params=SCORED, adapters=mix)
            for name, mix in mixes.items()
        ),
    ]


@pytest.mark.parametrize("num_merged", range(NUM_LINEARS + 1))
def test_any_number_of_merged_linears_gives_the_same_tokens_and_logits(weak, num_merged):
    plain = served_logits(make_engine(weak), rows("a000"))
    for seed in range(2):
        engine = merging_engine(weak)
        before = weights_digest(engine)
        shuffle_linears(engine, seed)
        merge(engine, "a000", num_merged)
        assert engine.merger.num_merged == num_merged
        found = served_logits(engine, rows("a000"))
        for name, (tokens, logits) in found.items():
            assert tokens == plain[name][0], name
            assert_close(logits, plain[name][1], torch.float32)
        assert weights_digest(engine) == before


def test_sums_over_merged_weights_are_those_of_peft(weak):
    engine = merging_engine(weak)
    merge(engine, "a000")
    found = served_logits(engine, rows("a000"))
    for name, mix in (
        ("hot", (("a000", 1.0),)),
        ("hot half", (("a000", 0.5),)),
        ("hot and cold", (("a000", 1.0), ("a002", -0.4))),
    ):
        tokens, logits = found[name]
        assert_close(logits, peft_sum(weak, mix, tokens), torch.float32)


def test_rows_that_do_not_subtract_what_is_merged_differ(weak):
    plain = served_logits(make_engine(weak), rows("a000"))
    engine = merging_engine(weak)
    merge(engine, "a000")
    engine._runner._merged = ()
    found = served_logits(engine, rows("a000"))
    relative, absolute = TOLERANCE[torch.float32]
    for name in ("cold", "base", "hot"):
        begin = plain[name][1][:3]
        assert not torch.allclose(found[name][1][:3], begin, 10 * relative, 10 * absolute)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("num_merged", [3, NUM_LINEARS])
@pytest.mark.parametrize("name", HOT_METHODS)
def test_every_method_merges_and_has_the_logits_of_peft_beside_others(methods, name, num_merged):
    engine = merging_engine(methods.path)
    merge(engine, name, num_merged)
    has_tiles = engine.merger.why_not(engine.merger.target) is None
    assert has_tiles == (name != "ia3")
    assert (engine.merger.num_merged > 0) == has_tiles
    check(methods, name, served_logits(engine, requests_for(name)))


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("cold", [name for name in METHOD_CASES if name != "lora"])
def test_every_method_has_the_logits_of_peft_beside_a_merged_adapter(methods, cold):
    engine = merging_engine(methods.path)
    merge(engine, "lora")
    assert engine.merger.num_merged == NUM_LINEARS
    check(methods, cold, served_logits(engine, requests_for(cold)))


def test_requests_of_the_merged_adapter_alone_have_no_tiles(weak):
    engine = merging_engine(weak)
    found = tables(engine)
    hot = [make_request(f"h{i}", "a000", prompt_of(i, 9)) for i in range(3)]
    merge(engine, "a000", 3)
    run(engine, hot)
    assert found
    assert all(table is not None and max(table.max_tiles) > 0 for table in found)
    found.clear()
    engine.merger.set_target(None)
    merge(engine, "a000")
    run(engine, hot)
    assert found == [None] * len(found)
    assert found


def test_decode_steps_keep_their_table_while_nothing_changes(weak):
    engine = merging_engine(weak)
    found = tables(engine)
    merge(engine, "a000", 5)
    requests = [make_request(str(i), f"a00{i}", prompt_of(i, 5)) for i in range(3)]
    run(engine, requests)  # all adapters are in pages now
    found.clear()
    run(engine, requests)
    assert len(found) > 4
    assert len({id(table) for table in found[1:]}) == 1
    assert found[0] is not found[1]


@pytest.mark.skipif(not HAS_DOT, reason="this CPU has no panels")
@pytest.mark.parametrize("num_merged", [0, 1, 4, 6, NUM_LINEARS])
def test_bfloat16_weights_are_rounded_once_and_rows_agree(tmp_path_factory, num_merged):
    path = tmp_path_factory.mktemp("bfloat16")
    save_weak_swarm(path, 4, torch.bfloat16)
    requests = [
        make_request(name or "base", name, prompt_of(i, 33), PROMPT_ONLY)
        for i, name in enumerate(("a000", "a003", None))
    ]
    plain = served_logits(make_engine(path), requests)
    engine = merging_engine(path)
    assert engine.decoder.layers[0].linears()[0].weight.panels is not None
    before = weights_digest(engine)
    merge(engine, "a000", num_merged)
    found = served_logits(engine, requests)
    for name, (_, logits) in found.items():
        assert_close(logits, plain[name][1], torch.bfloat16)
    assert weights_digest(engine) == before
    assert not torch.allclose(plain["a000"][1][:, :], plain["base"][1], rtol=0.1, atol=0.1)


def test_attention_is_merged_first_and_no_more_than_there_is_memory_for(weak):
    linears = merging_engine(weak).decoder.layers[0].linears()
    attention_bytes = 2 * sum(linear.weight.nbytes for linear in linears[:2])
    engine = merging_engine(weak, merge_bytes=attention_bytes + 1)
    merge(engine, "a000")
    assert merged_names(engine) == ["a000"] * 4 + [None] * 4
    assert engine.merger.bytes == attention_bytes
    assert 0 < engine.merger.share_merged < 1
    plain = served_logits(make_engine(weak), rows("a000"))
    for name, (tokens, logits) in served_logits(engine, rows("a000")).items():
        assert tokens == plain[name][0]
        assert_close(logits, plain[name][1], torch.float32)


def test_an_update_larger_than_the_weight_is_not_merged(weak, caplog, monkeypatch):
    monkeypatch.setattr("loraswarm.engine.merging.MAX_UPDATE", 0.15)
    engine = merging_engine(weak)
    with caplog.at_level("INFO", "loraswarm.engine.merging"):
        merge(engine, "a000")
    assert 0 < engine.merger.num_merged < NUM_LINEARS
    assert "is more than that of model.layers.0.self_attn.o_proj" in caplog.text


def test_a_place_that_the_next_adapter_is_too_large_for_has_the_base_again(weak, monkeypatch):
    engine = merging_engine(weak)
    merge(engine, "a000")
    assert merged_names(engine) == ["a000"] * NUM_LINEARS
    monkeypatch.setattr("loraswarm.engine.merging.MAX_UPDATE", 0.15)
    merge(engine, "a001")
    assert set(merged_names(engine)) == {"a001", None}
    assert [key[0] for key in engine.merger.holds.keys] == ["a001"]


def test_what_has_no_low_rank_update_is_refused_by_name_and_no_choice_of_a_policy(methods):
    reason = "changes no linear by a low-rank update"
    nothing = "ia3", "embeddings-and-lm-head"
    for name in nothing:
        with pytest.raises(ConfigError, match=f"'{name}' is in no linear: it {reason}"):
            make_engine(methods.path, merge=name)
    engine = make_engine(methods.path, merge="auto")
    bytes_of = engine._merge_control._facts.bytes_of
    assert [bytes_of(key_of(engine, name)) for name in nothing] == [None, None]
    # Neither DoRA's gains nor a head of its own are ever merged, whatever pages they take.
    alike = {bytes_of(key_of(engine, name)) for name in ("lora", "dora", "saved-lm-head")}
    lora = engine.merger.holds.info_of(key_of(engine, "lora"))
    sizes = [
        module.rank * sum(engine.decoder.shape.site_sizes(module.site)) for module in lora.modules
    ]
    assert alike == {4 * sum(sizes)}
    # VeRA's matrices are one pair in pages, and multiplied by at every linear.
    vera = engine.merger.holds.info_of(key_of(engine, "vera"))
    assert bytes_of(vera.key) > 2 * sum(
        matrix.num_rows * matrix.width * 4 for matrix in vera.shared_matrices()
    )


def test_an_activated_adapter_is_subtracted_before_its_invocation(methods):
    engine = merging_engine(methods.path)
    merge(engine, "alora")
    tokens = prompt_with_invocation(1, 31)
    found = served_logits(engine, [make_request("tested", "alora", tokens, SCORED)])
    check(methods, "alora", found)
