"""Torch's attention over pages is used where it proves right at the start, and only there.

The tests stand in for torch's with one of their own, which sees the arguments that torch's would.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import varlen

from kernel_cases import make_attention_case
from loraswarm.kernels import AttentionWork, reference
from loraswarm.kernels.triton import attention, attention_torch, warming
from loraswarm.kernels.triton.attention import attend_by_triton
from loraswarm.kernels.triton.attention_torch import TorchChoice
from loraswarm.kernels.triton.launch import DEVICE_TYPE, IS_INTERPRETED
from loraswarm.kernels.triton.warming import warm_up
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPE = torch.bfloat16


class Stand:
    """Computes by the reference what torch's arguments mean; `spoil` changes the result."""

    def __init__(self):
        self.calls = []
        self.spoil = lambda out, head_size: out

    def varlen_attn(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale,
        window_size,
        enable_gqa,
        seqused_k,
        block_table,
        num_splits,
    ):
        assert cu_seq_k is None
        assert enable_gqa
        assert num_splits == 1
        left, right = window_size
        assert right == 0
        kv = torch.stack((key.transpose(1, 2), value.transpose(1, 2)), dim=1)
        work = AttentionWork(
            *(numbers.cpu() for numbers in (cu_seq_q, seqused_k, block_table)), max_q, max_k
        )
        window = None if left < 0 else left + 1
        q_THE, pages = query.cpu(), kv[:, None].cpu()
        out = reference.paged_attention(q_THE, pages, 0, work, scale, window)
        self.calls.append(query.shape)
        return self.spoil(out.to(query.device), query.shape[2])


@pytest.fixture
def stand(monkeypatch) -> Stand:
    found = Stand()
    monkeypatch.setattr(varlen, "varlen_attn", found.varlen_attn)
    monkeypatch.setattr(attention_torch, "_missing", lambda: None)
    return found


@pytest.fixture
def choice(monkeypatch) -> TorchChoice:
    found = TorchChoice()
    monkeypatch.setattr(attention, "torch_choice", found)
    monkeypatch.setattr(warming, "torch_choice", found)
    return found


def attended(lengths, head_size, page_tokens=16):
    """The kernels' result and the reference's."""
    case = make_attention_case(DTYPE, lengths, (4, 2), head_size, page_tokens)
    work = case.work
    moved = AttentionWork(
        *(
            numbers.to(DEVICE_TYPE)
            for numbers in (work.query_starts, work.context_lens, work.page_table)
        ),
        work.max_query_tokens,
        work.max_context_tokens,
    )
    q_THE, pages = case.q_THE.to(DEVICE_TYPE), case.pages.to(DEVICE_TYPE)
    result = attention.paged_attention(q_THE, pages, 1, moved, head_size**-0.5, None)
    return result.cpu(), case.attend(reference)


def test_what_is_right_is_used_for_chunks_of_what_was_tried(stand, choice):
    line = choice.try_on(DTYPE, attend_by_triton)
    assert line.startswith("attention chunks=torch head_sizes=[64, 128] others=triton (torch ")
    stand.calls.clear()
    for lengths, head_size, page_tokens, is_theirs in (
        ([(5, 21), (1, 3)], 64, 16, True),
        ([(1, 21), (1, 3)], 64, 16, False),
        ([(5, 21)], 16, 16, False),
        ([(5, 21)], 64, 32, False),
    ):
        result, expected = attended(lengths, head_size, page_tokens)
        assert_close(result, expected, DTYPE)
        assert len(stand.calls) == is_theirs
        stand.calls.clear()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out, _: out + 0.1, "its attention is not ours at head size"),
        (lambda out, _: out * float("nan"), "its attention is not ours at head size"),
        (lambda out, _: out * (1.0 + 0.015 * torch.rand(()).item()), "differs from run to run"),
    ],
)
def test_what_is_wrong_is_not_used(stand, choice, spoil, reason):
    stand.spoil = spoil
    torch.manual_seed(0)
    line = choice.try_on(DTYPE, attend_by_triton)
    assert line.startswith("attention chunks=triton decode=triton (torch ")
    assert reason in line
    stand.calls.clear()
    result, expected = attended([(5, 21)], 64)
    assert_close(result, expected, DTYPE)
    assert not stand.calls


def test_a_head_size_that_torch_refuses_stays_with_our_kernels(stand, choice):
    def spoil(out, head_size):
        if head_size == 64:
            raise RuntimeError("no kernel of this size\nwith more lines")
        return out

    stand.spoil = spoil
    assert "chunks=torch head_sizes=[128]" in choice.try_on(DTYPE, attend_by_triton)


def test_what_torch_lacks_is_said(choice, monkeypatch):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
        raise AssertionError("must not be called")

    monkeypatch.setattr(varlen, "varlen_attn", older)
    monkeypatch.setattr(attention_torch, "DEVICE_TYPE", "cuda")
    line = choice.try_on(DTYPE, attend_by_triton)
    assert "varlen_attn takes no enable_gqa, seqused_k, block_table, num_splits" in line


def test_the_start_says_which_attention_is_used(choice):
    lines = []
    warm_up("bfloat16", lines.append)
    chosen = [line for line in lines if line.startswith("attention chunks=")]
    assert len(chosen) == 1
    assert torch.__version__ in chosen[0]
    if IS_INTERPRETED:
        assert "kernels are interpreted" in chosen[0]
