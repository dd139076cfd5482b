"""Torch's own attention over pages, for batches with chunks, where it proves right at the start.

Torch has it from 2.12 on, and computes it with FlashAttention 3 or later only, which is a package
of its own: docs/cuda.md. Decode steps stay with attention_decode, which graphs capture. Called by
kernels/triton/attention; tried by warming.
Legend: see kernels/__init__.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraswarm.kernels import AttentionWork
from loraswarm.kernels.triton.launch import DEVICE_TYPE

HEAD_SIZES = (64, 128)
"""Those that are tried; others stay with our kernels."""
PAGE_TOKENS = 16
PARAMETERS = ("enable_gqa", "seqused_k", "block_table", "num_splits")
"""What `varlen_attn` must take beside what it took from the first."""
TOLERANCE = 2e-2
"""Relative and absolute: weights are rounded to the values' type."""

Attend = Callable[[Tensor, Tensor, AttentionWork, float, int | None], Tensor]


class TorchChoice:
    """Which pages torch's attention is used for; none until `try_on` has found it right."""

    def __init__(self) -> None:
        self._taken: set[tuple[torch.dtype, int]] = set()

    def takes(self, pages: Tensor) -> bool:
        """Whether it is used for these pages [P, layers, 2, K, C, E]."""
        return pages.shape[4] == PAGE_TOKENS and (pages.dtype, pages.shape[5]) in self._taken

    def attend(
        self, q_THE: Tensor, kv: Tensor, work: AttentionWork, scale: float, window: int | None
    ) -> Tensor:
        """As `reference.paged_attention` for one layer's pages, kv [P, 2, K, C, E].

        Numerics    a token's bits depend on its own sequence alone.
        """
        from torch.nn.attention.varlen import varlen_attn

        k_PCKE, v_PCKE = kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)
        attended: Any = varlen_attn(
            q_THE,
            k_PCKE,
            v_PCKE,
            work.query_starts,
            None,  # contexts are in seqused_k
            work.max_query_tokens,
            work.max_context_tokens,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=work.context_lens,
            block_table=work.page_table,
            num_splits=1,
        )
        return attended  # type: ignore[no-any-return]

    def try_on(self, dtype: torch.dtype, ours: Attend) -> str:
        """Use it for what it computes right on this device, as `ours` does; returns one line that
        says for what, or why for nothing.

        Cost    two small batches a head size.
        """
        fault = _missing()
        found = []
        for head_size in HEAD_SIZES if fault is None else ():
            fault = self._fault(dtype, head_size, ours)
            if fault is None:
                self._taken.add((dtype, head_size))
                found.append(head_size)
        about = f"torch {torch.__version__}"
        if found:
            return f"attention chunks=torch head_sizes={found} others=triton ({about})"
        return f"attention chunks=triton decode=triton ({about}: {fault})"

    def _fault(self, dtype: torch.dtype, head_size: int, ours: Attend) -> str | None:
        q_THE, kv, work = _trial(dtype, head_size)
        for window in (None, 7):
            arguments = (q_THE, kv, work, head_size**-0.5, window)
            try:
                theirs = [self.attend(*arguments) for _ in range(2)]
            except (RuntimeError, TypeError, ValueError) as error:
                return str(error).splitlines()[0]
            expected_THE = ours(*arguments).float()
            if not torch.allclose(theirs[0].float(), expected_THE, TOLERANCE, TOLERANCE):
                return f"its attention is not ours at head size {head_size}, window {window}"
            if not torch.equal(*theirs):
                return f"its attention differs from run to run at head size {head_size}"
        return None


def _missing() -> str | None:
    """What this torch lacks, if anything."""
    if DEVICE_TYPE != "cuda":
        return "kernels are interpreted"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "it has no torch.nn.attention.varlen"
    taken = inspect.signature(varlen_attn).parameters
    lacking = [name for name in PARAMETERS if name not in taken]
    return f"varlen_attn takes no {', '.join(lacking)}" if lacking else None


def _trial(dtype: torch.dtype, head_size: int) -> tuple[Tensor, Tensor, AttentionWork]:
    """q, the pages of one layer, and chunks with a history, without, and of one token.

    What belongs to no sequence is NaN: nothing may depend on it.
    """
    num_heads, num_kv_heads, lengths = 6, 2, ((5, 37), (3, 3), (1, 16))
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3, 2, num_kv_heads, PAGE_TOKENS, head_size)
    pages = torch.full(shape, float("nan"), dtype=dtype)
    tables = torch.tensor([[6, 1, 3], [2, 0, 0], [4, 0, 0]], dtype=torch.int32)
    for (_, context), table in zip(lengths, tables.tolist(), strict=True):
        for token in range(context):
            kv_2KE = torch.randn(2, num_kv_heads, head_size, generator=generator)
            pages[table[token // PAGE_TOKENS], 1, :, :, token % PAGE_TOKENS] = kv_2KE.to(dtype)
    num_tokens = sum(new for new, _ in lengths)
    fused = torch.randn(num_tokens, num_heads + 4, head_size, generator=generator).to(dtype)
    work = AttentionWork(
        query_starts=torch.tensor([0, 5, 8, 9], dtype=torch.int32).to(DEVICE_TYPE),
        context_lens=torch.tensor([37, 3, 16], dtype=torch.int32).to(DEVICE_TYPE),
        page_table=tables.to(DEVICE_TYPE),
        max_query_tokens=5,
        max_context_tokens=37,
    )
    return fused.to(DEVICE_TYPE)[:, :num_heads], pages.to(DEVICE_TYPE)[:, 1], work


torch_choice = TorchChoice()
