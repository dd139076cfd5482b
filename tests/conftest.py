"""Two threads for everything, so that tests run alike on two cores and on many. Adapters that a
test has just written are taken as complete. No test sees a CUDA device, and Triton's kernels are
interpreted, unless LORASWARM_TEST_DEVICE is cuda."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("NUMBA_NUM_THREADS", "4")
# Idle threads of torch sleep at once: where another process has their core, spinning ones keep each
# small product waiting for milliseconds.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if os.environ.get("LORASWARM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from case_selection import pairwise

SLICES = 16
"""Of the cases of a test that interprets Triton's kernels one in so many is run."""
MAX_PRODUCT = 10
"""A test of three parameters or more has at most so many cases in full."""
WHOLE_SUITE = 2000
COMPILE = (
    "import sys\nfrom loraswarm.kernels import cpu\n"
    "for dtype in sys.argv[1:]:\n    cpu.warm_up(dtype, lambda line: None)\n"
)
compiling = []


def pytest_collection_modifyitems(config, items):
    """Run fewer cases than there are, unless LORASWARM_TEST_ALL is 1. A device runs all.

    Interpreted kernels take minutes: of each test's cases a fixed slice is run. Of any other test's
    cases so many are run that every two values which meet in one of all meet in one of these.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("LORASWARM_TEST_ALL") == "1":
        return
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    left = set()
    for cases in tests.values():
        if len(cases) == 1:
            continue
        if Path(cases[0].path).name.startswith("test_triton_"):
            left.update(item for item in cases[1:] if zlib.crc32(item.nodeid.encode()) % SLICES)
        elif len(cases) > MAX_PRODUCT:
            left.update(set(cases) - set(pairwise(cases)))
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def pytest_collection_finish(session):
    """Where all tests are run, let a process compile kernels that later ones need beside the first:
    half a minute for each dtype, where they are not in the cache."""
    if len(session.items) < WHOLE_SUITE or session.config.option.collectonly:
        return
    command = (sys.executable, "-c", COMPILE, "bfloat16", "float16")
    compiling.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))


def pytest_sessionfinish():
    for process in compiling:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True, scope="session")
def nothing_needs_to_settle():
    """Tests of settling say themselves how long it takes."""
    from loraswarm.adapters import scanner

    before, scanner.SETTLE_S = scanner.SETTLE_S, 0.0
    yield
    scanner.SETTLE_S = before


@pytest.fixture(autouse=True, scope="module")
def threads_of_torch():
    """What an engine has set for the whole process goes with the module that made it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


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
