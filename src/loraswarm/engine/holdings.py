"""What sequences hold while they run: pages for their tokens, pins of their adapters.

Takes all of it or nothing, and gives it back. Knows which adapters each open sequence has; knows no
queues. Used by the scheduler. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.sequence import Sequence
from loraswarm.engine.step import PageFill
from loraswarm.errors import InvalidRequest
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.memory import Memory
from loraswarm.memory.prefix_cache import PrefixSalt


@dataclass(frozen=True, slots=True)
class Taken:
    """What a sequence that starts finds: `num_cached` tokens were here, `num_computed` need not be
    computed once `fills` are written; `loads` bring its adapters into their pages."""

    num_cached: int
    num_computed: int
    fills: tuple[PageFill, ...]
    loads: tuple[AdapterLoad, ...]


class Holdings:
    """Pages and pins of one engine's sequences."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._kv = memory.kv_cache
        self._adapters = memory.adapters
        self._infos: dict[str, tuple[AdapterInfo, ...]] = {}

    def open(self, sequence: Sequence, infos: Seq[AdapterInfo]) -> None:
        """Know the adapters of a sequence's mix until `close`."""
        assert sequence.adapter_keys == tuple(info.key for info in infos)
        if sequence.request_id in self._infos:
            raise InvalidRequest(f"request id {sequence.request_id!r} is already in use")
        self._infos[sequence.request_id] = tuple(infos)

    def close(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        del self._infos[sequence.request_id]

    def max_sequence_tokens(self, infos: Seq[AdapterInfo], num_taken_pages: int) -> int:
        """Tokens of the longest sequence that fits the pool beside its adapters, when
        `num_taken_pages` are taken for good."""
        adapter_pages = sum(self._adapters.num_pages(info) for info in infos) + num_taken_pages
        return max(0, self._memory.pool.num_pages - adapter_pages) * self._kv.page_tokens

    def num_pages_at_end(self, sequence: Sequence) -> int:
        """The most pages the sequence will need, its adapters included."""
        tokens = sequence.num_prompt + sequence.max_tokens
        infos = self._infos[sequence.request_id]
        num_kv_pages = -(-tokens // self._kv.page_tokens)
        return num_kv_pages + sum(self._adapters.num_pages(info) for info in infos)

    def try_take(self, sequence: Sequence) -> Taken | None:
        """Pin the adapters and take pages for all known tokens and one more, or change nothing."""
        request_id = sequence.request_id
        infos = self._infos[request_id]
        resident = [info for info in infos if self._adapters.is_resident(info.key)]
        absent = [info for info in infos if not self._adapters.is_resident(info.key)]
        for info in resident:
            self._adapters.pin(info)
        num_cached = self._reuse_prefix(sequence)
        num_tokens = min(len(sequence.token_ids) + 1, sequence.num_prompt + sequence.max_tokens)
        num_kv_pages = self._kv.num_missing_pages(request_id, num_tokens)
        num_pages = sum(self._adapters.num_load_pages(info) for info in absent) + num_kv_pages
        if not self._memory.has_room(num_pages):
            self._kv.free(request_id)
            for info in resident:
                self._adapters.unpin(info.key, was_used=False)
            return None
        self._memory.make_room(num_kv_pages)
        self._kv.reserve(request_id, num_tokens)
        loads = [load for info in absent if (load := self._memory.pin_adapter(info)[0])]
        num_brought = 0 if sequence.brought is None else sequence.brought.num_tokens
        fills = self._fills(sequence, num_cached)
        return Taken(num_cached, max(num_cached, num_brought), fills, tuple(loads))

    def give_back(self, sequence: Sequence) -> None:
        """The pages and pins of a sequence that runs no more."""
        self._kv.free(sequence.request_id)
        for key in sequence.adapter_keys:
            self._adapters.unpin(key)

    def _reuse_prefix(self, sequence: Sequence) -> int:
        """Take the pages of the longest known prefix; returns their tokens. The last token is
        always computed, and every token whose log-probability is wanted."""
        num_reusable = len(sequence.token_ids) - 1
        if sequence.request.params.prompt_logprobs is not None:
            num_reusable = 0
        salt = PrefixSalt(sequence.mix, sequence.first_adapted)
        return self._kv.begin(sequence.request_id, sequence.token_ids, salt, num_reusable)

    def _fills(self, sequence: Sequence, num_cached: int) -> tuple[PageFill, ...]:
        """What it has brought, but for the pages whose prefix is cached here: those are shared.

        table     | cached | cached | own | own | own |
        brought   |        |        | fill| fill|
        """
        if sequence.brought is None:
            return ()
        first = num_cached // self._kv.page_tokens
        table = self._kv.pages_of(sequence.request_id)[first:]
        return tuple(map(PageFill, table, sequence.brought.pages[first:]))
