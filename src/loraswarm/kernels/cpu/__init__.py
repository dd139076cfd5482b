"""The kernels for CPUs, in Numba.

Same functions and semantics as `kernels.reference`. Importing it loads Numba; nothing compiles
before the first call or `warm_up`. Called by models and by whoever starts an engine.
"""

from loraswarm.kernels.cpu.jit import threads
from loraswarm.kernels.cpu.linear import pack_linear
from loraswarm.kernels.cpu.lora import linear_shrink, lora_expand_, lora_shrink
from loraswarm.kernels.cpu.merging import empty_linear, linear_norm, merge_linear_
from loraswarm.kernels.cpu.paged import paged_attention, rotate_and_write_kv_, write_kv_
from loraswarm.kernels.cpu.products import linear
from loraswarm.kernels.cpu.program import programs
from loraswarm.kernels.cpu.rowwise import add_rms_norm_, block_maxima, silu_multiply
from loraswarm.kernels.cpu.warming import warm_up

__all__ = [
    "add_rms_norm_",
    "block_maxima",
    "empty_linear",
    "finish",
    "linear",
    "linear_norm",
    "linear_shrink",
    "lora_expand_",
    "lora_shrink",
    "max_num_threads",
    "merge_linear_",
    "pack_linear",
    "paged_attention",
    "recording",
    "rotate_and_write_kv_",
    "set_num_threads",
    "silu_multiply",
    "warm_up",
    "write_kv_",
]


recording = programs.recording
finish = programs.finish


def max_num_threads() -> int:
    """CPUs of this process, or what NUMBA_NUM_THREADS says."""
    return threads.max_count


def set_num_threads(num_threads: int) -> None:
    """Let every kernel use that many threads; results do not depend on it.

    Raises    ValueError unless it is from 1 to the number of CPUs of this process.
    """
    threads.set_count(num_threads)
