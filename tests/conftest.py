"""Two threads for everything, so that tests run alike on two cores and on many. Adapters that a
test has just written are taken as complete."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("NUMBA_NUM_THREADS", "4")

import pytest


@pytest.fixture(autouse=True, scope="session")
def nothing_needs_to_settle():
    """Tests of settling say themselves how long it takes."""
    from loraswarm.adapters import scanner

    before, scanner.SETTLE_S = scanner.SETTLE_S, 0.0
    yield
    scanner.SETTLE_S = before
