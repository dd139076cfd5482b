"""Two threads for everything, so that tests run alike on two cores and on many. Adapters that a
test has just written are taken as complete. No test sees a CUDA device, and Triton's kernels are
interpreted, unless LORASWARM_TEST_DEVICE is cuda."""

import os
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("NUMBA_NUM_THREADS", "4")
if os.environ.get("LORASWARM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

SLICES = 16
"""Of the cases of a test that interprets Triton's kernels one in so many is run."""


def pytest_collection_modifyitems(config, items):
    """Interpreted kernels take minutes: of each test's cases a fixed slice is run, unless
    LORASWARM_TEST_ALL is 1. A device runs all."""
    if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("LORASWARM_TEST_ALL") == "1":
        return
    seen, left = set(), []
    for item in items:
        is_sliced = Path(item.path).name.startswith("test_triton_") and hasattr(item, "callspec")
        test = item.nodeid.split("[")[0]
        if is_sliced and test in seen and zlib.crc32(item.nodeid.encode()) % SLICES:
            left.append(item)
        seen.add(test)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(autouse=True, scope="session")
def nothing_needs_to_settle():
    """Tests of settling say themselves how long it takes."""
    from loraswarm.adapters import scanner

    before, scanner.SETTLE_S = scanner.SETTLE_S, 0.0
    yield
    scanner.SETTLE_S = before


@pytest.fixture
def interpreted_triton(monkeypatch):
    """Interpreted kernels round to bfloat16 to the nearest, as a device does, warn of no float, and
    loop up to loaded numbers, which NumPy 2.4 keeps Triton 3.6 from.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    def converted(numbers, source, target, rounding_mode):
        if target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(numbers)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        assert source == tl.bfloat16
        return np.array(numbers).astype(np.uint32) << 16

    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
    with np.errstate(all="ignore"):
        yield
