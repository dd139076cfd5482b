"""`loraswarm serve --replicas N`: engines on Ray, or in child processes, behind one HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import threading
from collections.abc import Iterator

from loraswarm.cluster.assembly import Cluster
from loraswarm.cluster.front import ClusterClient
from loraswarm.cluster.local_replicas import local_starter
from loraswarm.cluster.ray_replicas import RayOptions, ray_cluster, ray_starter
from loraswarm.cluster.replicas import StartReplica
from loraswarm.commands.serve import report
from loraswarm.config import ClusterConfig, EngineConfig, ServerConfig
from loraswarm.errors import ConfigError
from loraswarm.server import serve as http
from loraswarm.text.tokenizer import Tokenizer


def serve_cluster(engine: EngineConfig, server: ServerConfig, config: ClusterConfig) -> int:
    """Serve until a signal, or until no replica can be started; returns the exit code.

    Raises   ConfigError if Ray or the replicas cannot be used as asked.
    """
    engine = _of_one_replica(engine, config)
    listener = http.bind(server)
    try:
        with _backend(engine, config) as start:
            return asyncio.run(_serve(Cluster(start, engine, config), server, listener))
    finally:
        listener.close()


async def _serve(cluster: Cluster, server: ServerConfig, listener: socket.socket) -> int:
    try:
        client = await _open(cluster)
        if client is None:
            return 128 + signal.SIGTERM
        tokenizer = Tokenizer.load(client.info.model_path)
        return await http.serve(client, tokenizer, server, listener)
    finally:
        await cluster.close()


@contextlib.contextmanager
def _backend(engine: EngineConfig, config: ClusterConfig) -> Iterator[StartReplica]:
    if config.backend == "processes":
        yield local_starter(engine, report)
        return
    options = RayOptions(
        address=config.ray_address,
        num_cpus=config.replica_cpus,
        num_gpus=config.replica_gpus,
        max_replicas=config.most_replicas,
    )
    with ray_cluster(options):
        yield ray_starter(engine, options, report)


async def _open(cluster: Cluster) -> ClusterClient | None:
    """None if SIGTERM came first: then what was begun has been ended, not left behind."""
    if threading.current_thread() is not threading.main_thread():
        return await cluster.open()
    loop = asyncio.get_running_loop()
    opening = asyncio.ensure_future(cluster.open())
    loop.add_signal_handler(signal.SIGTERM, opening.cancel)
    try:
        await asyncio.wait((opening,))
        return None if opening.cancelled() else opening.result()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)


def _of_one_replica(engine: EngineConfig, config: ClusterConfig) -> EngineConfig:
    """The engine's options with a replica's share of what they would all take for themselves."""
    if config.replica_gpus and engine.device != "cuda":
        raise ConfigError(f"--replica-gpus is given but --device is {engine.device}; make it cuda")
    if engine.num_threads is None:
        engine = dataclasses.replace(engine, num_threads=config.replica_cpus)
    is_shared = config.ray_address is None and config.most_replicas > 1
    if engine.pool_bytes is None and is_shared and not config.replica_gpus:
        share = engine.memory_utilization / config.most_replicas
        engine = dataclasses.replace(engine, memory_utilization=share)
    return engine
