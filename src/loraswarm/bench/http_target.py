"""An endpoint that speaks OpenAI's completions: sends a request, times its streamed answer.

Whatever goes wrong with a request becomes one line in its record. Knows nothing about when
requests are due (bench/runner) or what the times mean (bench/metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from loraswarm.bench.records import Clock, PlannedRequest, RequestRecord
from loraswarm.bench.sse import DONE, EventReader, decode_chunk, error_line, one_line
from loraswarm.errors import ConfigError

Body = dict[str, Any]
DEFAULT_TIMEOUT_S = 600.0
LIST_TIMEOUT_S = 30.0
# Shorter than servers keep an idle connection (uvicorn: 5 s), so that none is reused while it ends.
KEEP_ALIVE_S = 4.0
MAX_ERROR_BYTES = 65536


class BadAnswer(Exception):
    """The server's answer is an error, or not what was asked for."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry of /v1/models; `parent` is the base model of an adapter, if the server tells."""

    id: str
    parent: str | None = None


@dataclass(slots=True, kw_only=True)
class _Answer:
    """What has come so far."""

    response_s: list[float] = field(default_factory=list)
    num_prompt: int | None = None
    num_output: int | None = None
    cached_tokens: int | None = None
    has_ended: bool = False

    def take(self, payload: bytes, time_s: float) -> None:
        """Add one event. Raises BadAnswer."""
        if payload == DONE:
            self.has_ended = True
            return
        try:
            chunk = decode_chunk(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadAnswer(f"an event cannot be read: {error}") from error
        if chunk.error is not None:
            raise BadAnswer(f"error event: {error_line(msgspec.json.encode(chunk.error))}")
        choices = chunk.choices or ()
        if any(choice.has_text for choice in choices):
            self.response_s.append(time_s)
        if any(choice.finish_reason is not None for choice in choices):
            self.has_ended = True
        if chunk.usage is not None:
            self.num_prompt = chunk.usage.prompt_tokens
            self.num_output = chunk.usage.completion_tokens
            if chunk.usage.prompt_tokens_details is not None:
                self.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens

    def problem(self) -> str | None:
        """Why a stream that has closed was no answer."""
        if not self.has_ended:
            return "the stream closed before the answer ended"
        if not self.response_s:
            return "the answer has no text"
        return None


@dataclass(slots=True)
class HttpTarget:
    """One endpoint, by its URL with or without `/v1`; used within one event loop.

    `base_model` is what `model` says for a request without an adapter. `extra_body` is added to
    every request's JSON; `body_of` makes that JSON in another way altogether, for an endpoint that
    wants something other than a streamed completion of token ids. `timeout_s` bounds one request.
    Raises   ConfigError for a URL that is none.
    """

    url: str
    base_model: str
    api_key: str | None = field(default=None, kw_only=True, repr=False)
    path: str = field(default="/v1/completions", kw_only=True)
    timeout_s: float = field(default=DEFAULT_TIMEOUT_S, kw_only=True)
    keeps_alive: bool = field(default=True, kw_only=True)
    extra_body: Mapping[str, Any] | None = field(default=None, kw_only=True)
    body_of: Callable[[PlannedRequest], Body] | None = field(default=None, kw_only=True)
    _session: aiohttp.ClientSession | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = endpoint_root(self.url)

    @property
    def name(self) -> str:
        return self.url

    async def send(self, request: PlannedRequest, clock: Clock) -> RequestRecord:
        """See `Target`."""
        body = msgspec.json.encode(self._body(request))
        session = self._open()
        answer = _Answer()
        error: str | None = None
        start_s = clock()
        try:
            await self._receive(session, body, answer, clock)
            error = answer.problem()
        except BadAnswer as failure:
            error = one_line(str(failure))
        except TimeoutError:
            error = f"not answered within {self.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as failure:
            error = one_line(f"connection failed: {failure or type(failure).__name__}")
        num_parts = len(answer.response_s)
        return RequestRecord(
            index=request.index,
            adapter=request.adapter,
            num_prompt=_known(answer.num_prompt, len(request.prompt_token_ids)),
            max_tokens=request.max_tokens,
            start_s=start_s,
            response_s=tuple(answer.response_s),
            num_output=_known(answer.num_output, num_parts),
            error=error,
            cached_tokens=answer.cached_tokens,
            is_counted=answer.num_output is not None,
        )

    async def close(self) -> None:
        """See `Target`."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _body(self, request: PlannedRequest) -> Body:
        if self.body_of is not None:
            body = self.body_of(request)
        else:
            body = {
                "model": self.base_model if request.adapter is None else request.adapter,
                "prompt": request.prompt_token_ids,
                "max_tokens": request.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        return {**body, **(self.extra_body or {})}

    async def _receive(
        self, session: aiohttp.ClientSession, body: bytes, answer: _Answer, clock: Clock
    ) -> None:
        """Fill in `answer` until the stream closes. Raises BadAnswer, and what aiohttp raises."""
        async with session.post(self.url + self.path, data=body, allow_redirects=False) as response:
            if response.status != 200:
                reason = error_line(await response.content.read(MAX_ERROR_BYTES))
                raise BadAnswer(f"HTTP {response.status}: {reason or response.reason}")
            if response.content_type != "text/event-stream":
                said = error_line(await response.content.read(MAX_ERROR_BYTES))
                raise BadAnswer(f"answered with {response.content_type}, not a stream: {said}")
            reader = EventReader()
            while True:
                piece = await response.content.readany()
                time_s = clock()
                for payload in reader.feed(piece):
                    answer.take(payload, time_s)
                if not piece:
                    return

    def _open(self) -> aiohttp.ClientSession:
        """The session, made in the event loop that uses it."""
        if self._session is None:
            headers = {"Content-Type": "application/json", **_access(self.api_key)}
            self._session = aiohttp.ClientSession(
                connector=_connector(self.keeps_alive),
                timeout=aiohttp.ClientTimeout(total=self.timeout_s),
                headers=headers,
                skip_auto_headers=("Accept-Encoding",),
            )
        return self._session


def endpoint_root(url: str) -> str:
    """`url` without `/v1` and slashes at its end. Raises ConfigError if it is no URL of HTTP."""
    root = url.rstrip("/").removesuffix("/v1").rstrip("/")
    if not _is_endpoint(root):
        raise ConfigError(f"{url!r} is no URL of an endpoint; write http://HOST:PORT")
    return root


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        return False
    is_address = has_host and not parts.query and not parts.fragment
    return parts.scheme in ("http", "https") and is_address and url.isprintable() and " " not in url


async def list_models(url: str, api_key: str | None = None) -> list[ListedModel]:
    """What the endpoint serves, in its order.

    Raises   ConfigError if it cannot be asked, or its answer is no list of models.
    """
    address = endpoint_root(url) + "/v1/models"
    timeout = aiohttp.ClientTimeout(total=LIST_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=_access(api_key), timeout=timeout) as session,
            session.get(address) as response,
        ):
            body = await response.read()
    except TimeoutError as error:
        raise ConfigError(f"{address} did not answer within {LIST_TIMEOUT_S:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(one_line(f"{address} cannot be asked: {error}")) from error
    if response.status != 200:
        raise ConfigError(f"{address} answered HTTP {response.status}: {error_line(body)}")
    try:
        entries = msgspec.json.decode(body, type=_ModelList).data
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{address} did not answer with a list of models: {error}") from error
    return [ListedModel(entry.id, entry.parent) for entry in entries]


class _ModelEntry(msgspec.Struct):
    id: str
    parent: str | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelEntry]


def _connector(keeps_alive: bool) -> aiohttp.TCPConnector:
    """As many connections as there are requests in flight."""
    if keeps_alive:
        return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.TCPConnector(limit=0, force_close=True)


def _access(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _known(count: int | None, otherwise: int) -> int:
    return otherwise if count is None else count
