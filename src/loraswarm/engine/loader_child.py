"""A loader in a process of its own: takes jobs from a socket and sends results back.

Run as `python -m loraswarm.engine.loader_child DESCRIPTOR` by engine/loader_process, which holds
the other end of the socket; ends when that end closes. Takes only CPU time that nobody else wants,
so that the engine's steps do not wait for it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from loraswarm.engine.loader_frames import MemoryFiles
    from loraswarm.engine.loader_jobs import Result
    from loraswarm.engine.loader_worker import WorkerSpec

NICENESS = 19
log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the engine decides when to stop
    threading.excepthook = _end_in_failure
    code = 1
    try:
        give_way()
        serve(socket.socket(fileno=int(sys.argv[1])))
        code = 0
    except BaseException:
        log.exception("loader failed")
    finally:
        sys.stderr.flush()
        os._exit(code)  # jobs are given up where they are


def _end_in_failure(args: threading.ExceptHookArgs) -> None:
    """A thread that fails has lost a job; the other end learns of it by our end."""
    log.error("loader failed", exc_info=args.exc_value)
    sys.stderr.flush()
    os._exit(1)


def give_way() -> None:
    """Let every other process have the CPU first, as far as the system allows."""
    os.nice(NICENESS)
    if hasattr(os, "SCHED_IDLE"):
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError as error:
            log.warning("loader runs at nice %d only: %s", NICENESS, error)


def serve(connection: socket.socket) -> None:
    """Do the jobs that come until the other end closes."""
    # Imported here: so much is read for it that it should happen after `give_way`.
    import torch

    from loraswarm.engine.loader import JobThreads
    from loraswarm.engine.loader_frames import Frame, MemoryFiles, receive
    from loraswarm.engine.loader_jobs import JobFailed
    from loraswarm.engine.loader_worker import LoadWorker, error_info

    torch.set_num_threads(1)
    lock = threading.Lock()
    spec: WorkerSpec = receive(connection)

    def deliver(result: Result) -> None:
        with MemoryFiles() as files:
            try:
                frame = Frame(_moved(result, files), files)
            except Exception as error:
                info = error_info(error, "handing over a result")
                frame = Frame(JobFailed(result.job_id, info))
            with lock, suppress(ConnectionError):  # `serve` sees that the other end has closed
                frame.send(connection)

    try:
        worker = LoadWorker(spec)
    except Exception as error:
        Frame(error_info(error, "starting the loader")).send(connection)
        return
    threads = JobThreads(worker, deliver)
    log.info("loader serves model=%s pid=%d", spec.model_name, os.getpid())
    with suppress(EOFError, ConnectionError):
        while True:
            threads.submit(receive(connection))
    if spec.download_dir is not None:
        shutil.rmtree(spec.download_dir, ignore_errors=True)


def _moved(result: Result, files: MemoryFiles) -> Result:
    """The result with its image in files; the time for that is part of packing it."""
    from loraswarm.engine.loader_jobs import Loaded

    if not isinstance(result, Loaded):
        return result
    begin = time.perf_counter()
    for array in (result.image.own, *result.image.shared.values()):
        if array.nbytes:
            files.add(array)
    pack_s = result.pack_s + time.perf_counter() - begin
    return dataclasses.replace(result, pack_s=pack_s)


if __name__ == "__main__":
    main()
