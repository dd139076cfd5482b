"""Serves thousands of adapters through tiers that hold few: every answer is right, none is lost.

    python tests/long/zipf_swarm.py [--adapters 2000] [--requests 10000] [--on-device 50]
        [--in-host 300] [--seed 0] [--eviction cost lru] [--loader thread process]

Traffic is Zipf 1.1 over adapters of mixed ranks and methods, some weighted sums and the base, with
the prefix cache on and requests in flight at all times. Each answer must be that of an engine that
has room for everything and serves one request at a time. tests/test_many_adapters.py runs a slice.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, save_random_adapter, write_adapter
from engine_factory import RANKS, prompt_of, tokens_of
from loraswarm.adapters import scanner
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.config import EngineConfig, Eviction
from loraswarm.core.admin import AdapterState, UnloadAdapter
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from method_cases import INVOCATION, METHOD_CASES
from model_factory import save_tiny_model
from tolerance import TOLERANCE

EXPONENT = 1.1
METHODS = ("dora", "vera", "alora", "saved-norms", "ia3", "trained-tokens", "lora-bias")
METHOD_EVERY = 5
TARGETS = (("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj"), ("gate_proj",))
ANSWER = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
EXPLAINED = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)
NUM_IN_FLIGHT = 24
ABORT_EVERY = 37
KV_PAGES = 40
PATIENCE_S = 120.0
IMAGE_FILES = "loraswarm-image"

Question = tuple[tuple[tuple[str, float], ...], tuple[int, ...]]
"""Weighted adapters, none for the base, and a prompt."""


@dataclass(frozen=True)
class Right:
    """Tokens of the undisturbed answer, and by how much each was the likeliest."""

    tokens: list[int]
    leads: list[float]

    def is_met_by(self, tokens: list[int]) -> str:
        """ "right"; "tie", where two tokens were equally likely but for rounding; or "wrong"."""
        for place, token in enumerate(tokens[: len(self.tokens)]):
            if token != self.tokens[place]:
                return "tie" if self.leads[place] < TOLERANCE[torch.float32][1] else "wrong"
        return "right" if len(tokens) == len(self.tokens) else "wrong"


class Swarm:
    """`num_adapters` adapters on disk, and what is right for any question about them."""

    def __init__(self, path: Path, num_adapters: int) -> None:
        self.path = path
        save_tiny_model(path / "model")
        self.names = [f"a{index:04}" for index in range(num_adapters)]
        self._method_of = {
            name: METHODS[index // METHOD_EVERY % len(METHODS)]
            for index, name in enumerate(self.names)
            if index % METHOD_EVERY == 3
        }
        self.sums = [name for name in self.names if name not in self._method_of]
        self.activated = {name for name, method in self._method_of.items() if method == "alora"}
        self._save_adapters()
        self._right: dict[Question, Right] = {}
        self.undisturbed = self.engine(pool_bytes=1 << 30, prefix_caching=False)
        adapters = self.undisturbed._memory.adapters
        shape = decoder_config(read_config(path / "model")).shape()
        infos = [read_adapter_info(path / "adapters" / name, name, shape) for name in self.names]
        self.num_pages = [adapters.num_pages(info) for info in infos]
        self.num_bytes = [adapters.num_bytes(info).own for info in infos]

    def engine(self, loader: str = "thread", **options: object) -> Engine:
        defaults = {
            "model": str(self.path / "model"),
            "adapters": (str(self.path / "adapters"),),
            "num_threads": 2,
            "seed": 0,
            "host_cache_bytes": 1 << 30,
        }
        config = EngineConfig.from_options(defaults | options)
        return build_engine(config, has_loader_process=loader == "process")

    def small_engine(
        self, num_on_device: int, num_in_host: int, eviction: Eviction, loader: str
    ) -> Engine:
        """An engine with room for so many adapters of mean size."""
        mean_pages = sum(self.num_pages) / len(self.num_pages)
        mean_bytes = sum(self.num_bytes) / len(self.num_bytes)
        num_pages = max(int(num_on_device * mean_pages), 2 * max(self.num_pages)) + KV_PAGES
        return self.engine(
            loader,
            pool_bytes=num_pages * self.undisturbed.info.page_bytes,
            host_cache_bytes=int(num_in_host * mean_bytes),
            eviction=eviction,
        )

    def right(self, question: Question) -> Right:
        """Served alone; every adapter stays where it is."""
        if question not in self._right:
            self.undisturbed.add(_request("alone", question, EXPLAINED))
            events: list[SequenceEvent] = []
            while self.undisturbed.has_work:
                events += self.undisturbed.step()
            assert events[-1].finish_reason == "length", events[-1]
            rows = [row for event in events for row in event.logprobs or ()]
            leads = [row.top[0][1] - row.top[1][1] for row in rows]
            self._right[question] = Right(tokens_of(events), leads)
        return self._right[question]

    def _save_adapters(self) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.path / "model", attn_implementation="eager"
        ).eval()
        shape = decoder_config(read_config(self.path / "model")).shape()
        for method in METHODS:
            METHOD_CASES[method](model, self.path / "templates" / method)
        for index, name in enumerate(self.names):
            into = self.path / "adapters" / name
            if name in self._method_of:
                vary(self.path / "templates" / self._method_of[name], into, index)
                continue
            targets = TARGETS[index % len(TARGETS)]
            rank = RANKS[index % len(RANKS)]
            save_random_adapter(
                into, shape, rank=rank, alpha=32, targets=targets, seed=index, std=0.25
            )


class Traffic:
    """Questions by Zipf's law, asked of one engine until so many have been answered.

    A few requests are aborted on their way; those must end once too.
    """

    def __init__(self, swarm: Swarm, engine: Engine, seed: int) -> None:
        self._swarm = swarm
        self._engine = engine
        self._random = random.Random(seed)
        self._names = list(swarm.names)
        self._random.shuffle(self._names)
        weights = [1 / (rank + 1) ** EXPONENT for rank in range(len(self._names))]
        self._weights = list(accumulate(weights))
        self._open: dict[str, tuple[Question, list[SequenceEvent]]] = {}
        self._num_asked = 0
        self._num_uses = 0
        self._num_activated = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[tuple[str, Question]] = []

    def run(self, num_requests: int, check_every: int) -> None:
        """Keep NUM_IN_FLIGHT requests open until so many have come, then let them end."""
        num_steps = 0
        news_s = time.monotonic()
        while self._num_asked < num_requests or self._open:
            while self._num_asked < num_requests and len(self._open) < NUM_IN_FLIGHT:
                self._ask()
            events = self._engine.step(may_wait=False)
            if self._engine.is_blocked and not events:
                self._engine.wait(0.05)
            if events:
                news_s = time.monotonic()
            assert time.monotonic() - news_s < PATIENCE_S, f"nothing happens: {self._open}"
            for event in events:
                self._take(event)
            num_steps += 1
            if num_steps % check_every == 0:
                self._engine.check()
        self._engine.check()
        assert not self._engine.has_work
        stats = self._engine.stats()
        num_counted = stats.total_device_hits + stats.total_host_hits + stats.total_misses
        assert self._num_uses - self._num_activated <= num_counted <= self._num_uses

    def _ask(self) -> None:
        question = self._question()
        self._num_asked += 1
        request_id = f"r{self._num_asked}"
        self._open[request_id] = (question, [])
        self._num_uses += len(question[0])
        # An activated LoRA is no use of an adapter where the prompt does not invoke it.
        self._num_activated += any(name in self._swarm.activated for name, _ in question[0])
        self._engine.add(_request(request_id, question, ANSWER))
        if self._num_asked % ABORT_EVERY == 0:
            self._abort(self._random.choice(sorted(self._open)))

    def _question(self) -> Question:
        prompt = prompt_of(self._random.randrange(4), self._random.choice([7, 33, 70, 97]))
        if self._random.random() < 0.3:
            place = self._random.randrange(len(prompt) - 2)
            prompt = (*prompt[:place], *INVOCATION, *prompt[place + 2 :])
        kind = self._random.random()
        if kind < 0.1:
            return (), prompt
        if kind < 0.15:
            first, second = self._random.sample(self._swarm.sums, 2)
            return ((first, 0.75), (second, 0.5)), prompt
        (name,) = self._random.choices(self._names, cum_weights=self._weights)
        return ((name, 1.0),), prompt

    def _take(self, event: SequenceEvent) -> None:
        assert event.request_id in self._open, f"event of a request that has ended: {event}"
        question, events = self._open[event.request_id]
        events.append(event)
        if event.finish_reason is None:
            return
        del self._open[event.request_id]
        if event.finish_reason == "length":
            outcome = self._swarm.right(question).is_met_by(tokens_of(events))
        else:
            outcome = event.finish_reason
        self.outcomes[outcome] += 1
        if outcome not in ("right", "tie", "abort"):
            self.wrong.append((f"{outcome}: {event}", question))

    def _abort(self, request_id: str) -> None:
        event = self._engine.abort(request_id)
        assert event is not None
        self._take(event)
        assert self._engine.abort(request_id) is None


def unload_all(engine: Engine, names: list[str]) -> None:
    """Unload everything; then no page and no byte is left but cached prefixes of the base."""
    for number, name in enumerate(names):
        engine.begin_command(number, UnloadAdapter(name))
    answers = engine.take_answers()
    assert len(answers) == len(names)
    assert all(isinstance(answer.result, AdapterState) for answer in answers)
    engine.step(may_wait=False)
    engine.check()
    stats = engine.stats()
    assert stats.num_resident_adapters == stats.num_adapter_pages == stats.num_kv_pages == 0
    assert stats.num_host_adapters == stats.num_host_bytes == stats.num_loading == 0
    assert stats.num_free_pages + stats.num_prefix_pages == engine.info.num_pages


def held_by_process() -> Counter[str]:
    """Threads, descriptors and mapped images of this process."""
    gc.collect()
    return Counter(
        threads=threading.active_count(),
        descriptors=len(os.listdir("/proc/self/fd")),
        images=Path("/proc/self/maps").read_text().count(IMAGE_FILES),
    )


def _request(request_id: str, question: Question, params: SamplingParams) -> Request:
    adapters, prompt = question
    is_one = len(adapters) == 1
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        adapter=adapters[0][0] if is_one else None,
        adapters=() if is_one else adapters,
    )


def vary(template: Path, path: Path, seed: int) -> None:
    """The template with other values, but for the matrices that a method's adapters share."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(template / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if "vera_A" not in name and "vera_B" not in name and tensor.is_floating_point():
            tensors[name] = tensor * (1 + 0.5 * torch.randn(tensor.shape, generator=generator))
    write_adapter(path, json.loads((template / CONFIG_FILE).read_text()), tensors)


