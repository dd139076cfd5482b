"""The offline API: an engine in this process, prompts in, answers out.

Joins engine and text without HTTP or asyncio. Knows nothing about the command line.
"""

from __future__ import annotations

import itertools
import logging
import reprlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

from tqdm import tqdm

from loraswarm.config import EngineConfig
from loraswarm.core.admin import (
    AdapterState,
    AdminCommand,
    AdminResult,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    RescanAdapters,
    ScanReport,
    UnloadAdapter,
    UnpinAdapter,
)
from loraswarm.core.client import EngineInfo
from loraswarm.core.events import (
    ErrorInfo,
    FinishReason,
    ReportedError,
    SequenceEvent,
    TokenLogprob,
)
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from loraswarm.errors import InvalidRequest
from loraswarm.text.generation import TextDelta, TextStream
from loraswarm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
ADMINISTRATION_POLL_S = 0.2
Prompt = str | Seq[int]
AdapterChoice = str | Mapping[str, float] | Seq[tuple[str, float]] | None
Message = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class GenerationOutput:
    """The answer to one prompt.

    `finish_reason` is "stop", "length" or "error"; `error` says why in the last case (an adapter
    that could not be read, for instance; the other prompts are unharmed).
    """

    prompt_token_ids: tuple[int, ...]
    adapter: str | dict[str, float] | None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def extend(self, delta: TextDelta) -> None:
        """Append what is new."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or ()) + delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        if delta.error is not None:
            self.error = delta.error.message


class LLM:
    """One base model and its adapters, in this process.

        llm = LLM("path/or/hub-id", adapters="adapters/")
        outputs = llm.generate(["How many open tickets?"], adapter="sql")

    Takes the options of `loraswarm serve` by the names of EngineConfig's fields; `adapters` may be
    one path or several. Not safe from several threads. What it holds is freed by `close`, at the
    end of a `with` block, or when it is forgotten.

    Raises   ConfigError for an option or a model that cannot work.
    """

    def __init__(
        self,
        model: str,
        adapters: str | Seq[str] = (),
        report: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        roots = (adapters,) if isinstance(adapters, str) else tuple(adapters)
        config = EngineConfig.from_options({"model": model, "adapters": roots, **options})
        self._engine: Engine = build_engine(config, report) if report else build_engine(config)
        self.tokenizer = Tokenizer.load(self._engine.info.model_path)
        self._ids = itertools.count()
        self._command_ids = itertools.count()
        self._inboxes: dict[str, deque[SequenceEvent]] = {}

    @property
    def info(self) -> EngineInfo:
        """What is served: names, limits, sizes."""
        return self._engine.info

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs beside; safe to call twice."""
        self._engine.close()

    def adapters(self) -> tuple[AdapterState, ...]:
        """Every adapter that is known, sorted by name: where it is, and why it is not served."""
        return self._engine.adapter_states()

    def load_adapter(self, name: str, path: str, in_place: bool = False) -> AdapterState:
        """Serve what is at `path`, within the directories and URLs of `adapters`, as `name`.

        Raises   InvalidRequest if the name is served already, unless `in_place`; ForbiddenPath,
                 PathNotFound, AdapterError, StoreError.
        """
        return self._change(LoadAdapter(name, path, in_place))

    def unload_adapter(self, name: str) -> AdapterState:
        """Serve `name` no more and free its memory. Raises UnknownAdapter."""
        return self._change(UnloadAdapter(name))

    def pin_adapter(self, name: str) -> AdapterState:
        """Bring `name` to the device and keep it there until `unpin_adapter`."""
        return self._change(PinAdapter(name))

    def unpin_adapter(self, name: str) -> AdapterState:
        """Let `name` leave the device again."""
        return self._change(UnpinAdapter(name))

    def prefetch_adapter(self, name: str) -> AdapterState:
        """Bring `name` to host memory, and to the device if there are free pages."""
        return self._change(PrefetchAdapter(name))

    def rescan_adapters(self) -> ScanReport:
        """Look at every directory and URL of `adapters` now."""
        report = self._administer(RescanAdapters())
        assert isinstance(report, ScanReport)
        return report

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        adapter: AdapterChoice | Seq[AdapterChoice] = None,
        use_progress_bar: bool = True,
    ) -> list[GenerationOutput]:
        """Answer prompts (texts or token ids) together; outputs are in the prompts' order.

        `params` and `adapter` are one for all prompts or one for each. An adapter is a name, a map
        from names to weights or a list of (name, weight) pairs (the weighted sum of their updates),
        or None for the base.
        Raises   InvalidRequest, UnknownAdapter or AdapterError before anything runs; what is only
                 found when an adapter is read ends its own prompts, with `error` in their output.
        """
        items = _as_prompts(prompts)
        all_params = _spread("params", params or SamplingParams(), len(items), SamplingParams)
        names = _spread_adapters(adapter, len(items))
        requests = [
            self._request(prompt, one, name)
            for prompt, one, name in zip(items, all_params, names, strict=True)
        ]
        return self._run(requests, use_progress_bar)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        adapter: AdapterChoice | Seq[AdapterChoice] = None,
        use_progress_bar: bool = True,
    ) -> list[GenerationOutput]:
        """As `generate`, for one conversation or several, by the model's own chat template."""
        chats = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        prompts = [
            self.tokenizer.encode(self.tokenizer.render_chat(chat), add_special_tokens=False)  # type: ignore[arg-type]
            for chat in chats
        ]
        return self.generate(prompts, params, adapter, use_progress_bar)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, adapter: AdapterChoice = None
    ) -> Iterator[TextDelta]:
        """Answer one prompt piece by piece; closing the iterator early ends the request."""
        request = self._request(prompt, params or SamplingParams(), adapter)
        stream = TextStream(self.tokenizer, request)
        inbox = self._submit(request)
        try:
            while True:
                while not inbox:
                    self._advance()
                delta = stream.push(inbox.popleft())
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._close(request.request_id)

    def _change(self, command: AdminCommand) -> AdapterState:
        state = self._administer(command)
        assert isinstance(state, AdapterState)
        return state

    def _administer(self, command: AdminCommand) -> AdminResult:
        """Carry out a command, advancing open requests meanwhile."""
        command_id = next(self._command_ids)
        self._engine.begin_command(command_id, command)
        while True:
            for answer in self._engine.take_answers():
                if answer.command_id != command_id:
                    continue
                if isinstance(answer.result, ErrorInfo):
                    raise ReportedError(answer.result)
                return answer.result
            if not self._engine.has_work or self._engine.is_blocked:
                self._engine.wait(ADMINISTRATION_POLL_S)
            self._advance(may_wait=False)

    def _request(self, prompt: Prompt, params: SamplingParams, adapter: AdapterChoice) -> Request:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(token_ids, Seq) or not all(type(item) is int for item in token_ids):
            raise InvalidRequest(
                f"a prompt is {type(prompt).__name__}; give a text or a list of token ids", "prompt"
            )
        return Request(
            request_id=f"offline-{next(self._ids)}",
            prompt_token_ids=tuple(token_ids),
            params=params,
            adapter=adapter if isinstance(adapter, str) and adapter != self.info.model else None,
            adapters=_pairs(adapter),
        )

    def _run(self, requests: list[Request], use_progress_bar: bool) -> list[GenerationOutput]:
        outputs = {
            request.request_id: GenerationOutput(
                prompt_token_ids=request.prompt_token_ids,
                adapter=request.adapter or dict(request.adapters) or None,
            )
            for request in requests
        }
        streams = {r.request_id: TextStream(self.tokenizer, r) for r in requests}
        # None asks tqdm to show a bar on a terminal only.
        bar = tqdm(total=len(requests), desc="prompts", disable=None if use_progress_bar else True)
        inboxes: dict[str, deque[SequenceEvent]] = {}
        try:
            for request in requests:
                inboxes[request.request_id] = self._submit(request)
            while inboxes:
                self._advance()
                for request_id, inbox in list(inboxes.items()):
                    while inbox and request_id in inboxes:
                        delta = streams[request_id].push(inbox.popleft())
                        outputs[request_id].extend(delta)
                        if delta.finish_reason is not None:
                            del inboxes[request_id]
                            self._close(request_id)
                            bar.update()
                            if use_progress_bar and not sys.stderr.isatty():
                                _log_progress(len(requests) - len(inboxes), len(requests))
        finally:
            for request_id in inboxes:
                self._close(request_id)
            bar.close()
        return list(outputs.values())

    def _submit(self, request: Request) -> deque[SequenceEvent]:
        """Queue a request; its events will appear in the returned inbox."""
        self._engine.add(request)
        return self._inboxes.setdefault(request.request_id, deque())

    def _advance(self, may_wait: bool = True) -> None:
        """One step of the engine; every open request finds its events in its inbox."""
        for event in self._engine.step(may_wait):
            self._inboxes[event.request_id].append(event)

    def _close(self, request_id: str) -> None:
        """Forget a request, ended or not."""
        self._engine.abort(request_id)
        self._inboxes.pop(request_id, None)


