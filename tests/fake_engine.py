"""An engine without a model: answers from a script, and can be held, killed and inspected.

Implements core.client.EngineClient in the process and event loop of its user. Its log-probabilities
are made up but of the right form.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle

from loraswarm.core.admin import (
    AdapterState,
    AdminCommand,
    AdminResult,
    LoadAdapter,
    RescanAdapters,
    ScanReport,
    UnloadAdapter,
)
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats, served_names
from loraswarm.core.events import ErrorInfo, FinishReason, SequenceEvent, TokenLogprob
from loraswarm.core.request import Request
from loraswarm.errors import (
    EngineError,
    ForbiddenPath,
    InvalidRequest,
    LoRASwarmError,
    PathNotFound,
    UnknownAdapter,
)
from loraswarm.text.tokenizer import Tokenizer

Answer = Callable[[Request, Tokenizer], Sequence[int]]
END_TOKEN = "<|end|>"
STORE = "/adapters"
NOTHING_NEW = ScanReport()
IDLE = EngineStats(
    num_waiting=0,
    num_running=0,
    num_free_pages=8,
    num_kv_pages=0,
    num_adapter_pages=0,
    num_pinned_adapters=0,
    num_resident_adapters=0,
)
ADAPTERS = (
    AdapterSummary(name="sql", path="/adapters/sql", method="LoRA", max_rank=8),
    AdapterSummary(name="team/router", path="/adapters/router", method="LoRA", max_rank=4),
    AdapterSummary(name="broken", path="/adapters/broken", refusal="tensor x has 3 dimensions"),
)


@dataclass(frozen=True)
class Script:
    """What every request is answered; an end token follows."""

    answer: Answer

    @classmethod
    def text(cls, text: str) -> Script:
        return cls(lambda _, tokenizer: tokenizer.encode(text, add_special_tokens=False))

    @classmethod
    def ids(cls, token_ids: Sequence[int]) -> Script:
        return cls(lambda _request, _tokenizer: token_ids)

    @classmethod
    def echo(cls) -> Script:
        """The prompt again."""
        return cls(lambda request, _: request.prompt_token_ids)

    @classmethod
    def named(cls) -> Script:
        """The adapter's name, so that answers tell which adapter gave them."""
        return cls(lambda r, tokenizer: tokenizer.encode(f"I am {r.adapter or 'base'}.", False))


