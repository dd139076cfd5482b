"""`loraswarm serve`: an engine in a child process behind an HTTP server in this one."""

from __future__ import annotations

import asyncio
import socket
import sys

from loraswarm.config import EngineConfig, ServerConfig
from loraswarm.engine.child_client import ChildEngineClient
from loraswarm.server import serve as http
from loraswarm.text.tokenizer import Tokenizer


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until a signal or the engine's end; returns the exit code."""
    listener = http.bind(server)
    try:
        return asyncio.run(_serve(engine, server, listener))
    finally:
        listener.close()


async def _serve(engine: EngineConfig, server: ServerConfig, listener: socket.socket) -> int:
    client = await ChildEngineClient.start(engine, report)
    try:
        tokenizer = Tokenizer.load(client.info.model_path)
        return await http.serve(client, tokenizer, server, listener)
    finally:
        await client.close()


def report(line: str) -> None:
    """Start-up lines go to standard error; standard output has the line that says ready."""
    print(line, file=sys.stderr, flush=True)
