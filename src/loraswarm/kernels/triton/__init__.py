"""The kernels for CUDA devices, in Triton; on CPU tensors under TRITON_INTERPRET=1.

Same functions and semantics as `kernels.reference`, except that arguments which lie on the device
are not read for checking. Importing it loads Triton; nothing compiles before the first call.
Called by models and by whoever starts an engine.
"""

from loraswarm.kernels.reference import finish, recording
from loraswarm.kernels.triton.attention import paged_attention
from loraswarm.kernels.triton.gating import silu_multiply
from loraswarm.kernels.triton.linear import linear, linear_shrink, pack_linear
from loraswarm.kernels.triton.lora import lora_expand_, lora_shrink
from loraswarm.kernels.triton.merging import empty_linear, linear_norm, merge_linear_
from loraswarm.kernels.triton.norm import add_rms_norm_
from loraswarm.kernels.triton.rotating import rotate_and_write_kv_, write_kv_
from loraswarm.kernels.triton.warming import warm_up

__all__ = [
    "add_rms_norm_",
    "empty_linear",
    "finish",
    "linear",
    "linear_norm",
    "linear_shrink",
    "lora_expand_",
    "lora_shrink",
    "merge_linear_",
    "pack_linear",
    "paged_attention",
    "recording",
    "rotate_and_write_kv_",
    "silu_multiply",
    "warm_up",
    "write_kv_",
]
