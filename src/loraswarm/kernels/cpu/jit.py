"""How the kernels are compiled, cached on disk, and how many threads they use.

Knows nothing about what they compute. A kernel splits its work into items that do not depend on the
number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import torch

Function = TypeVar("Function", bound=Callable[..., Any])

PARALLEL_PRODUCTS = 1 << 16
_PART = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def _cache_directory() -> str:
    """Where compiled kernels are kept: a new directory for each state of this package's sources.

    Numba alone looks only at the file of the outermost function, not at what it inlines.
    """
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in (here.parent / "__init__.py", *sorted(here.glob("*.py"))):
        digest.update(source.read_bytes())
    root = Path(numba.config.CACHE_DIR or Path.home() / ".cache" / "loraswarm")
    return str(root / f"kernels-{digest.hexdigest()[:16]}")


_CACHE_DIRECTORY = _cache_directory()


class Threads:
    """How many threads every kernel uses, whichever thread calls it."""

    def __init__(self) -> None:
        self._count = min(torch.get_num_threads(), self.max_count)

    @property
    def max_count(self) -> int:
        return int(numba.config.NUMBA_NUM_THREADS)

    @property
    def count(self) -> int:
        """How many threads share large work."""
        return self._count

    def wake(self, num_products: int) -> int:
        """How many threads to use for so many multiply-adds: no more than it pays to wake."""
        return min(self._count, 1 + num_products // max(PARALLEL_PRODUCTS, 1))

    def set_count(self, count: int) -> None:
        """Raises ValueError unless `count` is from 1 to the number of CPUs of this process."""
        if not 1 <= count <= self.max_count:
            raise ValueError(
                f"num_threads is {count}; this process can use from 1 to {self.max_count}"
            )
        self._count = count


threads = Threads()


def kernel(function: Function) -> Function:
    """Compile on first call for the types it gets, and keep the result on disk."""
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _CACHE_DIRECTORY
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
        return cast(Function, compiled)
    finally:
        numba.config.CACHE_DIR = previous


def called(function: Function) -> Function:
    """A part of a kernel, compiled once however often it is used; takes and returns no vectors."""
    return cast(Function, numba.njit(**_PART)(function))


def inlined(function: Function) -> Function:
    """A part of a kernel; vectors stay in registers across its calls."""
    return cast(Function, numba.njit(forceinline=True, **_PART)(function))
