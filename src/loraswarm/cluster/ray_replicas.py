"""Replicas as Ray actors: one around each engine process, anywhere in a Ray cluster.

The one module that knows Ray, which places the actors, sees their deaths, and carries K and V from
one to the other without a stop here. The engine's own messages go through the actor as bytes, many
at a time; ChildEngineClient at this end is the same as for a child process. A Ray that is not
installed is a ConfigError.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from loraswarm.cluster.ray_actor import EngineActor, Frames
from loraswarm.cluster.replicas import EngineReplica, Replica, StartReplica
from loraswarm.config import EngineConfig
from loraswarm.engine.child_client import ChildEngineClient
from loraswarm.errors import ConfigError, EngineError

KILL_GRACE_S = 2.0
MAX_KEPT_KV = 256
DIED = -9
REACH_S = 5.0
LATE_S = 15.0
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """`address` of a running cluster ("auto" finds one on this machine), or None for one of our
    own, on this machine, that ends with us. Each replica takes `num_gpus` devices and, of a running
    cluster, `num_cpus` cores; our own must have the devices of `max_replicas`."""

    address: str | None = None
    num_cpus: int = 1
    num_gpus: float = 0.0
    max_replicas: int = 1


@contextlib.contextmanager
def ray_cluster(options: RayOptions) -> Iterator[None]:
    """Start or join a cluster until the block ends.

    Raises   ConfigError if Ray is not installed, the cluster cannot be reached, or our own has not
             the devices.
    """
    ray = _ray()
    # A path of sockets may not be long.
    directory = tempfile.mkdtemp(prefix="lsw-", dir="/tmp")
    own = {
        "address": "local",
        "num_cpus": os.cpu_count() or 1,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": directory,
    }
    try:
        with contextlib.suppress(KeyError):
            del os.environ["RAY_ADDRESS"]  # it would win over what was asked for
        _reach(options.address)
        with contextlib.redirect_stdout(sys.stderr):  # it prints hints
            ray.init(
                **(own if options.address is None else {"address": options.address}),
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        where = options.address or "a cluster of its own"
        raise ConfigError(f"cannot use Ray at {where} (--ray-address): {error}") from error
    try:
        _check_devices(options)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def ray_starter(
    config: EngineConfig, options: RayOptions, report: Callable[[str], None]
) -> StartReplica:
    """Starts replicas in the cluster that `ray_cluster` has opened; `report` gets each line about a
    start, with the replica's id."""
    ray = _ray()
    kept = KeptKV()
    # Whoever notices a death here starts another one; Ray must not do so too.
    # On a machine of our own, whatever is asked for at run time must find its place.
    num_cpus = 0 if options.address is None else options.num_cpus
    actor_class = ray.remote(
        num_cpus=num_cpus, num_gpus=options.num_gpus, max_restarts=0, max_task_retries=0
    )(EngineActor)

    async def start(replica_id: str) -> Replica:
        process = RayProcess(actor_class.remote(), kept)
        await _unless_late(process.start(), lambda: report(f"{replica_id}: {_missing(options)}"))
        client = await ChildEngineClient.start_over(
            process, config, lambda line: report(f"{replica_id}: {line}")
        )
        return EngineReplica(replica_id, client, config)

    return start


def _reach(address: str | None) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def _check_devices(options: RayOptions) -> None:
    """Of our own cluster, which gets no more of them: a replica would wait for ever."""
    if options.address is not None:
        return
    num_wanted = options.num_gpus * options.max_replicas
    num_found = _ray().cluster_resources().get("GPU", 0)
    if num_wanted > num_found:
        raise ConfigError(
            f"--replica-gpus is {options.num_gpus:g}, so {options.max_replicas} replicas need"
            f" {num_wanted:g} GPUs; Ray finds {num_found:g} on this machine"
        )


