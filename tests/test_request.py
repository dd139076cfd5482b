"""Sampling parameters and options refuse what they do not understand, by name."""

from __future__ import annotations

import math

import pytest

from loraswarm.config import EngineConfig, ServerConfig
from loraswarm.core.request import SamplingParams, check_context
from loraswarm.errors import ConfigError, InvalidRequest, UnknownAdapter


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("temperature", 10**400),
        ("presence_penalty", -(10**400)),
        ("logit_bias", {3: 10**400}),
        ("top_k", -2),
        ("top_k", 2**63),
        ("min_tokens", 2**63),
        ("stop", (5,)),
        ("min_p", 2.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("seed", 2**64),
        ("stop", "abc"),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-3: 1.0}),
    ],
)
def test_a_value_out_of_range_is_refused_by_field(field, value):
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_defaults_and_extremes_are_accepted():
    SamplingParams()
    SamplingParams(max_tokens=None, temperature=0, top_k=-1, seed=-1, logprobs=0, stop=("a",))


def test_context_check_names_both_numbers():
    check_context(10, 6, 16)
    check_context(16, 0, 16)
    check_context(15, None, 16)
    with pytest.raises(InvalidRequest, match=r"9,120 tokens; this model allows 8,192"):
        check_context(9120, None, 8192)
    with pytest.raises(InvalidRequest, match=r"prompt has 10 tokens and max_tokens is 7.* 16"):
        check_context(10, 7, 16)
    with pytest.raises(InvalidRequest, match="prompt has 16 tokens"):
        check_context(16, None, 16)


def test_unknown_option_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'pool_byts'; known options: adapters, .*pool_bytes"):
        EngineConfig.from_options({"model": "m", "pool_byts": 3})


@pytest.mark.parametrize(
    "options",
    [
        {"model": ""},
        {"model": "m", "dtype": "int8"},
        {"model": "m", "device": "tpu"},
        {"model": "m", "pool_bytes": 0},
        {"model": "m", "memory_utilization": 0.0},
        {"model": "m", "max_num_sequences": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        EngineConfig.from_options(options)


def test_impossible_server_options_are_refused():
    with pytest.raises(ConfigError, match="port is 70000"):
        ServerConfig(port=70000)


def test_unknown_adapter_lists_at_most_twenty_names():
    assert "known: a, b" in str(UnknownAdapter("x", ["b", "a"]))
    message = str(UnknownAdapter("x", [f"n{i:03}" for i in range(100)]))
    assert "n019" in message
    assert "n020" not in message
    assert "100 in all" in message
