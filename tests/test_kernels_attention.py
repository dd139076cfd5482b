"""Paged attention and the writing of K and V equal the reference, and the reference plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_cases import BACKENDS, THREAD_COUNTS, make_attention_case, use_all_threads
from loraswarm.kernels import cpu, reference
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
DECODE_AND_PREFILL = [(1, 1), (1, 700), (5, 21), (37, 133), (3, 3), (1, 257)]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(
    ("heads", "head_size", "page_tokens"),
    [((14, 2), 64, 16), ((4, 4), 40, 32), ((8, 2), 128, 16), ((7, 1), 16, 32), ((40, 1), 20, 16)],
)
def test_attention_equals_reference(heads, head_size, page_tokens, window, dtype):
    case = make_attention_case(dtype, DECODE_AND_PREFILL, heads, head_size, page_tokens)
    result = case.attend(cpu, window)
    assert result.isfinite().all()
    assert_close(result, case.attend(reference, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize(("heads", "head_size"), [((7, 1), 64), ((2, 2), 33), ((3, 1), 256)])
def test_many_rows_and_keys_equal_reference(heads, head_size, window, dtype):
    case = make_attention_case(dtype, [(20, 2500), (1, 1030), (133, 133)], heads, head_size, 64)
    assert_close(case.attend(cpu, window), case.attend(reference, window), dtype)


def test_an_odd_number_of_tokens_per_page_equals_reference():
    case = make_attention_case(torch.bfloat16, DECODE_AND_PREFILL, page_tokens=5)
    assert_close(case.attend(cpu), case.attend(reference), torch.bfloat16)


def test_a_token_attends_alike_whoever_is_beside_it():
    alone = make_attention_case(torch.bfloat16, [(1, 700)])
    many = make_attention_case(torch.bfloat16, [(1, 700), (37, 133), (1, 9)])
    (k_KCE, v_KCE), page_tokens = alone.contiguous[0], many.pages.shape[4]
    for token in range(700):
        page = int(many.work.page_table[0, token // page_tokens])
        many.pages[page, 1, 0, :, token % page_tokens] = k_KCE[:, token]
        many.pages[page, 1, 1, :, token % page_tokens] = v_KCE[:, token]
    many.q_THE[0] = alone.q_THE[0]
    assert torch.equal(many.attend(cpu)[0], alone.attend(cpu)[0])


def test_calls_of_one_recording_do_not_disturb_each_other():
    case = make_attention_case(torch.bfloat16, DECODE_AND_PREFILL)
    other = make_attention_case(torch.bfloat16, [(1, 600), (2, 700)], seed=1)
    expected = [case.attend(cpu), case.attend(cpu, 50), other.attend(cpu), case.attend(cpu)]
    assert not torch.equal(expected[0], expected[1])
    with cpu.recording():
        results = [case.attend(cpu), case.attend(cpu, 50), other.attend(cpu), case.attend(cpu)]
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


def test_heads_that_no_scratch_memory_holds_are_refused():
    case = make_attention_case(torch.bfloat16, [(1, 3)], (1, 1), head_size=2048)
    with pytest.raises(ValueError, match="2048"):
        case.attend(cpu)


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)])
def test_reference_attention_equals_torch_on_contiguous_data(heads, window):
    lengths = [(1, 70), (12, 12), (33, 133)]
    case = make_attention_case(torch.float32, lengths, heads, 40)
    result = case.attend(reference, window)
    for row, (new, context) in enumerate(lengths):
        begin = int(case.work.query_starts[row])
        k_KCE, v_KCE = case.contiguous[row]
        position = torch.arange(context - new, context)[:, None]
        key = torch.arange(context)[None]
        visible = (key <= position) & (key > position - (window or context))
        expected_HTE = scaled_dot_product_attention(
            case.q_THE[begin : begin + new].transpose(0, 1)[None],
            k_KCE[None],
            v_KCE[None],
            attn_mask=visible,
            enable_gqa=True,
        )[0]
        assert_close(result[begin : begin + new], expected_HTE.transpose(0, 1), torch.float32)


def test_attention_of_a_chunk_equals_that_of_the_whole_prompt():
    whole = make_attention_case(torch.float32, [(133, 133)])
    expected = whole.attend(cpu)
    for begin, end in ((0, 7), (7, 40), (40, 132), (132, 133)):
        work = dataclasses.replace(
            whole.work,
            query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
        )
        chunk = dataclasses.replace(whole, q_THE=whole.q_THE[begin:end], work=work)
        assert_close(chunk.attend(cpu), expected[begin:end], torch.float32)


def test_scores_of_any_size_make_weights():
    case = make_attention_case(torch.float32, [(1, 600), (20, 90)])
    case.pages.mul_(200.0)
    assert_close(case.attend(cpu) / 200, case.attend(reference) / 200, torch.float32)


def test_keys_that_are_not_numbers_are_not_hidden():
    case = make_attention_case(torch.bfloat16, [(1, 90), (1, 90)])
    page = int(case.work.page_table[1, 2])
    case.pages[page, 1, 0, 0, 5] = float("nan")
    result = case.attend(cpu)
    assert result[1, :7].isnan().all()
    assert result[0].isfinite().all()
    assert result[1, 7:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_write_kv_stores_each_token_in_its_slot_and_nothing_else(backend, num_tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(5, 2, 2, 3, 16, 20, generator=generator).to(dtype)
    fused = torch.randn(num_tokens, 11, 20, generator=generator).to(dtype)
    k_TKE, v_TKE = fused[:, 2:8:2], fused[:, 8:]
    slots = torch.randperm(80, generator=generator)[:num_tokens]
    expected = pages.clone()
    for token, slot in enumerate(slots.tolist()):
        expected[slot // 16, 1, 0, :, slot % 16] = k_TKE[token]
        expected[slot // 16, 1, 1, :, slot % 16] = v_TKE[token]
    backend.write_kv_(pages, 1, k_TKE, v_TKE, slots)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_accept_a_page_buffer_with_gaps_between_pages(backend):
    case = make_attention_case(torch.bfloat16, DECODE_AND_PREFILL)
    expected = case.attend(backend)
    buffer = torch.full((case.pages.shape[0], case.pages[0].numel() + 24), float("nan"))
    buffer = buffer.to(torch.bfloat16)
    buffer[:, : case.pages[0].numel()] = case.pages.flatten(1)
    case.pages = buffer[:, : case.pages[0].numel()].unflatten(1, case.pages.shape[1:])
    assert torch.equal(case.attend(backend), expected)
    new_TKE = torch.ones(1, 2, 64, dtype=torch.bfloat16)
    backend.write_kv_(case.pages, 0, new_TKE, new_TKE * 2, torch.tensor([35]))
    assert (case.pages[2, 0, 1, :, 3] == 2).all()
    assert buffer[:, -24:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_equal_bit_for_bit_for_any_number_of_threads(dtype):
    case = make_attention_case(dtype, DECODE_AND_PREFILL)
    cpu.set_num_threads(1)
    expected = case.attend(cpu, window=400)
    for count in [*THREAD_COUNTS, *THREAD_COUNTS]:
        cpu.set_num_threads(count)
        assert torch.equal(case.attend(cpu, window=400), expected)
