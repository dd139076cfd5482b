"""Large tensors in huge pages: ordinary tensors to whoever uses them."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from loraswarm.kernels.huge_pages import HUGE_PAGE_BYTES, empty_in_huge_pages


@pytest.mark.parametrize("num_bytes", [0, 64, HUGE_PAGE_BYTES - 2, HUGE_PAGE_BYTES, 3 << 20])
def test_a_tensor_of_zeros_that_can_be_written(num_bytes):
    tensor = empty_in_huge_pages((num_bytes // 2, 1), torch.bfloat16)
    assert tensor.shape == (num_bytes // 2, 1)
    assert not tensor.any()
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_more_than_the_machine_has_is_a_runtime_error():
    with pytest.raises(RuntimeError, match="no memory for a tensor of"):
        empty_in_huge_pages((1 << 60,), torch.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how memory is mapped")
def test_linux_is_asked_for_huge_pages():
    tensor = empty_in_huge_pages((8 << 20,), torch.uint8)
    address = tensor.data_ptr()
    areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
    inside = [
        flags.split("\n")[0].split()
        for area, flags in itertools.pairwise(areas)
        if _holds(area, address)
    ]
    assert inside
    assert "hg" in inside[0]
    assert "sh" not in inside[0]


def _holds(area: str, address: int) -> bool:
    for line in area.splitlines():
        first, _, rest = line.partition("-")
        last = rest.partition(" ")[0]
        try:
            if int(first, 16) <= address < int(last, 16):
                return True
        except ValueError:
            continue
    return False