def _log_progress(num_done: int, num_prompts: int) -> None:
    """A line for each tenth of the prompts, where no bar is shown."""
    if num_done * 10 // num_prompts > (num_done - 1) * 10 // num_prompts:
        log.info("prompts done=%d of=%d", num_done, num_prompts)


def _as_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A single text or a single list of token ids becomes a list of one."""
    if not isinstance(prompts, Seq):
        raise InvalidRequest(f"prompts is {type(prompts).__name__}; give texts or lists of ids")
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | float)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _spread_adapters(adapter: Any, count: int) -> list[Any]:
    """One choice for all prompts, or one for each."""
    is_one = adapter is None or isinstance(adapter, str | Mapping) or _are_pairs(adapter)
    if is_one or not isinstance(adapter, list | tuple):
        return [adapter] * count
    return _spread("adapter", adapter, count, str)


def _pairs(adapter: Any) -> tuple[tuple[str, float], ...]:
    """A weighted sum as (name, weight) pairs; () for a name and for None.

    Raises   InvalidRequest for what is neither.
    """
    if adapter is None or isinstance(adapter, str):
        return ()
    pairs = list(adapter.items()) if isinstance(adapter, Mapping) else adapter
    if not _are_pairs(pairs) or not pairs:
        raise InvalidRequest(
            f"adapter is {reprlib.repr(adapter)}; give a name, a map from names to weights, a list"
            " of (name, weight) pairs, or None for the base",
            "adapter",
        )
    # Numbers of numpy become Python's; whole numbers too large for that are refused by Request.
    return tuple(
        (name, weight if isinstance(weight, int) else float(weight)) for name, weight in pairs
    )


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], Real)
        and not isinstance(pair[1], bool)
        for pair in value
    )


def _spread(name: str, value: Any, count: int, single: Any) -> list[Any]:
    """One value for all, or one for each."""
    if isinstance(value, single):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise InvalidRequest(f"{count} prompts but {len(values)} of {name}; give one or {count}")
    return values