def serve(swarm: Swarm, options: argparse.Namespace, eviction: Eviction, loader: str) -> bool:
    """One engine's life; whether every answer was right."""
    before = held_by_process()
    engine = swarm.small_engine(options.on_device, options.in_host, eviction, loader)
    traffic = Traffic(swarm, engine, options.seed)
    start_s = time.perf_counter()
    traffic.run(options.requests, check_every=20)
    elapsed_s = time.perf_counter() - start_s
    stats = engine.stats()
    print(f"eviction={eviction} loader={loader} elapsed_s={elapsed_s:.0f} {dict(traffic.outcomes)}")
    print(
        f"  device_hits={stats.total_device_hits} host_hits={stats.total_host_hits}"
        f" misses={stats.total_misses} device_evictions={stats.total_device_evictions}"
        f" host_evictions={stats.total_host_evictions} preemptions={stats.total_preemptions}"
        f" prefix_hit_tokens={stats.total_prefix_hit_tokens}"
        f" prefix_evictions={stats.total_prefix_evictions} failures={stats.total_load_failures}"
    )
    for line in traffic.wrong[:10]:
        print("  WRONG", line)
    is_right = not traffic.wrong and traffic.outcomes["tie"] <= options.requests // 1000
    unload_all(engine, swarm.names)
    engine.close()
    del engine, traffic
    after = held_by_process()
    print(f"  before {dict(before)} after {dict(after)}", flush=True)
    return is_right and after <= before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--on-device", type=int, default=50)
    parser.add_argument("--in-host", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eviction", nargs="+", default=["cost", "lru"])
    parser.add_argument("--loader", nargs="+", default=["thread", "process"])
    options = parser.parse_args()
    scanner.SETTLE_S = 0.0
    with tempfile.TemporaryDirectory() as directory:
        start_s = time.perf_counter()
        swarm = Swarm(Path(directory), options.adapters)
        print(f"adapters={options.adapters} prepared_s={time.perf_counter() - start_s:.0f}")
        results = [
            serve(swarm, options, eviction, loader)
            for eviction in options.eviction
            for loader in options.loader
        ]
        swarm.undisturbed.close()
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
