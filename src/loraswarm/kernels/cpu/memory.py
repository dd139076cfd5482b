"""Bare pointers from addresses, and the atomic reads and pauses by which threads wait for others.

An operation of a program (kernels/cpu/program) holds addresses as integers; its code turns them
into pointers of the type it expects. Nothing checks them. Used only by the kernels of this package.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FIRST_CACHE, SECOND_CACHE = 3, 2  # as LLVM counts what is prefetched
_I32, _BYTE = ir.IntType(32), ir.IntType(8).as_pointer()


def _pointer(dtype: Any) -> Any:
    """An intrinsic: the address as a bare pointer to elements of a fixed type."""

    def typing(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_data_type(dtype).as_pointer())

        return types.CPointer(dtype)(types.int64), generate

    return intrinsic(typing)


int64_at = _pointer(types.int64)
int32_at = _pointer(types.int32)
float_at = _pointer(types.float32)


@intrinsic
def memory_at(context: Any, like: Any, address: Any) -> Any:
    """The address as a bare pointer to elements of the type that pointer `like` has."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[1], context.get_data_type(like.dtype).as_pointer())

    return types.CPointer(like.dtype)(like, types.int64), generate


@intrinsic
def moved(context: Any, memory: Any, count: Any) -> Any:
    """The pointer `count` elements further on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.gep(values[0], [values[1]])

    return memory(memory, types.intp), generate


@intrinsic
def add_atomically_at(context: Any, memory: Any, index: Any, amount: Any) -> Any:
    """Add to one int64 and return what it was before; what was written before is seen by whoever
    reads the sum."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[0], [values[1]])
        return builder.atomic_rmw("add", place, values[2], "seq_cst")

    return types.int64(memory, types.intp, types.int64), generate


@intrinsic
def read_atomically(context: Any, memory: Any, index: Any) -> Any:
    """One int64, and with it all that its writer wrote before."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[0], [values[1]])
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(memory, types.intp), generate


@intrinsic
def write_atomically(context: Any, memory: Any, index: Any, value: Any) -> Any:
    """Set one int64; whoever reads it sees all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[0], [values[1]])
        builder.store_atomic(values[2], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(memory, types.intp, types.int64), generate


@intrinsic
def swap_atomically(context: Any, memory: Any, index: Any, value: Any) -> Any:
    """Set one int64 and return what it was before."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[0], [values[1]])
        return builder.atomic_rmw("xchg", place, values[2], "seq_cst")

    return types.int64(memory, types.intp, types.int64), generate


def generate_prefetch(builder: Any, place: Any, cache: int) -> None:
    """Code that brings the cache line at `place`, which need not exist, into a core's cache."""
    function_type = ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(place, _BYTE), _I32(0), _I32(cache), _I32(1)])


def _prefetch(cache: int) -> Any:
    """An intrinsic: ask for the cache line of an element that will be read soon."""

    def typing(context: Any, memory: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            generate_prefetch(builder, builder.gep(values[0], [values[1]]), cache)
            return context.get_dummy_value()

        return types.void(memory, types.intp), generate

    return intrinsic(typing)


prefetch = _prefetch(FIRST_CACHE)
"""Bring the cache line of `memory[index]` into the first cache; the address may be any."""
prefetch_far = _prefetch(SECOND_CACHE)
"""Likewise, into the second cache."""


def _pipe_call(name: str) -> Any:
    """An intrinsic that calls the C library's `read` or `write` for one byte of a pipe."""

    def typing(context: Any, pipe: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            byte = ir.IntType(8)
            size = context.get_value_type(types.intp)
            function_type = ir.FunctionType(size, [_I32, byte.as_pointer(), size])
            function = cgutils.get_or_insert_function(builder.module, function_type, name)
            place = cgutils.alloca_once_value(builder, byte(0))
            descriptor = builder.trunc(values[0], _I32)
            return builder.call(function, [descriptor, place, size(1)])

        return types.intp(types.int64), generate

    return intrinsic(typing)


wait_at_pipe = _pipe_call("read")
"""Sleep until a byte is in the pipe with this descriptor, and take it."""
wake_through_pipe = _pipe_call("write")
"""Put a byte into the pipe with this descriptor."""


@intrinsic
def read_clock(context: Any) -> Any:
    """A number that grows at a steady rate; 0 where the CPU lets programs read none."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(64), []), "llvm.readcyclecounter"
        )
        return builder.call(function, [])

    return types.int64(), generate


@intrinsic
def yield_thread(context: Any) -> Any:
    """Let another thread of the machine run."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_I32, []), "sched_yield"
        )
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def relax(context: Any) -> Any:
    """Tell the core that this thread is waiting in a loop."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = "llvm.x86.sse2.pause"
        if "x86" in builder.module.triple or "amd64" in builder.module.triple.lower():
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), name
            )
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate
