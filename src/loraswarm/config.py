"""Options of an engine and of a server, checked once and frozen.

Knows nothing about devices or models: "auto" values are resolved by engine/setup, which returns a
new config with every value filled in, so that what runs can be printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from loraswarm.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
EVICTIONS = ("cost", "lru")
QUANTIZATIONS = ("int8", "int4")
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
Eviction = Literal["cost", "lru"]
Quantize = Literal["int8", "int4"]
BACKENDS = ("ray", "processes")
Backend = Literal["ray", "processes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one engine serves and with how much.

    `pool_bytes` is the size of the one pool of K/V and adapter pages; None takes
    `memory_utilization` of what is available after the weights (on a CPU at most 4 GiB).
    `max_step_tokens` bounds the tokens of one step: prefill chunks fill what decodes leave.
    `adapters` are stores: directories or URLs; every `refresh_interval_s` they are scanned anew
    (None: only when asked). `host_cache_bytes` bounds the adapters kept in host memory, ready to be
    copied to the pool; None takes a share of what is available. With `host_cache_dir` they are kept
    in files there, and found again by the next start. `eviction` chooses which idle adapter or
    cached prefix leaves first: by what it would cost to miss it, or the least recently used.
    `cost_model` is a file of `loraswarm bench calibrate`, to judge costs by before any are seen.
    `merge` is "off", "auto" or the name of an adapter that is merged into copies of the linears'
    weights at start, while others are served beside it; the copies take at most `merge_bytes`
    (None: what there is). "auto" merges what `merge_policy` wants, by its name in
    engine/policies/merging.
    `quantize` keeps the base's matrices as integers (see models/quantization); None: as floats.
    With `capture_at_start` a CUDA device's decode steps without adapters are captured as graphs
    before the first request; else each by the first step of its size.
    """

    model: str
    adapters: tuple[str, ...] = ()
    served_model_name: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_model_len: int | None = None
    memory_utilization: float = 0.9
    pool_bytes: int | None = None
    max_num_sequences: int = 128
    max_step_tokens: int = 512
    num_threads: int | None = None
    seed: int | None = None
    refresh_interval_s: float | None = None
    host_cache_bytes: int | None = None
    host_cache_dir: str | None = None
    prefix_caching: bool = True
    eviction: Eviction = "cost"
    cost_model: str | None = None
    quantize: Quantize | None = None
    capture_at_start: bool = True
    merge: str = "off"
    merge_bytes: int | None = None
    merge_policy: str = "cost"

    def __post_init__(self) -> None:
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("eviction", self.eviction, EVICTIONS)
        _require_choice("device", self.device, DEVICES)
        if self.quantize is not None:
            _require_choice("quantize", self.quantize, QUANTIZATIONS)
        if not self.merge:
            raise ConfigError("merge is empty; give off, auto or the name of an adapter")
        if not self.model:
            raise ConfigError("model is empty; give a local directory or a hub id")
        names = "max_model_len", "pool_bytes", "num_threads", "host_cache_bytes", "merge_bytes"
        for name in names:
            value = getattr(self, name)
            if value is not None:
                _require_positive(name, value)
        _require_positive("max_num_sequences", self.max_num_sequences)
        _require_positive("max_step_tokens", self.max_step_tokens)
        if self.refresh_interval_s is not None and not self.refresh_interval_s > 0:
            raise ConfigError(
                f"refresh_interval_s is {self.refresh_interval_s}; it must be > 0 seconds"
            )
        if not 0.0 < self.memory_utilization <= 1.0:
            raise ConfigError(
                f"memory_utilization is {self.memory_utilization}; it must be in (0, 1]"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from keyword options; an unknown key is an error that lists the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"unknown option {unknown[0]!r}; known options: {', '.join(sorted(known))}"
            )
        return cls(**options)

    @property
    def model_name(self) -> str:
        """The id under which the base model is served."""
        if self.served_model_name:
            return self.served_model_name
        return self.model.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and for whom the HTTP server listens. `port=0` takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s is {self.drain_timeout_s}; it must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How many engines serve, and where they run.

    With "ray" each is an actor of the cluster at `ray_address` (None: one of our own, on this
    machine) that takes `replica_cpus` cores and `replica_gpus` devices; with "processes" each is a
    child process. Between `min_replicas` and `max_replicas` their number follows the load; None:
    it stays `num_replicas`. `router` is a policy of cluster/routing by its name.
    """

    num_replicas: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    backend: Backend = "ray"
    ray_address: str | None = None
    replica_cpus: int = 1
    replica_gpus: float = 0.0
    router: str = "marginal"

    def __post_init__(self) -> None:
        _require_choice("replica_backend", self.backend, BACKENDS)
        _require_positive("replicas", self.num_replicas)
        _require_positive("replica_cpus", self.replica_cpus)
        if not self.replica_gpus >= 0:
            raise ConfigError(f"replica_gpus is {self.replica_gpus}; it must be >= 0")
        if not 1 <= self.least_replicas <= self.num_replicas <= self.most_replicas:
            raise ConfigError(
                f"replicas is {self.num_replicas}, min_replicas {self.least_replicas} and"
                f" max_replicas {self.most_replicas}; they must ascend from min to max"
            )
        if self.backend == "processes" and (self.ray_address or self.replica_gpus):
            raise ConfigError("ray_address and replica_gpus need replica_backend to be ray")

    @property
    def least_replicas(self) -> int:
        return self.num_replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        return self.num_replicas if self.max_replicas is None else self.max_replicas


def _require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number >= 1")
