"""The kernels for CPUs: Numba for decode, attention and short prefills, torch where it is faster.

Same functions and semantics as `kernels.reference`. Importing it loads Numba; nothing compiles
before the first call or `warm_up`. Called by models and by whoever starts an engine.
"""

from loraswarm.kernels.cpu.jit import threads
from loraswarm.kernels.cpu.lora import lora_expand_, lora_shrink
from loraswarm.kernels.cpu.paged import paged_attention, write_kv_
from loraswarm.kernels.cpu.warming import warm_up

__all__ = [
    "lora_expand_",
    "lora_shrink",
    "max_num_threads",
    "paged_attention",
    "set_num_threads",
    "warm_up",
    "write_kv_",
]


def max_num_threads() -> int:
    """CPUs of this process, or what NUMBA_NUM_THREADS says."""
    return threads.max_count


def set_num_threads(num_threads: int) -> None:
    """Let every kernel use that many threads; results do not depend on it.

    Raises    ValueError unless it is from 1 to the number of CPUs of this process.
    """
    threads.set_count(num_threads)
