"""Runs the application on a socket until a signal or the engine's end.

Owns the order of shutting down: stop accepting, let running requests finish, close the engine, hang
up. Called by the command line, which starts the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from loraswarm.config import ServerConfig
from loraswarm.core.client import EngineClient, served_names
from loraswarm.errors import ConfigError
from loraswarm.server.app import create_app
from loraswarm.text.tokenizer import Tokenizer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEEP_ALIVE_S = 75
DEATH_NOTICE_S = 1.0
LAST_EVENTS_S = 0.5
HANG_UP_S = 2.0
EXIT_OK, EXIT_FAILED = 0, 1
log = logging.getLogger(__name__)


def bind(config: ServerConfig) -> socket.socket:
    """The socket to serve on; nothing connects before `serve` runs.

    Raises   ConfigError if the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {reason}; "
            "choose another with --host and --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients reach `listener`, e.g. http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    client: EngineClient,
    tokenizer: Tokenizer,
    config: ServerConfig,
    listener: socket.socket,
    report: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGINT, SIGTERM or the engine's end, then close the client; the exit code.

    The first signal lets running requests finish for `drain_timeout_s`, the second cuts them off.
    `report` (default: standard output) gets one line, "ready url=...", when connections are
    accepted. Signals are taken only in the main thread. The code is 0 after a drain, 1 after the
    engine's death or a second signal.
    """
    line = _ready_line(client, listener)
    server = _Server(_uvicorn_config(client, tokenizer, config), lambda: (report or _print)(line))
    stop, force = asyncio.Event(), asyncio.Event()
    with _signals(stop, force):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        waits = [serving, *(asyncio.create_task(w) for w in (client.wait_closed(), stop.wait()))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                return EXIT_FAILED
            if not stop.is_set():
                return await _end_after_death(server, serving)
            return await _drain(client, server, serving, config.drain_timeout_s, force)
        finally:
            server.hang_up()
            await asyncio.wait((serving,), timeout=HANG_UP_S)
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
            listener.close()
            await client.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which says when it accepts and can hang up."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def hang_up(self) -> None:
        """Break all connections; handlers see a client that has gone and abort its requests."""
        self.should_exit = True
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _uvicorn_config(
    client: EngineClient, tokenizer: Tokenizer, config: ServerConfig
) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(client, tokenizer, config),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


def _print(line: str) -> None:
    print(line, flush=True)


def _ready_line(client: EngineClient, listener: socket.socket) -> str:
    info = client.info
    return (
        f"ready url={url_of(listener)} model={info.model} "
        f"adapters={len(served_names(client.adapters))} max_model_len={info.max_model_len}"
    )


async def _end_after_death(server: _Server, serving: asyncio.Task[None]) -> int:
    """Leave clients and health checks a moment to see it, then end."""
    log.error("engine=dead exit_code=%d", EXIT_FAILED)
    await asyncio.sleep(DEATH_NOTICE_S)
    server.should_exit = True
    await asyncio.wait((serving,), timeout=LAST_EVENTS_S)
    return EXIT_FAILED


async def _drain(
    client: EngineClient,
    server: _Server,
    serving: asyncio.Task[None],
    timeout_s: float,
    force: asyncio.Event,
) -> int:
    """Stop accepting; wait for running requests; end what is left with an error event."""
    log.info("stopping drain_timeout_s=%g", timeout_s)
    server.should_exit = True
    forced = asyncio.create_task(force.wait())
    try:
        await asyncio.wait(
            (serving, forced), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if force.is_set():
            return EXIT_FAILED
        if not serving.done():
            log.warning("requests cut off drain_timeout_s=%g", timeout_s)
            await client.close()
            await asyncio.wait((serving,), timeout=LAST_EVENTS_S)
        return EXIT_OK
    finally:
        forced.cancel()


@contextlib.contextmanager
def _signals(stop: asyncio.Event, force: asyncio.Event) -> Iterator[None]:
    """The first signal sets `stop`, any further one `force`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, lambda: (force if stop.is_set() else stop).set())
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
