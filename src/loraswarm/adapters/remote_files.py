"""The files below a URL, whatever its protocol: names, sizes, versions, and a copy of each.

Knows fsspec and how its drivers differ, nothing of adapters. Every call ends within its time, also
if a server never answers. Used by adapters/remote_store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import fsspec
from fsspec.asyn import sync
from fsspec.callbacks import Callback

T = TypeVar("T")
MAX_REQUESTS = 16  # beside each other, where each file needs one
# What drivers call a digest or a number of the content, and when it was written.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "lfs", "blob_id", "xet_hash", "Content-MD5")
_TIMES = ("LastModified", "updated", "Last-Modified", "mtime", "created")


class RemoteFile(NamedTuple):
    """`name` is relative to what was listed; `place` is the driver's. `version` changes with the
    content; `size` and `changed_s` are None and 0 if the server does not tell."""

    name: str
    place: str
    size: int | None
    version: str
    changed_s: float


class TooLarge(Exception):
    """A file is larger than was said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds: for one answer of a server, for one look in all, for one adapter's download in all,
    and before each further attempt."""

    answer_s: float = 20.0
    look_s: float = 60.0
    fetch_s: float = 900.0
    waits_s: tuple[float, ...] = (0.2, 1.0, 3.0)


class RemoteFiles:
    """What is below a URL. Safe to use from several threads; connects when it is first asked."""

    def __init__(self, url: str, usual_names: Sequence[str], patience: Patience) -> None:
        """`usual_names` are asked for where a web server gives no index."""
        self._url = url
        self._usual_names = usual_names
        self._protocol = url.partition("://")[0]
        self._patience = patience
        self._lock = threading.Lock()
        self._shared: Any = None

    def files_in(
        self, below: str, wanted: Callable[[str], bool], within_s: float
    ) -> list[RemoteFile]:
        """Files in the directory `below`, in directories of it too if `below` is "".

        Those with names that are not `wanted` may be left out.
        Raises    FileNotFoundError, TimeoutError, and whatever a driver does.
        """
        url = f"{self._url}/{below}".rstrip("/")
        fs = self._open()
        if self._protocol in ("http", "https"):
            tree = _HttpTree(fs, url, wanted, self._usual_names)
            return _parse(url, self._wait(fs, tree.files(is_deep=not below), within_s))
        root = fs._strip_protocol(url)
        options = {"refresh": True} if self._protocol == "hf" else {}
        listing = fs.ls if below else fs.find
        if fs.async_impl:
            listing_async = fs._ls if below else fs._find
            found = self._wait(fs, listing_async(root, detail=True), within_s)
        else:
            found = _within(within_s, lambda: listing(root, detail=True, **options))
        infos = found.values() if isinstance(found, Mapping) else found
        return _parse(root, (info for info in infos if info["type"] == "file"))

    def get(self, file: RemoteFile, to: Path, max_bytes: int, within_s: float) -> None:
        """Copy a file. Raises TooLarge, FileNotFoundError, OSError of the disk, and others."""
        fs, limit = self._open(), _Limit(max_bytes)
        if fs.async_impl:
            self._wait(fs, fs._get_file(file.place, str(to), callback=limit), within_s)
        else:
            _within(within_s, lambda: fs.get_file(file.place, str(to), callback=limit))

    def _open(self) -> Any:
        options = {**self._options(), "skip_instance_cache": True, "use_listings_cache": False}
        with self._lock:
            if self._shared is not None:
                return self._shared
            fs = fsspec.filesystem(self._protocol, **options)
            if fs.async_impl:  # the others are not made for several threads
                self._shared = fs
            return fs

    def _options(self) -> dict[str, Any]:
        answer_s = self._patience.answer_s
        if self._protocol == "s3":
            retries = {"max_attempts": 1}
            times = {"connect_timeout": answer_s, "read_timeout": answer_s}
            return {"config_kwargs": {**times, "retries": retries}}
        if self._protocol == "gs":
            return {"requests_timeout": answer_s}
        if self._protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(None, sock_connect=answer_s, sock_read=answer_s)
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        return {}

    def _wait(self, fs: Any, work: Awaitable[T], within_s: float) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, within_s)

        result: T = sync(fs.loop, bounded)
        return result


class _HttpTree:
    """Files by the links of a server's index; without one, the wanted ones that are there."""

    def __init__(
        self, fs: Any, url: str, wanted: Callable[[str], bool], usual_names: Sequence[str]
    ) -> None:
        self._fs = fs
        self._url = url
        self._wanted = wanted
        self._usual_names = usual_names
        self._gate = asyncio.Semaphore(MAX_REQUESTS)

    async def files(self, is_deep: bool) -> list[dict[str, Any]]:
        """Those of the directory, and of directories in it if `is_deep`.

        Raises    FileNotFoundError if there is neither an index nor a file.
        """
        index = await self._links(self._url)
        links = [] if index is None else index
        directories = [link for link in links if link.endswith("/")] if is_deep else []
        for found in await self._each(self._links, directories):
            links = links + (found or [])
        places = {link for link in links if self._wanted(unquote(link.rpartition("/")[2]))}
        if index is None:
            places = {f"{self._url}/{name}" for name in self._usual_names}
        infos = await self._each(self._info, sorted(places))
        there = [info for info in infos if info is not None]
        if index is None and not there:
            raise FileNotFoundError(self._url)
        return there

    async def _each(self, do: Callable[[str], Awaitable[T]], urls: Iterable[str]) -> list[T]:
        async def one(url: str) -> T:
            async with self._gate:
                return await do(url)

        return await asyncio.gather(*(one(url) for url in urls))

    async def _links(self, url: str) -> list[str] | None:
        """Links of the index at a URL; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return [item["name"] for item in await self._fs._ls(f"{url.rstrip('/')}/", detail=True)]
        return None

    async def _info(self, url: str) -> dict[str, Any] | None:
        session = await self._fs.set_session()
        headers = {"Accept-Encoding": "identity"}
        encoded = self._fs.encode_url(url)
        async with session.head(encoded, allow_redirects=True, headers=headers) as answer:
            if answer.status in (404, 410):
                return None
            answer.raise_for_status()
            size = answer.headers.get("Content-Length", "")
            return {
                **{key: answer.headers.get(key) for key in (*_VERSIONS, *_TIMES)},
                "name": url,
                "size": int(size) if size.isdecimal() else None,
            }


class _Limit(Callback):  # type: ignore[misc]
    """Ends a download that grows too large."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._left_bytes = max_bytes

    def relative_update(self, inc: int = 1) -> None:
        self._left_bytes -= inc
        if self._left_bytes < 0:
            raise TooLarge


