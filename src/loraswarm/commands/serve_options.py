"""The options of `loraswarm serve` as the configurations they mean, and what serves them.

Used by the command line, which declares them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loraswarm.commands.options import parse_bytes
from loraswarm.config import ClusterConfig, EngineConfig, ServerConfig
from loraswarm.errors import ConfigError

SIZES = ("pool_bytes", "host_cache_bytes", "merge_bytes")
CLUSTER_ONLY = ("min_replicas", "max_replicas", "ray_address", "replica_cpus", "replica_gpus")


def run(options: Mapping[str, Any]) -> int:
    """Serve as asked; returns the exit code. Raises ConfigError naming the option."""
    engine = _engine_config(options)
    server = ServerConfig(host=options["host"], port=options["port"], api_key=options["api_key"])
    cluster = _cluster_config(options)
    if cluster is None:
        from loraswarm.commands.serve import serve

        return serve(engine, server)
    from loraswarm.commands.serve_cluster import serve_cluster

    return serve_cluster(engine, server, cluster)


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)}
    found = {name: value for name, value in options.items() if name in known}
    found["adapters"] = tuple(options["adapters"] or ())
    found["refresh_interval_s"] = options["refresh_interval"]
    for name in SIZES:
        found[name] = parse_bytes("--" + name.replace("_", "-"), options[name])
    return EngineConfig.from_options(found)


def _cluster_config(options: Mapping[str, Any]) -> ClusterConfig | None:
    """None: one engine, without Ray."""
    if options["replicas"] is None:
        for name in CLUSTER_ONLY:
            if options[name]:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is given without --replicas; say how many")
        return None
    most = options["max_replicas"] or options["replicas"]
    share = max(1, (os.cpu_count() or 1) // max(1, most))
    return ClusterConfig(
        num_replicas=options["replicas"],
        min_replicas=options["min_replicas"],
        max_replicas=options["max_replicas"],
        backend=options["replica_backend"],
        ray_address=options["ray_address"],
        replica_cpus=share if options["replica_cpus"] is None else options["replica_cpus"],
        replica_gpus=options["replica_gpus"],
        router=options["router"],
    )
