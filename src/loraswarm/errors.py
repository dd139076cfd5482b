"""The exception tree. Every error a user can meet is one of these; each knows its HTTP status.

LoRASwarmError
├── ConfigError       an option or a model directory is wrong; raised before anything is served
├── InvalidRequest    400  the request cannot be served as it is written
├── UnknownAdapter    404  `model` names nothing we serve
├── PathNotFound      404  a path to load from has no adapter
├── ForbiddenPath     403  a path to load from is outside the configured stores
├── AdapterError      422  an adapter's files cannot be applied exactly
├── Overloaded        503  try again later
├── StoreError        503  a store of adapters cannot be read now
├── EngineError       500  a bug of ours or a dead engine
└── OutOfPages        the page pool cannot give that many; callers evict, preempt or wait

A message says what, which, the limit and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class LoRASwarmError(Exception):
    """Root of all errors raised on purpose."""

    http_status = 500
    error_type = "internal_error"


class ConfigError(LoRASwarmError):
    """An option, a model directory or a combination of them cannot work."""

    error_type = "config_error"


class InvalidRequest(LoRASwarmError):
    """The request is malformed, unsupported or too large. `param` names the offending field."""

    http_status = 400
    error_type = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownAdapter(LoRASwarmError):
    """The requested name is neither the base model nor a known adapter."""

    http_status = 404
    error_type = "not_found_error"
    max_names = 20
    max_name_length = 200

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        shown = ", ".join(names[: self.max_names])
        if len(names) > self.max_names:
            shown += f", ... ({len(names)} in all; GET /v1/models lists them)"
        asked = repr(name[: self.max_name_length])
        if len(name) > self.max_name_length:
            asked += f"... ({len(name):,} characters)"
        super().__init__(f"no model or adapter is named {asked}; known: {shown or 'none'}")


class PathNotFound(LoRASwarmError):
    """There is no adapter at the path or URL that was given."""

    http_status = 404
    error_type = "not_found_error"


class ForbiddenPath(LoRASwarmError):
    """A path or URL to load from lies outside the stores that were configured."""

    http_status = 403
    error_type = "permission_error"


class AdapterError(LoRASwarmError):
    """An adapter cannot be applied exactly. The message names the tensor or config key."""

    http_status = 422
    error_type = "adapter_error"


class Overloaded(LoRASwarmError):
    """No room for the request now. `retry_after_s` is sent as Retry-After."""

    http_status = 503
    error_type = "overloaded_error"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreError(LoRASwarmError):
    """A store of adapters failed: a directory that is gone, a network error, a time-out.

    What is in memory is served on. `retry_after_s` is sent as Retry-After.
    """

    http_status = 503
    error_type = "store_error"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(LoRASwarmError):
    """The engine failed or is gone."""

    error_type = "engine_error"


class OutOfPages(LoRASwarmError):
    """The pool has fewer free pages than asked for; the pool is unchanged."""

    error_type = "overloaded_error"
    http_status = 503

    def __init__(self, num_needed: int, num_free: int, largest_owners: str) -> None:
        super().__init__(
            f"{num_needed} pages needed, {num_free} free; "
            f"largest owners: {largest_owners or 'none'}"
        )
        self.num_needed = num_needed
        self.num_free = num_free