def _parse(root: str, infos: Iterable[Mapping[str, Any]]) -> list[RemoteFile]:
    prefix = root.rstrip("/") + "/"
    return [
        RemoteFile(
            info["name"].removeprefix(prefix),
            info["name"],
            info.get("size"),
            _version(info),
            _changed_s(info),
        )
        for info in infos
        if info["name"].startswith(prefix)
    ]


def _version(info: Mapping[str, Any]) -> str:
    """What tells contents of the same size apart: a digest if there is one, else times."""
    for keys in (_VERSIONS, _TIMES):
        facts = [(key, str(info[key])) for key in keys if info.get(key)]
        if facts:
            return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return ""


def _changed_s(info: Mapping[str, Any]) -> float:
    for key in _TIMES:
        value = info.get(key)
        with contextlib.suppress(ValueError, TypeError):
            if isinstance(value, datetime):
                return value.timestamp()
            if isinstance(value, str):
                is_iso = value[:4].isdecimal()
                parse = datetime.fromisoformat if is_iso else parsedate_to_datetime
                return parse(value).timestamp()
            if isinstance(value, int | float):
                return float(value)
    return 0.0


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns; if it does not in time, it is left to itself."""
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:  # raised by the caller
            box.put((None, error))

    threading.Thread(target=run, name="store-call", daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
