"""Programs: what is recorded runs in order, at the end of the block, on any number of threads."""

import pytest
import torch

from kernel_cases import THREAD_COUNTS, use_all_threads
from loraswarm.kernels.cpu import finish, linear, pack_linear, recording
from loraswarm.kernels.cpu import program as program_module
from loraswarm.kernels.cpu.dot import HAS_DOT
from loraswarm.kernels.cpu.jit import threads

pytestmark = pytest.mark.skipif(not HAS_DOT, reason="this CPU does not multiply bfloat16 pairs")


@pytest.fixture(autouse=True)
def many_threads(monkeypatch):
    use_all_threads(monkeypatch)


def chain(num_products: int, seed: int = 0):
    """Square weights of width 64 that keep a vector's size, and a batch of 7 rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q.bfloat16()
        for _ in range(num_products)
    ]
    return weights, torch.randn(7, 64, generator=generator).bfloat16()


def run_chain(weights, x):
    for weight in weights:
        x = linear(x, pack_linear(weight), None)
    return x


@pytest.mark.parametrize("num_threads", THREAD_COUNTS)
def test_recorded_operations_give_the_bits_of_immediate_ones(num_threads, monkeypatch):
    weights, x = chain(40)
    expected = run_chain(weights, x)
    monkeypatch.setattr(threads, "_count", num_threads)
    packed = [pack_linear(weight) for weight in weights]
    for _ in range(3):
        with recording():
            y = x
            for weight in packed:
                y = linear(y, weight, None)
        assert torch.equal(y, expected)


def test_a_chain_of_recorded_operations_reuses_memory():
    weights, x = chain(40)
    packed = [pack_linear(weight) for weight in weights]
    with recording():
        y, addresses = x, set()
        for weight in packed:
            y = linear(y, weight, None)
            addresses.add(y.data_ptr())
    assert len(addresses) == 2


def test_memory_of_a_held_result_is_not_given_out_again():
    weights, x = chain(3)
    packed = [pack_linear(weight) for weight in weights]
    with recording():
        first = linear(x, packed[0], None)
    kept = first.clone()
    with recording():
        for weight in packed:
            linear(x, weight, None)
    assert torch.equal(first, kept)
    view = first[2:3]
    del first
    with recording():
        for weight in packed:
            linear(x, weight, None)
    assert torch.equal(view, kept[2:3])


def test_nothing_runs_before_the_end_of_the_block_or_finish():
    weights, x = chain(1)
    packed = pack_linear(weights[0])
    expected = linear(x, packed, None)
    with recording():
        y = linear(x, packed, None)
        y.fill_(7)
        assert torch.all(y == 7)
        finish()
        assert torch.equal(y, expected)
        y.fill_(7)
        finish()
        assert torch.all(y == 7)


def test_blocks_may_be_nested():
    weights, x = chain(2)
    packed = [pack_linear(weight) for weight in weights]
    expected = run_chain(weights, x)
    with recording():
        with recording():
            y = linear(x, packed[0], None)
        y = linear(y, packed[1], None)
    assert torch.equal(y, expected)


def test_after_an_exception_nothing_of_the_block_is_left():
    weights, x = chain(1)
    packed = pack_linear(weights[0])
    y = None

    def fail():
        nonlocal y
        with recording():
            y = linear(x, packed, None)
            y.fill_(7)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.all(y == 7)
    with recording():
        pass
    assert torch.all(y == 7)
    assert not program_module.programs.is_recording