@dataclass
class FakeEngine:
    """`hold_after` tokens each request waits until `release` or `die` is called.

    Commands about adapters act on `adapters` and `states` alone; a path ends in "missing" if there
    is nothing there. Those of `held` wait for `release`; all fail with `admin_error` if it is set.
    """

    tokenizer: Tokenizer
    script: Script = field(default_factory=Script.echo)
    max_model_len: int = 512
    hold_after: int | None = None
    fail_after: int | None = None
    tokens_per_event: int = 1
    delay_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    num_open: int = 0
    num_cached_tokens: int | None = None
    queue_s: float | None = None
    served: Iterable[AdapterSummary] = ADAPTERS
    counts: EngineStats = IDLE
    scan: ScanReport = NOTHING_NEW
    held: tuple[type[AdminCommand], ...] = ()
    admin_error: LoRASwarmError | None = None
    commands: list[AdminCommand] = field(default_factory=list)
    num_state_queries: int = 0

    def __post_init__(self) -> None:
        self._closed = asyncio.Event()
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[AdminResult]] = set()
        self.adapters = {summary.name: summary for summary in self.served}
        self.states = {name: _state(summary) for name, summary in self.adapters.items()}

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="tiny",
            model_path="/models/tiny",
            max_model_len=self.max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            end_token_ids=tuple(self.tokenizer.encode(END_TOKEN, add_special_tokens=False)),
            num_pages=8,
            page_bytes=1024,
            page_tokens=16,
            weight_bytes=4096,
            host_cache_bytes=2048,
        )

    @property
    def is_alive(self) -> bool:
        return not self._closed.is_set()

    async def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        """Yield the scripted tokens and one terminal event; closing early counts as an abort."""
        self.requests.append(request)
        self.num_open += 1
        ended = False
        try:
            for event in self._events(request):
                if event is None:
                    await self._wait_released()
                    continue
                await asyncio.sleep(self.delay_s)
                ended = event.finish_reason is not None
                if not self.is_alive:
                    ended = True
                    event = self._error(request, EngineError("the fake engine is dead"))
                yield event
                if ended:
                    return
        finally:
            self.num_open -= 1
            if not ended:
                self.aborted.append(request.request_id)

    async def stats(self) -> EngineStats:
        self._require_alive()
        return dataclasses.replace(self.counts, num_running=self.num_open)

    async def adapter_states(self) -> tuple[AdapterState, ...]:
        self._require_alive()
        self.num_state_queries += 1
        return tuple(state for _, state in sorted(self.states.items()))

    async def administer(self, command: AdminCommand) -> AdminResult:
        """Goes on by itself if its caller does not wait for the end."""
        self._require_alive()
        self.commands.append(command)
        task = asyncio.create_task(self._carry_out(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()

    async def die(self) -> None:
        """End as a crashed engine does."""
        self._closed.set()

    async def release(self) -> None:
        """Let held requests go on, and hold no more."""
        self._released.set()

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise EngineError("the fake engine is dead")

    async def _carry_out(self, command: AdminCommand) -> AdminResult:
        if isinstance(command, self.held):
            await self._wait_released()
        self._require_alive()
        if self.admin_error is not None:
            raise self.admin_error
        if isinstance(command, RescanAdapters):
            return self.scan
        if isinstance(command, LoadAdapter):
            return self._load(command)
        if command.name not in self.states:
            raise UnknownAdapter(command.name, self.states)
        if isinstance(command, UnloadAdapter):
            del self.adapters[command.name]
            return dataclasses.replace(self.states.pop(command.name), state="unloaded")
        changes = {"PinAdapter": True, "UnpinAdapter": False}
        is_pinned = changes.get(type(command).__name__, self.states[command.name].is_pinned)
        state = dataclasses.replace(self.states[command.name], is_pinned=is_pinned, tier="device")
        self.states[command.name] = state
        return state

    def _load(self, command: LoadAdapter) -> AdapterState:
        if not command.path.startswith(f"{STORE}/"):
            raise ForbiddenPath(f"{command.path} is outside {STORE}")
        if command.path.endswith("missing"):
            raise PathNotFound(f"there is nothing at {command.path}")
        old = self.adapters.get(command.name)
        if old is not None and not command.in_place:
            raise InvalidRequest(
                f"The lora adapter '{command.name}' has already been loaded. If you want to load"
                " the adapter in place, set 'load_inplace' to True."
            )
        generation = 1 if old is None else old.generation + 1
        summary = AdapterSummary(name=command.name, path=command.path, generation=generation)
        self.adapters[command.name] = summary
        self.states[command.name] = _state(summary)
        return self.states[command.name]

    async def _wait_released(self) -> None:
        waits = [asyncio.ensure_future(e.wait()) for e in (self._closed, self._released)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _events(self, request: Request) -> Iterator[SequenceEvent | None]:
        """Events in order; None is a place to wait."""
        if request.adapter is not None and request.adapter not in served_names(self.adapters):
            yield self._error(request, UnknownAdapter(request.adapter, ["tiny"]))
            return
        if self.hold_after == 0:
            yield None
        tokens = list(self._tokens(request))
        reason, stop_token = self._ending(request, tokens)
        prompt_logprobs = self._prompt_logprobs(request)
        for first in range(0, max(1, len(tokens)), self.tokens_per_event):
            ids = tuple(tokens[first : first + self.tokens_per_event])
            if self.fail_after is not None and first >= self.fail_after:
                yield self._error(request, EngineError("the fake engine failed this request"))
                return
            is_last = first + self.tokens_per_event >= len(tokens)
            says_start = first == 0 and bool(ids)
            yield SequenceEvent(
                request_id=request.request_id,
                token_ids=ids,
                logprobs=self._logprobs(ids, request.params.logprobs),
                prompt_logprobs=prompt_logprobs if first == 0 else None,
                finish_reason=reason if is_last else None,
                stop_token_id=stop_token if is_last else None,
                num_cached_tokens=self.num_cached_tokens if says_start else None,
                queue_s=self.queue_s if says_start else None,
            )
            if self.hold_after is not None and first < self.hold_after <= first + len(ids):
                yield None

    def _tokens(self, request: Request) -> Iterator[int]:
        params = request.params
        limit = self.max_model_len - len(request.prompt_token_ids)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        answer = list(self.script.answer(request, self.tokenizer))
        ends = self.info.end_token_ids
        source = cycle(answer) if params.ignore_eos else chain(answer, cycle(ends))
        for position in range(limit):
            token_id = next(source)
            yield token_id
            if position >= params.min_tokens and self._is_stop(request, token_id):
                return

    def _is_stop(self, request: Request, token_id: int) -> bool:
        is_end = token_id in self.info.end_token_ids and not request.params.ignore_eos
        return is_end or token_id in request.params.stop_token_ids

    def _ending(self, request: Request, tokens: list[int]) -> tuple[FinishReason, int | None]:
        if tokens and self._is_stop(request, tokens[-1]):
            return "stop", tokens[-1]
        return "length", None

    def _logprobs(
        self, token_ids: Sequence[int], num_top: int | None
    ) -> tuple[TokenLogprob, ...] | None:
        if num_top is None:
            return None
        return tuple(self._logprob(token_id, num_top) for token_id in token_ids)

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprob | None, ...] | None:
        num_top = request.params.prompt_logprobs
        if num_top is None:
            return None
        ids = request.prompt_token_ids
        return (None, *(self._logprob(token_id, num_top) for token_id in ids[1:]))

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        size = self.info.vocab_size
        top = [((token_id + 7 * i) % size, -0.25 * (i + 1)) for i in range(num_top)]
        return TokenLogprob(token_id, -0.25, 1, tuple(top))

    def _error(self, request: Request, error: EngineError | UnknownAdapter) -> SequenceEvent:
        info = ErrorInfo(str(error), error.error_type, error.http_status)
        return SequenceEvent(request_id=request.request_id, finish_reason="error", error=info)


def _state(summary: AdapterSummary) -> AdapterState:
    return AdapterState(
        name=summary.name,
        path=summary.path,
        state="served" if summary.refusal is None else "refused",
        reason=summary.refusal,
        generation=summary.generation,
        method=summary.method,
        max_rank=summary.max_rank,
    )
