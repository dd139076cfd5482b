"""Runs a generator in a process of its own and takes its rows as they come.

What a kernel that fails leaves of a CUDA context is of no use to what runs after it; a process that
is ended takes that along, and the rows it has sent stay. Imports no torch. Used by run.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

JOIN_S = 10.0
"""For a process that has nothing left to send; one that does not end is ended."""

Row = dict[str, Any]
Work = Callable[..., Iterable[Row]]


def run_isolated(
    work: Work, arguments: tuple[Any, ...], limit_s: float, take: Callable[[Row], None]
) -> str | None:
    """Call `take` with each row of `work(*arguments)`; returns why there are no more, None if it
    has come to its end.

    `work` is a function of a module, and is what the new process imports. After `limit_s` seconds
    the process is ended.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    end_s = time.monotonic() + limit_s
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end_s - time.monotonic())):
            row, fault = receiver.recv()
            if row is None:
                return fault
            take(row)
    except EOFError:
        process.join(JOIN_S)
        return f"its process ended with code {process.exitcode}"
    finally:
        process.join(0 if time.monotonic() >= end_s else JOIN_S)
        process.kill()
        process.join()
        receiver.close()
    return f"it was not done after {limit_s:g} s"


def _send(sender: Connection, work: Work, arguments: tuple[Any, ...]) -> None:
    """In the new process: (row, None) for each row, then (None, what went wrong or None)."""
    try:
        for row in work(*arguments):
            sender.send((row, None))
    except BaseException as error:
        lines = str(error).splitlines()
        sender.send((None, f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"))
        raise
    sender.send((None, None))
