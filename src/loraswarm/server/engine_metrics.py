"""The engine's counts as Prometheus families, and those of vLLM that Kubernetes gateways read.

Pure: from EngineStats and AdapterStates at one moment. Used by scrape.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from loraswarm.core.admin import AdapterState
from loraswarm.core.client import EngineInfo, EngineStats, MergeState
from loraswarm.server.metrics import OTHER

TIERS = ("device", "host", "store")
CATALOG_STATES = ("served", "pending", "refused", "unloaded")


def engine_families(info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
    """What the engine as a whole holds and does."""
    yield _gauge("requests_running", "Requests that take part in steps.", stats.num_running)
    yield _gauge("requests_waiting", "Requests that wait to begin.", stats.num_waiting)
    yield _counter("preemptions", "Requests that gave up their pages.", stats.total_preemptions)
    yield from _memory(info, stats)
    yield from _traffic(stats)
    yield from _loads(stats)
    if stats.merging is not None:
        yield from _merging(stats.merging)


def adapter_families(states: Sequence[AdapterState], own: Collection[str]) -> Iterator[Metric]:
    """Tier, bytes and generation of each adapter of `own`; the bytes of all others together."""
    counts = Counter[str](state.state for state in states)
    yield _by(
        GaugeMetricFamily,
        "catalog_adapters",
        "Adapters of the catalog by whether they can be asked for.",
        "state",
        {name: counts[name] for name in CATALOG_STATES},
    )
    tiers = GaugeMetricFamily(
        "loraswarm_adapter_tier",
        "1 for the nearest place where the adapter is.",
        labels=["adapter", "tier"],
    )
    held = GaugeMetricFamily(
        "loraswarm_adapter_bytes",
        f"Bytes the adapter takes there; {OTHER} is the sum of those not shown.",
        labels=["adapter", "tier"],
    )
    generations = GaugeMetricFamily(
        "loraswarm_adapter_generation", "Contents the name has had.", labels=["adapter"]
    )
    rest = dict.fromkeys(("device", "host"), 0)
    for state in states:
        if state.name not in own:
            rest["device"] += state.device_bytes
            rest["host"] += state.host_bytes
            continue
        generations.add_metric([state.name], state.generation)
        held.add_metric([state.name, "device"], state.device_bytes)
        held.add_metric([state.name, "host"], state.host_bytes)
        for tier in TIERS:
            tiers.add_metric([state.name, tier], tier == state.tier)
    for tier, num_bytes in rest.items():
        held.add_metric([OTHER, tier], num_bytes)
    yield from (tiers, held, generations)


def vllm_families(
    info: EngineInfo, stats: EngineStats, resident: Collection[str]
) -> Iterator[Metric]:
    """The gauges that gateways route by, under vLLM's names.

    `lora_requests_info` names as running what has running requests or is `resident`: the gateways'
    protocol asks for adapters "ready to serve", and would else send an idle adapter's next request
    where it is cold. There is no number of slots; `max_lora` is the pool's pages, which more
    adapters than that cannot fill, so a gateway sees room until the pool itself has none.
    `kv_cache_usage_perc` is the part of the pool that running requests hold, pinned adapters
    included: what is idle or cached makes way for K/V.
    Source    the gateways' model server protocol (gateway-api-inference-extension, proposal 003).
    """
    labels = {"model_name": info.model, "engine": "0"}
    for name, text, value in (
        ("num_requests_running", "Requests in steps.", float(stats.num_running)),
        ("num_requests_waiting", "Requests that wait.", float(stats.num_waiting)),
        ("kv_cache_usage_perc", "Part of the pool in use; 1 is full.", pool_usage(info, stats)),
    ):
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        yield family
    lora = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters ready and waited for; the value is the time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    running = ",".join(sorted({*stats.running_adapters, *resident}))
    waiting = ",".join(sorted(set(stats.waiting_adapters)))
    lora.add_metric([str(info.num_pages), running, waiting], time.time())
    yield lora


def pool_usage(info: EngineInfo, stats: EngineStats) -> float:
    """The part of the pool that running requests hold, from 0 to 1.

    Pinned adapters are taken to be of the average size of those resident.
    """
    pinned = stats.num_pinned_adapters / max(1, stats.num_resident_adapters)
    held = stats.num_kv_pages + stats.num_adapter_pages * min(1.0, pinned)
    return min(1.0, held / info.num_pages)


def _memory(info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
    pages = {
        "kv": stats.num_kv_pages,
        "prefix": stats.num_prefix_pages,
        "adapter": stats.num_adapter_pages,
        "free": stats.num_free_pages,
    }
    text = "Pages by who holds them: K/V of running requests, cached prefixes, adapters, nobody."
    yield _by(GaugeMetricFamily, "pool_pages", text, "owner", pages)
    yield _gauge("pool_page_bytes", "Size of one page of the pool.", info.page_bytes)
    yield _gauge("host_cache_bytes", "Adapters in host memory.", stats.num_host_bytes)
    yield _gauge("host_cache_limit_bytes", "--host-cache-bytes.", info.host_cache_bytes)
    held = {"device": stats.num_resident_adapters, "host": stats.num_host_adapters}
    text = "Adapters in pages of the pool (device) and in host memory (host)."
    yield _by(GaugeMetricFamily, "resident_adapters", text, "tier", held)
    pinned = stats.num_pinned_adapters
    yield _gauge("pinned_adapters", "Adapters whose pages may not leave.", pinned)


def _traffic(stats: EngineStats) -> Iterator[Metric]:
    found = {
        "device": stats.total_device_hits,
        "host": stats.total_host_hits,
        "store": stats.total_misses,
    }
    text = (
        "Requests by where their adapter was when they came: a hit of that tier and a miss of the"
        " nearer ones."
    )
    yield _by(CounterMetricFamily, "adapter_lookups", text, "tier", found)
    evicted = {
        "device_adapter": stats.total_device_evictions,
        "host_adapter": stats.total_host_evictions,
        "prefix_page": stats.total_prefix_evictions,
    }
    text = "What has left to make room: adapters of the device and of the host, pages of prefixes."
    yield _by(CounterMetricFamily, "evictions", text, "what", evicted)
    hits, asked = stats.total_prefix_hit_tokens, stats.total_prefix_asked_tokens
    yield _counter("prefix_hit_tokens", "Tokens of prompts that were found cached.", hits)
    yield _counter("prefix_asked_tokens", "Tokens of prompts that were looked for.", asked)


def _loads(stats: EngineStats) -> Iterator[Metric]:
    text = "Loads of adapters by stage (fetch, read, pack or map an image; copy to the device)"
    for name, what, values in (
        ("adapter_loads", "how many", {s: t.count for s, t in stats.loads.items()}),
        ("adapter_load_seconds", "seconds", {s: t.seconds for s, t in stats.loads.items()}),
        ("adapter_load_bytes", "bytes", {s: t.num_bytes for s, t in stats.loads.items()}),
    ):
        yield _by(CounterMetricFamily, name, f"{text}: {what}.", "stage", values)
    yield _counter("adapter_load_failures", "Loads that failed.", stats.total_load_failures)
    yield _counter(
        "adapter_images_not_kept",
        "Images that could not be written to the host cache's directory.",
        stats.total_unkept_images,
    )
    yield _gauge("adapters_loading", "Adapters on their way.", stats.num_loading)


def _merging(state: MergeState) -> Iterator[Metric]:
    text = "Part of the weights' bytes that have the adapter merged into them."
    shares = {} if state.target is None else {state.target: state.share}
    yield _by(GaugeMetricFamily, "merged_share", text, "adapter", shares)
    text = "Linears with an adapter merged into the weight in use."
    yield _gauge("merged_linears", text, state.num_merged_linears)
    yield _gauge("merged_bytes", "Merged weights in use.", state.merged_bytes)
    text = "Memory that merged weights have, in use or kept for the next."
    yield _gauge("merge_reserved_bytes", text, state.reserved_bytes)
    yield _counter("merge_switches", "Changes of what is to be merged.", state.total_switches)


Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _by(kind: Family, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = kind(f"loraswarm_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"loraswarm_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"loraswarm_{name}", text, value=value)
