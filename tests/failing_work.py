"""Work for a process of its own, which imports no more than this: it ends well, badly, or never."""

from __future__ import annotations

import os
import time

FOREVER_S = 1000.0


def three_rows():
    yield from ({"row": index} for index in range(3))


def a_row_and_an_error():
    yield {"row": 0}
    raise ValueError("first line\nsecond line")


def a_row_and_no_process():
    yield {"row": 0}
    os._exit(7)


def no_end():
    time.sleep(FOREVER_S)
    yield {"row": 0}