def _missing(options: RayOptions) -> str:
    free = _ray().available_resources()
    return (
        f"waiting for Ray to place it: it needs {options.num_cpus} CPU and {options.num_gpus:g} GPU"
        f" of one machine (--replica-cpus, --replica-gpus); free in the cluster are"
        f" {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU"
    )


async def _unless_late(work: Awaitable[None], report: Callable[[], None]) -> None:
    """Wait for it; `report` is called once if it takes long."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait((task,), timeout=LATE_S)
        if not done:
            report()
        await task
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


class KeptKV:
    """K and V in Ray's store that a snapshot here stands for, by the key in their place."""

    def __init__(self, max_kept: int = MAX_KEPT_KV) -> None:
        self._max_kept = max_kept
        self._refs: OrderedDict[bytes, Any] = OrderedDict()

    def keep(self, refs: dict[bytes, Any]) -> None:
        """What a move has not used leaves after many others."""
        self._refs.update(refs)
        while len(self._refs) > self._max_kept:
            self._refs.popitem(last=False)

    def take(self, command: bytes) -> dict[bytes, Any]:
        """Those that a command speaks of."""
        found = [key for key in self._refs if key in command]
        return {key: self._refs.pop(key) for key in found}


class RayProcess:
    """The way to an engine's process through its actor: an EngineTransport."""

    def __init__(self, actor: Any, kept: KeptKV) -> None:
        self._actor = actor
        self._kept = kept
        self._pid = 0
        self._returncode: int | None = None
        self._ended = asyncio.Event()
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._incoming: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Wait until Ray has placed the actor and it has started its process.

        Raises   EngineError if Ray cannot.
        """
        try:
            self._pid = await self._actor.start.remote()
        except BaseException as error:
            _ray().kill(self._actor)
            if isinstance(error, Exception):
                raise EngineError(f"Ray could not start a replica: {error}") from error
            raise
        self._tasks = [asyncio.create_task(work) for work in (self._send_all(), self._poll())]

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def returncode(self) -> int | None:
        return self._returncode

    def send(self, command: bytes) -> None:
        self._outgoing.put_nowait(command)

    async def receive(self) -> bytes:
        return await self._incoming.get()

    async def wait(self) -> None:
        await self._ended.wait()

    def kill(self) -> None:
        """The engine first, which would outlive an actor that is killed while it hangs."""
        if self._returncode is None:
            self._tasks.append(asyncio.create_task(self._kill()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        _ray().kill(self._actor)

    async def _kill(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._actor.kill_engine.remote(), KILL_GRACE_S)
            await asyncio.wait_for(self._ended.wait(), KILL_GRACE_S)
            return
        _ray().kill(self._actor)
        self._end(DIED)

    async def _send_all(self) -> None:
        """What has gathered during one call goes with the next, in order."""
        try:
            while True:
                commands = [await self._outgoing.get()]
                while not self._outgoing.empty():
                    commands.append(self._outgoing.get_nowait())
                refs: dict[bytes, Any] = {}
                for command in commands:
                    refs |= self._kept.take(command)
                # Within a list Ray does not fetch what a reference stands for.
                await self._actor.send.remote(commands, [refs])
        except Exception as error:
            log.warning("nothing more can be sent to a replica's actor: %s", type(error).__name__)
            self._end(DIED)

    async def _poll(self) -> None:
        """Replies as they come, all at once that have; then the process's end."""
        try:
            while self._returncode is None:
                frames: Frames = await self._actor.receive.remote()
                self._kept.keep(frames.kv)
                for reply in frames.replies:
                    self._incoming.put_nowait(reply)
                if frames.returncode is not None:
                    self._end(frames.returncode)
        except Exception as error:
            log.warning("replica's actor is gone: %s", type(error).__name__)
            self._end(DIED)

    def _end(self, returncode: int) -> None:
        if self._returncode is None:
            self._returncode = returncode
            self._ended.set()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "replicas need Ray, which is not installed: pip install 'loraswarm[cluster]'"
        ) from None
    return ray
