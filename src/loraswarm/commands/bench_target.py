"""What `loraswarm bench` measures: an endpoint or an engine of its own, and its adapters' names.

Knows nothing about workloads and figures. Used by commands/bench.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from loraswarm.bench.http_target import HttpTarget, ListedModel, list_models
from loraswarm.bench.offline import OfflineTarget, set_engine_environment
from loraswarm.bench.records import Target
from loraswarm.commands.bench_options import BenchOptions
from loraswarm.commands.options import parse_bytes
from loraswarm.errors import ConfigError, UnknownAdapter


@dataclass(frozen=True, slots=True)
class Measured:
    """A target, and the names that requests may have: the base's and the adapters'."""

    target: Target
    base_model: str
    adapters: tuple[str, ...]


def start_engine(options: BenchOptions) -> Measured:
    """An engine of --offline MODEL in this process; the caller closes the target.

    Raises   ConfigError for a model or an option that cannot work, UnknownAdapter for an adapter
             that is in none of --adapters-dir.
    """
    assert options.offline is not None
    engine_options = {
        "dtype": options.dtype,
        "pool_bytes": parse_bytes("--pool-bytes", options.pool_bytes),
        "max_model_len": options.max_model_len,
        "num_threads": options.num_threads,
        "quantize": options.quantize,
    }
    set_engine_environment()
    target = OfflineTarget(options.offline, options.adapters_dir or (), _report, **engine_options)
    served = target.adapter_names()
    try:
        _require_served(options.adapter_names, served)
    except UnknownAdapter:
        asyncio.run(target.close())
        raise
    return Measured(target, target.info.model, options.adapter_names or served)


async def open_endpoint(options: BenchOptions) -> Measured:
    """The endpoint of --url; the caller closes the target.

    Raises   ConfigError if it cannot be asked, or does not tell what the options leave open;
             UnknownAdapter for an adapter that it does not list, if it is asked.
    """
    url = options.url or ""
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ConfigError("--url holds a password, which results would show; give --api-key")
    base, adapters = options.base_model, options.adapter_names
    if base is None or options.adapters_from is not None:
        models = await list_models(url, options.api_key)
        base = base or _base_of(models)
        served = tuple(model.id for model in models if model.parent is not None)
        if options.adapters_from is not None and not served:
            raise ConfigError(
                f"{url} lists no adapters: no model of {_listed(models)} has a parent"
            )
        _require_served(adapters, [model.id for model in models])
        adapters = adapters or (served if options.adapters_from is not None else ())
    target = HttpTarget(
        url,
        base,
        api_key=options.api_key,
        timeout_s=options.timeout,
        keeps_alive=not options.new_connections,
        extra_body=options.extra_fields(),
    )
    return Measured(target, base, adapters)


def _base_of(models: list[ListedModel]) -> str:
    names = [model.id for model in models if model.parent is None]
    if len(names) != 1:
        raise ConfigError(
            f"the endpoint lists {len(names)} models without a parent ({_listed(models)});"
            " say with --base-model which is the base"
        )
    return names[0]


def _require_served(names: Sequence[str], served: Sequence[str]) -> None:
    for name in names:
        if name not in served:
            raise UnknownAdapter(name, served)


def _listed(models: list[ListedModel], max_names: int = 5) -> str:
    names = [model.id for model in models]
    return ", ".join(names[:max_names]) + (", ..." if len(names) > max_names else "")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
