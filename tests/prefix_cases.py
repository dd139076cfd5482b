"""Sequences over a real Memory whose pages "hold" what computed them, so that a wrong page shows.

A plain model beside the prefix cache: the identity of a page is all tokens up to its end and, for
each, what computed it. Nothing here knows about hashes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraswarm.core.sequence import AdapterMix
from loraswarm.memory.memory import Memory
from loraswarm.memory.prefix_cache import PrefixSalt
from scheduler_cases import GEOMETRY

SIZE = GEOMETRY.page_tokens


def identity(token_ids, salt: PrefixSalt, num_tokens: int):
    """Tokens up to `num_tokens` and what computes each of them."""
    makers = tuple(
        salt.mix if position >= salt.first_adapted else () for position in range(num_tokens)
    )
    return tuple(token_ids[:num_tokens]), makers


@dataclass
class Running:
    """A sequence, how far it is computed, and its salt."""

    token_ids: list[int]
    salt: PrefixSalt
    num_computed: int


@dataclass
class Simulation:
    """Begins, computes and ends sequences, and checks every page that they are handed."""

    memory: Memory
    running: dict[str, Running] = field(default_factory=dict)
    contents: dict[int, object] = field(default_factory=dict)
    num_hits: int = 0

    def begin(self, request_id: str, token_ids, mix: AdapterMix = (), first_adapted: int = 0):
        """Begin with at most all tokens but one cached; returns how many are."""
        salt = PrefixSalt(mix, first_adapted)
        most = len(token_ids) - 1
        num_expected = self.num_known(token_ids, salt, most)
        num_cached = self.memory.kv_cache.begin(request_id, token_ids, salt, most)
        assert num_cached == num_expected
        for index, page in enumerate(self.memory.kv_cache.pages_of(request_id)):
            assert self.contents[page] == identity(token_ids, salt, (index + 1) * SIZE)
        self.running[request_id] = Running(list(token_ids), salt, num_cached)
        self.num_hits += num_cached > 0
        return num_cached

    def compute(self, request_id: str, num_tokens: int) -> None:
        """Reserve, compute and publish up to `num_tokens`; OutOfPages changes nothing."""
        running, kv = self.running[request_id], self.memory.kv_cache
        kv.reserve(request_id, len(running.token_ids))
        for end in range(SIZE, num_tokens + 1, SIZE):
            page = kv.pages_of(request_id)[end // SIZE - 1]
            made = identity(running.token_ids, running.salt, end)
            if end > running.num_computed:
                self.contents[page] = made
            assert self.contents[page] == made, "a page of the sequence was overwritten"
        for page in kv.pages_of(request_id)[num_tokens // SIZE :]:
            self.contents[page] = f"half of {request_id}"
        running.num_computed = num_tokens
        kv.publish(request_id, running.token_ids, num_tokens)

    def run(self, request_id: str, token_ids, mix: AdapterMix = (), first_adapted: int = 0) -> int:
        """Begin and compute everything; returns the cached tokens."""
        num_cached = self.begin(request_id, token_ids, mix, first_adapted)
        self.compute(request_id, len(token_ids))
        return num_cached

    def end(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.memory.kv_cache.free(request_id)
            del self.running[request_id]

    def num_known(self, token_ids, salt: PrefixSalt, max_tokens: int) -> int:
        """The longest run of whole pages that are cached with exactly this identity."""
        known = {self.contents[page.page] for page in self.memory.prefixes._pages.values()}
        num_tokens = 0
        while num_tokens + SIZE <= max_tokens:
            if identity(token_ids, salt, num_tokens + SIZE) not in known:
                break
            num_tokens += SIZE
        return num_tokens
