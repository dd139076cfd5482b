"""Changes, unloads and reloads adapters under traffic: no answer mixes generations, nothing leaks.

    python tests/long/churn.py [--rounds 500] [--seed 0] [--kind reload] [--loader process]

Each content of an adapter has answers of its own, known from an undisturbed engine. Whatever is
done to a name, each of its answers must be that of one content that was current between the
request's arrival and its end. tests/test_churn.py runs a few rounds of each kind with every test
run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_factory import make_request, prompt_of, run_alone, save_swarm, tokens_of
from loraswarm.adapters import scanner
from loraswarm.adapters.local_store import LocalStore
from loraswarm.config import EngineConfig
from loraswarm.core.admin import AdminCommand, LoadAdapter, RescanAdapters, UnloadAdapter
from loraswarm.core.request import SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from loraswarm.errors import UnknownAdapter

CONTENTS = ("a000", "a001", "a002", "a003")
NUM_COPIES = 16
RELOADED = CONTENTS[2:]
CALM = "calm"
MOVED = "moved"
PROMPTS = tuple(prompt_of(i, length) for i, length in enumerate((7, 33, 50)))
ANSWER = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True)
MAX_MORE_MAPPINGS = 60
MAX_MORE_ROWS = 6
# What they may hold has a bound of its own; pages are counted when everything has been unloaded.
BOUNDED_TABLES = {"order._heap": 1_000, "order._": 50_000, "memory.": 1_000}
PATIENCE_S = 60.0


@dataclass
class Asked:
    """A request that has not ended, and the contents that it may be answered with."""

    name: str | None
    prompt: int
    allowed: set[str | None]
    tokens: list[int] = field(default_factory=list)


class Home:
    """A base, contents with known answers, and a store that starts with CALM and MOVED."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = path / "store"
        save_swarm(path, len(CONTENTS), ranks=(8, 24, 3, 40))
        engine = self.engine(path / "adapters", prefix_caching=False)
        requests = {
            (content, prompt): make_request(f"{content}-{prompt}", content, PROMPTS[prompt], ANSWER)
            for content in (None, *CONTENTS)
            for prompt in range(len(PROMPTS))
        }
        found = run_alone(engine, requests.values())
        engine.close()
        self.answers = {
            place: tuple(found[request.request_id]) for place, request in requests.items()
        }
        assert len(set(self.answers.values())) == len(self.answers), "contents answer alike"
        for content, copy in itertools.product(CONTENTS, range(NUM_COPIES)):
            shutil.copytree(path / "adapters" / content, self._version(content, copy))
        self._turns = itertools.count()

    def renew(self) -> None:
        """The store as it is at first. What scans take for young has had its time."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir()
        for name, content in ((CALM, CONTENTS[0]), (MOVED, CONTENTS[1])):
            self.replace(name, content)
        for content in RELOADED:
            shutil.copytree(self.path / "adapters" / content, self.store / f"path-{content}")
        time.sleep(scanner.SETTLE_S)

    def _version(self, content: str, copy: int) -> Path:
        return self.path / "versions" / f"{content}-{copy}"

    def engine(self, root: Path, has_process: bool = False, **options: Any) -> Engine:
        defaults: dict[str, Any] = {
            "model": str(self.path / "model"),
            "adapters": (str(root),),
            "pool_bytes": 4 << 20,
            "num_threads": 1,
            "seed": 0,
            "host_cache_bytes": 64 << 20,
        }
        return build_engine(
            EngineConfig.from_options(defaults | options), has_loader_process=has_process
        )

    def replace(self, name: str, content: str) -> None:
        """Let `name` have that content from one moment to the next: a link is renamed over."""
        number = next(self._turns)
        young = self.path / f"link-{number}"
        young.symlink_to(self._version(content, number % NUM_COPIES))
        os.replace(young, self.store / name)


class Churn:
    """One engine under traffic; `rounds` of a kind are methods of their own.

    `now` is what each name is known to be served with, None while it is not.
    """

    def __init__(
        self, home: Home, seed: int = 0, has_process: bool = False, **options: Any
    ) -> None:
        home.renew()
        self.home = home
        self.engine = home.engine(home.store, has_process, **options)
        self.random = random.Random(seed)
        self.now: dict[str, str | None] = {CALM: CONTENTS[0], MOVED: CONTENTS[1]}
        self.open: dict[str, Asked] = {}
        self.answered: Counter[tuple[str | None, str | None]] = Counter()
        self.answers: dict[int, Any] = {}
        self._ids = itertools.count()

    def ask(self, name: str | None) -> None:
        """Send one request for `name`, to be answered as what it is now."""
        request_id, prompt = f"r{next(self._ids)}", self.random.randrange(len(PROMPTS))
        allowed = {None if name is None else self.now[name]}
        self.engine.add(make_request(request_id, name, PROMPTS[prompt], ANSWER))
        self.open[request_id] = Asked(name, prompt, allowed)

    def allow(self, name: str, content: str) -> None:
        """Files of `name` have that content: requests may get it that have not begun."""
        for asked in self.open.values():
            if asked.name == name and not asked.tokens:
                asked.allowed.add(content)

    def traffic(self) -> None:
        """A few requests for everything that is served, and a few steps."""
        for name in (None, CALM, *(name for name in self.now if self.now[name])):
            if len(self.open) < 12 and self.random.random() < 0.7:
                self.ask(name)
        self.pump(self.random.randrange(6))

    def pump(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            for event in self.engine.step(may_wait=False):
                self._take(event)
            for answer in self.engine.take_answers():
                self.answers[answer.command_id] = answer.result
            if self.engine.is_blocked:
                self.engine.wait(0.002)

    def _take(self, event: Any) -> None:
        asked = self.open[event.request_id]
        asked.tokens += tokens_of([event])
        if event.finish_reason is None:
            return
        del self.open[event.request_id]
        assert event.finish_reason == "length", f"{asked} ended with {event.error}"
        matching = [
            content
            for content in (None, *CONTENTS)
            if self.home.answers[content, asked.prompt] == tuple(asked.tokens)
        ]
        assert matching, f"{asked} is the answer of no content, or of a mixture"
        assert matching[0] in asked.allowed, f"{asked} is the answer of {matching[0]}"
        self.answered[asked.name, matching[0]] += 1

    def until(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_done():
            assert time.monotonic() < deadline, f"nothing happens: {self.engine.stats()}"
            self.pump()

    def begin(self, command: AdminCommand) -> int:
        number = next(self._ids)
        self.engine.begin_command(number, command)
        return number

    def result(self, number: int) -> Any:
        """The answer to a command, while traffic goes on."""
        self.until(lambda: number in self.answers)
        return self.answers.pop(number)

    def drain(self) -> None:
        self.until(lambda: not self.open)
        self.engine.check()

    def change_and_rescan(self) -> None:
        """MOVED gets another content; at times nobody waits for the scan."""
        content = self.random.choice([c for c in CONTENTS if c != self.now[MOVED]])
        replace = self.home.replace
        self.allow(MOVED, content)
        replace(MOVED, content)
        number = self.begin(RescanAdapters())
        for _ in range(self.random.randrange(3)):
            self._ask_either(MOVED, content)
            self.pump(self.random.randrange(3))
        report = self.result(number)
        assert self._is_seen(MOVED), report
        self.now[MOVED] = content
        self.traffic()

    def change_and_wait(self) -> None:
        """The same, where the engine looks by its own clock."""
        content = self.random.choice([c for c in CONTENTS if c != self.now[MOVED]])
        self.allow(MOVED, content)
        self.home.replace(MOVED, content)
        while not self._is_seen(MOVED):
            self._ask_either(MOVED, content)
            self.pump(2)
        self.now[MOVED] = content
        self.traffic()

    def _is_seen(self, name: str) -> bool:
        """Whether new requests get what is on the disk. Numbers of generations do not tell: a scan
        may see a change half way, and is right with the next."""
        entry = self.engine._catalog.entry_named(name)
        stamps = {found.name: found.stamp for found in LocalStore(str(self.home.store)).look()}
        return entry is not None and entry.stamp == stamps[name]

    def _ask_either(self, name: str, content: str) -> None:
        if len(self.open) < 12:
            self.ask(name)
            list(self.open.values())[-1].allowed.add(content)

    def unload_and_return(self) -> None:
        """MOVED is unloaded under load, refused at once, gone in the end, and comes back anew."""
        for _ in range(2):
            self.ask(MOVED)
        self.pump(self.random.randrange(6))
        number = self.begin(UnloadAdapter(MOVED))
        self.now[MOVED] = None
        self._assert_unknown(MOVED)
        mine = {name for name, asked in self.open.items() if asked.name == MOVED}
        while number not in self.answers:
            assert self.open.keys() & mine or not self._is_in_memory(MOVED)
            self._assert_unknown(MOVED)
            self.ask(CALM) if len(self.open) < 12 else None
            self.pump()
        assert not self.open.keys() & mine, "unload was answered before its requests had ended"
        assert not self._is_in_memory(MOVED)
        self.result(number)
        content = self.random.choice(CONTENTS)
        self.home.replace(MOVED, content)
        self.result(self.begin(RescanAdapters()))
        self.now[MOVED] = content
        self.traffic()

    def _assert_unknown(self, name: str) -> None:
        try:
            self.engine.add(make_request("unknown", name, PROMPTS[0], ANSWER))
        except UnknownAdapter:
            return
        raise AssertionError(f"{name} is served though it was unloaded")

    def _is_in_memory(self, name: str) -> bool:
        keys = {*self.engine._memory.adapters.keys(), *self.engine._parts.host.keys()}
        return any(key[0] == name for key in keys)

    def reload(self) -> None:
        """LOADED is unloaded and loaded again from another path, requests being under way."""
        content = self._other("loaded")
        unloading = None
        if self.now.get("loaded"):
            self.ask("loaded")
            self.pump(self.random.randrange(4))
            unloading = self.begin(UnloadAdapter("loaded"))
            self.now["loaded"] = None
        if self.random.random() < 0.5 and unloading is not None:
            self.result(unloading)
            unloading = None
        state = self.result(self.begin(LoadAdapter("loaded", f"path-{content}")))
        assert getattr(state, "name", None) == "loaded", state
        self.now["loaded"] = content
        self.traffic()
        if unloading is not None:
            self.result(unloading)

    def load_in_place(self) -> None:
        """The same by load_inplace: the name is served all the time."""
        content = self._other("loaded")
        number = self.begin(LoadAdapter("loaded", f"path-{content}", in_place=True))
        if self.now.get("loaded"):
            self.allow("loaded", content)
            for _ in range(self.random.randrange(3)):
                self._ask_either("loaded", content)
                self.pump(self.random.randrange(3))
        state = self.result(number)
        assert getattr(state, "name", None) == "loaded", state
        self.now["loaded"] = content
        self.ask("loaded")
        self.traffic()

    def _other(self, name: str) -> str:
        return RELOADED[self.now.get(name) == RELOADED[0]]

    def run(self, kind: str, num_rounds: int) -> None:
        """So many rounds; at the end nothing is left of them, and nothing after all is unloaded."""
        one_round = getattr(self, KINDS[kind])
        num_first = max(5, num_rounds // 10)
        for _ in range(num_first):
            one_round()
        first = self.footprint()
        for _ in range(num_rounds - num_first):
            one_round()
        deadline = time.monotonic() + PATIENCE_S / 10
        while grown := growth(first, self.footprint()):
            assert time.monotonic() < deadline, f"has grown in {num_rounds} rounds: {grown}"
            self.pump(20)
        self.unload_all()

    def footprint(self) -> dict[str, int]:
        """What must not grow, when nothing runs."""
        self.drain()
        self.engine.check()
        gc.collect()
        sizes = table_sizes(self.engine)
        sizes["threads"] = threading.active_count()
        for pid in ("self", getattr(self.engine._parts.loader, "pid", None)):
            if pid is not None:
                sizes[f"descriptors {pid}"] = len(os.listdir(f"/proc/{pid}/fd"))
                sizes[f"mappings {pid}"] = Path(f"/proc/{pid}/maps").read_text().count("\n")
        served = {row.name for row in self.engine.adapters() if row.refusal is None}
        for keys in (self.engine._memory.adapters.keys(), self.engine._parts.host.keys()):
            names = Counter(key[0] for key in keys)
            assert names.keys() <= served, f"in memory and not served: {names.keys() - served}"
            assert not names or max(names.values()) == 1, f"generations of one name: {names}"
        return sizes

    def unload_all(self) -> None:
        for row in self.engine.adapters():
            if row.refusal is None:
                self.result(self.begin(UnloadAdapter(row.name)))
        stats = self.engine.stats()
        assert stats.num_adapter_pages == stats.num_resident_adapters == 0, stats
        assert stats.num_host_adapters == stats.num_host_bytes == 0, stats
        prefixes = self.engine._memory.prefixes
        assert not prefixes.num_pages_by_adapter(), "prefixes of adapters that are gone"
        assert stats.num_free_pages + stats.num_prefix_pages == self.engine.info.num_pages


KINDS = {
    "change": "change_and_rescan",
    "refresh": "change_and_wait",
    "unload": "unload_and_return",
    "reload": "reload",
    "in-place": "load_in_place",
}


def table_sizes(root: object) -> dict[str, int]:
    """The lengths of all tables that an object of ours holds, by how they are reached."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    waiting = deque([("engine", root)])
    while waiting:
        path, item = waiting.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict | set | list | deque):
            sizes[path] = len(item)
        elif type(item).__module__.startswith("loraswarm"):
            names = [*getattr(item, "__dict__", ()), *getattr(type(item), "__slots__", ())]
            waiting += [(f"{path}.{n}", getattr(item, n)) for n in names if hasattr(item, n)]
    return sizes


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """By how much more than what comes and goes by itself each has grown."""
    grown = {what: num - before.get(what, 0) for what, num in after.items()}
    return {what: num for what, num in grown.items() if num > _slack(what)}


def _slack(what: str) -> int:
    if what.startswith("mappings"):
        return MAX_MORE_MAPPINGS
    if what.startswith(("descriptors", "threads")):
        return 0
    return next((num for part, num in BOUNDED_TABLES.items() if part in what), MAX_MORE_ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--loader", choices=("thread", "process"), action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Home(Path(directory))
        for loader in options.loader or ("thread", "process"):
            for kind in options.kind or KINDS:
                begin_s = time.monotonic()
                churn = churn_of(home, kind, loader == "process", options.seed)
                churn.run(kind, options.rounds)
                churn.engine.close()
                took_s = time.monotonic() - begin_s
                print(f"loader={loader} kind={kind} rounds={options.rounds} took_s={took_s:.1f}")
                print("  answers", dict(sorted(churn.answered.items(), key=str)), flush=True)


def churn_of(home: Home, kind: str, has_process: bool, seed: int = 0) -> Churn:
    refresh_interval_s = 0.02 if kind == "refresh" else None
    return Churn(home, seed, has_process, refresh_interval_s=refresh_interval_s)


if __name__ == "__main__":
    main()
