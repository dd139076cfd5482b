"""Programs: what is recorded runs in order, at the end of the block, on any number of threads."""

import threading
import time

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


@pytest.mark.skipif(THREAD_COUNTS[-1] < 2, reason="one CPU has no other threads")
def test_other_threads_work_while_this_one_records():
    weights, x = chain(8)
    packed = [pack_linear(weight) for weight in weights]
    expected = run_chain(weights, x)
    with recording():
        y = x
        for weight in packed:
            y = linear(y, weight, None)
        for _ in range(3000):  # read before the end: only others can have computed it
            if torch.equal(y, expected):
                break
            time.sleep(0.01)
        assert torch.equal(y, expected)


def test_more_and_fewer_threads_from_one_program_to_the_next(monkeypatch):
    weights, x = chain(8)
    expected = run_chain(weights, x)
    for num_threads in (THREAD_COUNTS[-1], 1, THREAD_COUNTS[-1]) * 10:
        monkeypatch.setattr(threads, "_count", num_threads)
        assert torch.equal(run_chain(weights, x), expected)


def test_large_results_are_not_kept():
    weight = pack_linear(torch.zeros(program_module.MAX_KEPT_BYTES // 64, 2).bfloat16())
    x = torch.zeros(64, 2).bfloat16()
    with recording():
        y = linear(x, weight, None)
    assert torch.all(y == 0)
    kept = program_module.programs._buffers._blocks.values()
    assert all(
        block.nbytes <= program_module.MAX_KEPT_BYTES for blocks in kept for block, _ in blocks
    )


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


def test_finish_returns_when_all_is_done():
    weights, x = chain(1)
    packed = pack_linear(weights[0])
    expected = linear(x, packed, None)
    with recording():
        y = linear(x, packed, None)
        finish()
        assert torch.equal(y, expected)
        y.fill_(7)
        finish()
        assert torch.all(y == 7)
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


def test_an_exception_leaves_nothing_undone():
    weights, x = chain(1)
    packed = pack_linear(weights[0])
    expected = linear(x, packed, None)
    recorded = []

    def fail():
        with recording():
            recorded.append(linear(x, packed, None))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(recorded[0], expected)
    assert not program_module.programs.is_recording
    with recording():
        again = linear(x, packed, None)
    assert torch.equal(again, expected)


def test_more_operations_than_a_program_holds():
    weights, x = chain(3)
    packed = [pack_linear(weight) for weight in weights]
    expected = run_chain(weights * 400, x)
    with recording():
        y = x
        for _ in range(400):
            for weight in packed:
                y = linear(y, weight, None)
    assert torch.equal(y, expected)


def test_threads_that_use_kernels_at_once_do_not_meet():
    cases = [chain(40, seed) for seed in range(3)]
    expected = [run_chain(*case) for case in cases]
    wrong = []

    def run(number):
        packed = [pack_linear(weight) for weight in cases[number][0]]
        for _ in range(30):
            with recording():
                y = cases[number][1]
                for weight in packed:
                    y = linear(y, weight, None)
            if not torch.equal(y, expected[number]):
                wrong.append(number)

    running = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong
