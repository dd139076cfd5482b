"""A fake endpoint for the bench command, in a thread: the command has the main thread's loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import contextmanager

from bench_server import bench_server, json_answer, stream_answer
from loraswarm.commands.bench_options import BenchOptions

MODELS = [
    {"id": "tiny", "parent": None},
    {"id": "sql", "parent": "tiny"},
    {"id": "pirate", "parent": "tiny"},
]
TIMEOUT_S = 60.0


def answer(body, number):
    """Three tokens at once; the model that fails is not served."""
    if body["model"] == "fails":
        return json_answer({"error": {"message": "no such model"}}, 404)
    return stream_answer([0.0] * body["max_tokens"], len(body["prompt"]))


@contextmanager
def fake_server(answer=answer, models=MODELS):
    """Serves until the block ends."""
    started: queue.Queue = queue.Queue()

    async def serve():
        stop = asyncio.Event()
        async with bench_server(answer, json_answer({"data": models})) as server:
            started.put((server, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    server, loop, stop = started.get(timeout=TIMEOUT_S)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT_S)


def options(server, **others):
    """A small run without warm-up."""
    small = {"requests": 7, "concurrency": "3", "warmup": 0, "prompt_tokens": "5"}
    return BenchOptions(url=server.url, **{**small, "output_tokens": "3", **others})


def prompts_of(server):
    return [tuple(one.body["prompt"]) for one in server.requests]
