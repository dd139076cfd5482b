"""What eviction by cost gains over least recently used, on a trace of requests.

    python benchmarks/eviction.py [--trace benchmarks/traces/zipf-drift.jsonl.gz | --sweep]

Replays the trace against the index side of the real memory (loraswarm.memory: pool, prefix cache,
adapter cache, host cache, cost model) in simulated time: steps take as long as their tokens, an
adapter is read, then copied, then joins the next step. No torch. `Machine` has the speeds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from document import json_path, write_document
from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo
from loraswarm.config import Eviction
from loraswarm.core.base_shape import BaseShape
from loraswarm.memory.eviction import EvictionOrder
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.image import AdapterImage
from loraswarm.memory.memory import Memory, MemoryOptions
from loraswarm.memory.prefix_cache import PrefixSalt
from traces import Trace, TraceOptions, TraceRequest, make_trace

MACHINE_OPTIONS = ("device_adapters", "host_adapters", "kv_pages", "num_seats")
RECORDED = Path(__file__).parent / "traces" / "zipf-drift.jsonl.gz"
SHAPE = BaseShape(  # Qwen2.5-0.5B
    num_layers=24,
    num_kv_heads=2,
    head_size=64,
    vocab_size=151_936,
    target_sizes=(
        (896, 896),
        (896, 128),
        (896, 128),
        (896, 896),
        (896, 4864),
        (896, 4864),
        (4864, 896),
    ),
)
GEOMETRY = page_geometry(SHAPE, element_bytes=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Speeds and sizes. Room is in adapters of the trace's mean size; the pool has `kv_pages`
    pages more than its adapters take."""

    device_adapters: int = 50
    host_adapters: int = 300
    kv_pages: int = 1500
    num_seats: int = 32
    max_step_tokens: int = 512
    read_s: float = 0.002
    read_bytes_per_s: float = 1e9
    copy_bytes_per_s: float = 8e9
    step_s: float = 0.02
    decode_s: float = 0.001
    prefill_tokens_per_s: float = 2000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where adapters were when their requests arrived, and how long first tokens took."""

    policy: str
    num_requests: int
    device_hits: float
    host_hits: float
    store_reads: float
    prefix_hits: float
    mean_ttft_ms: float
    p50_ttft_ms: float
    p99_ttft_ms: float


@dataclass(slots=True, eq=False)
class _Running:
    """A request from arrival to its last token; `num_left` tokens of the current stage."""

    request: TraceRequest
    request_id: str
    info: AdapterInfo
    token_ids: tuple[int, ...] = ()
    num_left: int = 0


@dataclass(slots=True)
class _Clock:
    """Simulated time, and what is to happen in it."""

    now_s: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    serials: itertools.count[int] = field(default_factory=itertools.count)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time_s, next(self.serials), action))

    def run(self) -> None:
        while self.events:
            self.now_s, _, action = heapq.heappop(self.events)
            action()


class Replay:
    """One trace on one machine under one policy: a loader, a copier and an engine's steps.

    arrive -> (read) -> waiting -> admitted -> (copy) -> prefill -> decode -> finished

    A request reserves pages for all its tokens when it is admitted, so none is preempted.
    """

    def __init__(self, trace: Trace, machine: Machine, policy: Eviction) -> None:
        self._trace, self._machine, self._policy = trace, machine, policy
        self._infos = [_lora(adapter.name, adapter.rank) for adapter in trace.adapters]
        self._clock = _Clock()
        ranks = {adapter.rank for adapter in trace.adapters}
        self._bytes_of_rank = {rank: _num_bytes(rank) for rank in ranks}
        mean = statistics.mean(self._bytes_of_rank[a.rank] for a in trace.adapters)
        num_pages = int(machine.device_adapters * mean / GEOMETRY.page_bytes) + machine.kv_pages
        options = MemoryOptions(policy=policy, clock=self._time, is_in_host=self._is_in_host)
        self._memory = Memory.of_pages(num_pages, SHAPE, GEOMETRY, options)
        order: EvictionOrder[tuple[str, str]] = EvictionOrder(policy, self._time)
        self._host = HostCache(int(machine.host_adapters * mean), order, options.costs)
        self._loading: dict[int, list[_Running]] = {}
        self._copying: dict[int, list[_Running]] = {}
        self._waiting: deque[_Running] = deque()
        self._prefilling: list[_Running] = []
        self._decoding: list[_Running] = []
        self._num_running = 0
        self._is_stepping = False
        self._loader_free_s = self._copier_free_s = 0.0
        self._tiers: Counter[str] = Counter()
        self._ttfts_s: list[float] = []

    def run(self) -> Outcome:
        for index, request in enumerate(self._trace.requests):
            running = _Running(request, f"r{index}", self._infos[request.adapter])
            self._clock.at(request.arrival_s, partial(self._arrive, running))
        self._clock.run()
        assert len(self._ttfts_s) == len(self._trace.requests), "requests were lost"
        self._memory.check()
        self._host.check()
        return self._outcome()

    def _arrive(self, running: _Running) -> None:
        key = running.info.key
        self._memory.adapters.protect(key)
        self._host.protect(key)
        self._host.touch(key)
        if self._memory.adapters.is_resident(key):
            self._tiers["device"] += 1
        else:
            self._tiers["host" if self._host.has(key) else "store"] += 1
        if self._is_at_hand(running):
            self._waiting.append(running)
            self._step()
        else:
            self._load(running)

    def _load(self, running: _Running) -> None:
        """Read an adapter once for all that wait for it."""
        adapter = running.request.adapter
        self._loading.setdefault(adapter, []).append(running)
        if len(self._loading[adapter]) > 1:
            return
        num_bytes = self._num_bytes(adapter)
        seconds = self._machine.read_s + num_bytes / self._machine.read_bytes_per_s
        self._loader_free_s = max(self._clock.now_s, self._loader_free_s) + seconds
        self._memory.costs.saw_read(num_bytes, seconds)
        self._clock.at(self._loader_free_s, lambda: self._finish_load(adapter))

    def _finish_load(self, adapter: int) -> None:
        info = self._infos[adapter]
        own = np.broadcast_to(np.uint8(0), (self._num_bytes(adapter),))  # a size without memory
        self._host.put(AdapterImage(info, own, {}))
        self._waiting += self._loading.pop(adapter)
        self._step()

    def _admit(self) -> None:
        """Start waiting requests in order, as far as seats and pages go."""
        while self._waiting and self._num_running < self._machine.num_seats:
            running = self._waiting[0]
            if not self._is_at_hand(running):
                self._load(self._waiting.popleft())
            elif self._try_start(running):
                self._waiting.popleft()
            else:
                return

    def _try_start(self, running: _Running) -> bool:
        memory, request = self._memory, running.request
        tokens = running.token_ids = self._trace.token_ids(request)
        salt = PrefixSalt(((running.info.key, 1.0),))
        prompt = tokens[: request.num_prompt_tokens]
        num_cached = memory.kv_cache.begin(running.request_id, prompt, salt, len(prompt) - 1)
        num_pages = memory.kv_cache.num_missing_pages(running.request_id, len(tokens))
        is_resident = memory.adapters.is_resident(running.info.key)
        num_load = 0 if is_resident else memory.adapters.num_load_pages(running.info)
        if not memory.has_room(num_pages + num_load):
            memory.kv_cache.free(running.request_id)
            return False
        load, _ = memory.pin_adapter(running.info)
        if memory.make_room(num_pages) is None:
            raise AssertionError("there was room, and then not")
        memory.kv_cache.reserve(running.request_id, len(tokens))
        self._num_running += 1
        running.num_left = len(prompt) - num_cached
        if load is not None:
            self._copy(request.adapter)
        if request.adapter in self._copying:
            self._copying[request.adapter].append(running)
        else:
            self._begin_prefill(running)
        return True

    def _copy(self, adapter: int) -> None:
        num_bytes = self._num_bytes(adapter)
        seconds = num_bytes / self._machine.copy_bytes_per_s
        self._copier_free_s = max(self._clock.now_s, self._copier_free_s) + seconds
        self._memory.costs.saw_copy(num_bytes, seconds)
        self._copying[adapter] = []
        self._clock.at(self._copier_free_s, lambda: self._finish_copy(adapter))

    def _finish_copy(self, adapter: int) -> None:
        self._memory.adapters.finish_load(self._infos[adapter].key)
        for running in self._copying.pop(adapter):
            self._begin_prefill(running)
        self._step()

    def _begin_prefill(self, running: _Running) -> None:
        self._memory.adapters.unprotect(running.info.key)
        self._host.unprotect(running.info.key)
        self._prefilling.append(running)

    def _step(self) -> None:
        """Plan a step, unless one runs: a token for each that decodes, then chunks of prompts."""
        if self._is_stepping:
            return
        self._admit()
        num_free = self._machine.max_step_tokens - len(self._decoding)
        chunks = []
        for running in self._prefilling:
            num_tokens = min(running.num_left, num_free)
            if num_tokens <= 0:
                break
            chunks.append((running, num_tokens))
            num_free -= num_tokens
        decoding = list(self._decoding)
        if not chunks and not decoding:
            return
        num_prefill = sum(num_tokens for _, num_tokens in chunks)
        seconds = num_prefill / self._machine.prefill_tokens_per_s
        if num_prefill:
            self._memory.costs.saw_prefill(num_prefill, seconds)
        seconds += self._machine.step_s + self._machine.decode_s * len(decoding)
        self._memory.costs.saw_step(seconds)
        self._is_stepping = True
        self._clock.at(self._clock.now_s + seconds, lambda: self._finish_step(chunks, decoding))

    def _finish_step(self, chunks: list[tuple[_Running, int]], decoding: list[_Running]) -> None:
        self._is_stepping = False
        for running in decoding:
            running.num_left -= 1
            if running.num_left == 0:
                self._finish(running)
        for running, num_tokens in chunks:
            running.num_left -= num_tokens
            if running.num_left == 0:
                self._prefilling.remove(running)
                self._ttfts_s.append(self._clock.now_s - running.request.arrival_s)
                self._publish(running, running.request.num_prompt_tokens)
                running.num_left = running.request.num_output_tokens
                self._decoding.append(running)
        self._step()

    def _finish(self, running: _Running) -> None:
        self._publish(running, len(running.token_ids) - 1)
        self._memory.kv_cache.free(running.request_id)
        self._memory.adapters.unpin(running.info.key)
        self._decoding.remove(running)
        self._num_running -= 1

    def _publish(self, running: _Running, num_computed: int) -> None:
        self._memory.kv_cache.publish(running.request_id, running.token_ids, num_computed)

    def _is_at_hand(self, running: _Running) -> bool:
        key = running.info.key
        return self._memory.adapters.is_resident(key) or self._host.has(key)

    def _is_in_host(self, key: tuple[str, str]) -> bool:
        return self._host.has(key)

    def _num_bytes(self, adapter: int) -> int:
        return self._bytes_of_rank[self._trace.adapters[adapter].rank]

    def _time(self) -> float:
        return self._clock.now_s

    def _outcome(self) -> Outcome:
        num_requests = len(self._ttfts_s)
        ttfts_ms = np.sort(self._ttfts_s) * 1e3
        prefixes = self._memory.prefixes
        return Outcome(
            policy=self._policy,
            num_requests=num_requests,
            device_hits=self._tiers["device"] / num_requests,
            host_hits=self._tiers["host"] / num_requests,
            store_reads=self._tiers["store"] / num_requests,
            prefix_hits=prefixes.total_hit_tokens / prefixes.total_asked_tokens,
            mean_ttft_ms=float(ttfts_ms.mean()),
            p50_ttft_ms=float(np.percentile(ttfts_ms, 50)),
            p99_ttft_ms=float(np.percentile(ttfts_ms, 99)),
        )


def sweep(options: TraceOptions) -> dict[str, TraceOptions]:
    """Traces of other seeds, popularity, drift and sessions, to see that one was no luck."""
    traces = {f"seed {seed}": replace(options, seed=seed) for seed in (1, 2, 3)}
    for alpha in (0.8, 1.5):
        traces[f"alpha {alpha}"] = replace(options, alpha=alpha, seed=4)
    for share in (0.0, 0.2):
        traces[f"drift {share}"] = replace(options, drift_share=share, seed=5)
    traces["single turns"] = replace(options, session_turns=1, requests_per_s=3.0, seed=6)
    traces["slow users"] = replace(options, think_s=20.0, requests_per_s=3.0, seed=7)
    return traces


def compare(trace: Trace, machine: Machine, label: str) -> list[Outcome]:
    """Replay under both policies and print a line for each."""
    outcomes = [Replay(trace, machine, "lru").run(), Replay(trace, machine, "cost").run()]
    for outcome in outcomes:
        print(
            f"{label:14} {outcome.policy:5} {outcome.device_hits:7.1%} {outcome.host_hits:7.1%} "
            f"{outcome.store_reads:7.1%} {outcome.prefix_hits:8.1%} {outcome.mean_ttft_ms:8.0f} "
            f"{outcome.p50_ttft_ms:8.0f} {outcome.p99_ttft_ms:8.0f}",
            flush=True,
        )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, default=RECORDED)
    parser.add_argument("--sweep", action="store_true", help="other traces, made on the spot")
    parser.add_argument("--json", type=json_path)
    machine = Machine()
    for name in MACHINE_OPTIONS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(machine, name))
    options = parser.parse_args()
    changed = {name: getattr(options, name) for name in MACHINE_OPTIONS}
    machine = replace(machine, **changed)
    print(
        f"{'trace':14} order {'device':>7} {'host':>7} {'store':>7} {'prefixes':>8} "
        f"{'mean ms':>8} {'p50 ms':>8} {'p99 ms':>8}"
    )
    outcomes = {"recorded": compare(Trace.load(options.trace), machine, "recorded")}
    if options.sweep:
        for label, trace_options in sweep(TraceOptions()).items():
            outcomes[label] = compare(make_trace(trace_options), machine, label)
    if options.json:
        rows = {label: [asdict(outcome) for outcome in both] for label, both in outcomes.items()}
        write_document(options.json, options, {"machine": asdict(machine), "outcomes": rows})


def _lora(name: str, rank: int) -> AdapterInfo:
    """Plain LoRA on every linear; nothing is on disk."""
    modules = tuple(ModuleInfo(site, rank, 1.0) for site in range(SHAPE.num_linears))
    return AdapterInfo(
        name=name, path=Path(name), digest="0", method="LoRA", modules=modules, num_bytes=0
    )


def _num_bytes(rank: int) -> int:
    """Bytes of A and B of all linears in a 16-bit dtype."""
    return SHAPE.num_layers * rank * 2 * sum(map(sum, SHAPE.target_sizes))


if __name__ == "__main__":
    main()
