"""Two threads for everything, so that tests run alike on two cores and on many."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("NUMBA_NUM_THREADS", "4")
