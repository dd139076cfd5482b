"""`loraswarm demo`: the bundled swarm behind a real server, and one mixed batch sent to it."""

from __future__ import annotations

import asyncio
import socket
import sys

from loraswarm.config import EngineConfig, ServerConfig
from loraswarm.core.client import EngineClient, served_names
from loraswarm.demo import adapters_path, base_path
from loraswarm.demo.showcase import ask_all, table
from loraswarm.engine.child_client import ChildEngineClient
from loraswarm.errors import EngineError
from loraswarm.server import serve as http
from loraswarm.text.tokenizer import Tokenizer

MODEL_NAME = "base"
POOL_BYTES = 256 << 20


def demo(server: ServerConfig, keeps_serving: bool, dtype: str, num_threads: int | None) -> int:
    """Serve, ask, print; then end, or go on serving until a signal. Returns the exit code."""
    engine = EngineConfig.from_options(
        {
            "model": str(base_path()),
            "adapters": (str(adapters_path()),),
            "served_model_name": MODEL_NAME,
            "dtype": dtype,
            "pool_bytes": POOL_BYTES,
            "num_threads": num_threads,
        }
    )
    listener = http.bind(server)
    try:
        return asyncio.run(_demo(engine, server, listener, keeps_serving))
    finally:
        listener.close()


async def _demo(
    engine: EngineConfig, server: ServerConfig, listener: socket.socket, keeps_serving: bool
) -> int:
    client = await ChildEngineClient.start(engine, _report)
    try:
        tokenizer = Tokenizer.load(client.info.model_path)
        ready = asyncio.Event()
        serving = asyncio.create_task(
            http.serve(client, tokenizer, server, listener, lambda _: ready.set())
        )
        try:
            await _first_of(serving, asyncio.create_task(ready.wait()))
            print(await _showcase(client, http.url_of(listener)), flush=True)
            if keeps_serving:
                print(f"\nserving on {http.url_of(listener)}; ctrl-C ends it", flush=True)
                return await serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
    finally:
        await client.close()
    return 0


async def _first_of(serving: asyncio.Task[int], ready: asyncio.Task[bool]) -> None:
    """Wait until the server accepts; raise what it raises if it ends before."""
    await asyncio.wait((serving, ready), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        raise EngineError(f"the server ended with code {serving.result()} before it was ready")


async def _showcase(client: EngineClient, url: str) -> str:
    return table(await ask_all(url, [client.info.model, *served_names(client.adapters)]))


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
