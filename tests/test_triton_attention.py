"""Triton's paged attention equals the reference: on a CUDA device, or interpreted on the CPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from kernel_cases import AttentionCase, make_attention_case
from loraswarm.kernels import AttentionWork, reference
from loraswarm.kernels.triton import attention, attention_decode, attention_prefill
from loraswarm.kernels.triton.attention_blocks import block_keys
from loraswarm.kernels.triton.launch import DEVICE_TYPE
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
DECODE = [(1, 1), (1, 133), (1, 16), (1, 67)]
MIXED = [(1, 1), (1, 133), (5, 21), (37, 133), (3, 3), (1, 67)]
SHAPES = [((14, 2), 64, 16), ((2, 2), 80, 32), ((4, 1), 128, 16), ((3, 1), 16, 5), ((40, 1), 20, 1)]

pytestmark = pytest.mark.usefixtures("interpreted_triton")


def moved(tensor: Tensor) -> Tensor:
    """The same view of a copy of its storage where the kernels run."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(DEVICE_TYPE).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def moved_work(case: AttentionCase) -> AttentionWork:
    names = ("query_starts", "context_lens", "page_table")
    return dataclasses.replace(
        case.work, **{name: moved(getattr(case.work, name)) for name in names}
    )


def attend(case: AttentionCase, window: int | None = None) -> Tensor:
    """The kernels' result on the host."""
    work = moved_work(case)
    return (
        dataclasses.replace(case, q_THE=moved(case.q_THE), pages=moved(case.pages), work=work)
        .attend(attention, window)
        .cpu()
    )


def with_work(case: AttentionCase, **changes) -> AttentionCase:
    return dataclasses.replace(case, work=dataclasses.replace(case.work, **changes))


@pytest.fixture
def use_splits(monkeypatch):
    """Cut every context into so many shares."""
    return lambda count: monkeypatch.setattr(attention_decode, "num_splits", lambda *_: count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("heads", "head_size", "page_tokens"), SHAPES)
def test_mixed_batches_equal_reference(heads, head_size, page_tokens, window, dtype):
    case = make_attention_case(dtype, MIXED, heads, head_size, page_tokens)
    result = attend(case, window)
    assert result.is_contiguous()
    assert result.isfinite().all()
    assert_close(result, case.attend(reference, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize(("heads", "head_size", "page_tokens"), [SHAPES[0], SHAPES[3]])
def test_decode_equals_reference_whatever_the_splits(
    heads, head_size, page_tokens, splits, window, dtype, use_splits
):
    use_splits(splits)
    case = make_attention_case(dtype, DECODE, heads, head_size, page_tokens)
    result = attend(case, window)
    assert result.isfinite().all()
    assert_close(result, case.attend(reference, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), [((3, 1), 256), ((2, 2), 33), ((1, 1), 1)])
def test_heads_of_any_size_equal_reference(heads, head_size, dtype):
    case = make_attention_case(dtype, [(20, 90), (1, 70), (7, 7)], heads, head_size, 64)
    assert_close(attend(case, 40), case.attend(reference, 40), dtype)


def test_chunks_longer_than_a_block_of_rows_equal_reference():
    case = make_attention_case(torch.float16, [(133, 400), (140, 140)], (2, 2), 16)
    assert attention_prefill.block_rows(1, 140, 2) < 133
    for window in (None, 7, 300):
        assert_close(attend(case, window), case.attend(reference, window), torch.float16)


def test_more_sequences_than_are_searched_at_a_time_equal_reference():
    lengths = [(1 + index % 3, 3 + index % 4) for index in range(133)]
    case = make_attention_case(torch.float16, lengths, (2, 1), 16)
    assert len(lengths) > attention_prefill.SEARCH_BLOCK
    assert_close(attend(case), case.attend(reference), torch.float16)


def test_weights_keep_more_bits_than_values_have():
    case = make_attention_case(torch.bfloat16, [(1, 133), (3, 133)], (2, 1), 16)
    case.pages.abs_()
    case = dataclasses.replace(case, q_THE=case.q_THE.clone())
    exact = case.attend(reference)
    wrong = (attend(case).float() - exact.float()).abs()
    # One unit in the last place of bfloat16, for a sum that lies where two numbers are as near.
    assert (wrong <= exact.float().abs() * 2**-7).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_a_token_attends_alike_whoever_is_beside_it(splits, use_splits):
    use_splits(splits)
    alone = make_attention_case(torch.bfloat16, [(1, 133)])
    many = make_attention_case(torch.bfloat16, [(1, 133), (37, 50), (1, 9)])
    (k_KCE, v_KCE), page_tokens = alone.contiguous[0], many.pages.shape[4]
    for token in range(133):
        page = int(many.work.page_table[0, token // page_tokens])
        many.pages[page, 1, 0, :, token % page_tokens] = k_KCE[:, token]
        many.pages[page, 1, 1, :, token % page_tokens] = v_KCE[:, token]
    many.q_THE[0] = alone.q_THE[0]
    together = attend(many)
    assert torch.equal(together[0], attend(alone)[0])
    assert not torch.equal(together[0], together[-1])


def test_two_runs_are_equal_bit_for_bit(use_splits):
    use_splits(4)
    case = make_attention_case(torch.bfloat16, MIXED, (7, 1))
    assert torch.equal(attend(case, 60), attend(case, 60))


def test_attention_of_a_chunk_equals_that_of_the_whole_prompt():
    whole = make_attention_case(torch.float32, [(133, 133)], (2, 1), 16)
    expected = attend(whole)
    for begin, end in itertools.pairwise((0, 7, 40, 132, 133)):
        chunk = with_work(
            dataclasses.replace(whole, q_THE=whole.q_THE[begin:end]),
            query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
        )
        assert_close(attend(chunk), expected[begin:end], torch.float32)


def test_a_sequence_of_one_token_equals_reference_when_more_were_announced():
    case = make_attention_case(torch.float32, [(1, 90)], (2, 1), 16)
    announced = with_work(case, max_query_tokens=8, max_context_tokens=1000)
    assert_close(attend(announced), case.attend(reference), torch.float32)


def test_a_longer_context_than_any_may_be_announced(use_splits):
    case = make_attention_case(torch.float32, DECODE, (2, 1), 16)
    announced = with_work(case, max_context_tokens=100_000)
    assert_close(attend(announced), case.attend(reference), torch.float32)
    use_splits(8)
    assert_close(attend(announced), case.attend(reference), torch.float32)


@pytest.mark.parametrize("lengths", [DECODE, MIXED])
@pytest.mark.parametrize("splits", [1, 4])
def test_padding_sequences_and_tokens_change_nothing(lengths, splits, use_splits):
    use_splits(splits)
    case = make_attention_case(torch.bfloat16, lengths, (7, 1), 16)
    expected, num_tokens = attend(case), case.q_THE.shape[0]
    work, padding = case.work, 5
    more = 1 if work.max_query_tokens == 1 else 3
    starts = work.query_starts[-1] + more * torch.arange(1, padding + 1, dtype=torch.int32)
    q_THE = torch.full((num_tokens + more * padding + 2, 7, 16), float("nan")).bfloat16()
    q_THE[:num_tokens] = case.q_THE
    padded = with_work(
        dataclasses.replace(case, q_THE=q_THE),
        query_starts=torch.cat([work.query_starts, starts]),
        context_lens=torch.cat([work.context_lens, torch.zeros(padding, dtype=torch.int32)]),
        page_table=torch.cat([work.page_table, work.page_table.new_zeros(padding, 9)]),
    )
    assert torch.equal(attend(padded)[:num_tokens], expected)


def test_tokens_of_no_sequence_change_nothing():
    case = make_attention_case(torch.bfloat16, [(3, 20), (2, 9)], (7, 1), 16)
    longer = dataclasses.replace(case, q_THE=torch.cat([case.q_THE, case.q_THE]))
    assert torch.equal(attend(longer)[:5], attend(case))


def test_scores_of_any_size_make_weights(use_splits):
    case = make_attention_case(torch.float32, [(1, 133), (20, 90)], (2, 1))
    case.pages.mul_(200.0)
    for splits in (1, 4):
        use_splits(splits)
        assert_close(attend(case) / 200, case.attend(reference) / 200, torch.float32)


@pytest.mark.parametrize("lengths", [(1, 133), (5, 133)])
def test_tokens_before_every_window_are_not_read(lengths):
    case = make_attention_case(torch.bfloat16, [lengths, lengths], (2, 1), 16)
    expected = attend(case, 50)
    first_key = 133 - lengths[0] - 49
    for page, token in itertools.product(range(first_key // 16 + 1), range(16)):
        if page * 16 + token < first_key:
            case.pages[case.work.page_table[:, page].long(), :, :, :, token] = float("nan")
    assert torch.equal(attend(case, 50), expected)
    assert not torch.equal(attend(case, 60)[:1], expected[:1])


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("lengths", [[(1, 90), (1, 90)], [(1, 90), (3, 90)]])
def test_keys_that_are_not_numbers_are_not_hidden(lengths, splits, use_splits):
    use_splits(splits)
    case = make_attention_case(torch.bfloat16, lengths)
    page = int(case.work.page_table[1, 2])
    case.pages[page, 1, 0, 0, 5] = float("nan")
    result = attend(case)
    assert result[1:, :7].isnan().all()
    assert result[0].isfinite().all()
    assert result[1:, 7:].isfinite().all()


def test_pages_may_have_gaps_between_them():
    case = make_attention_case(torch.bfloat16, MIXED, (2, 1), 16)
    expected = attend(case)
    size = case.pages[0].numel()
    buffer = torch.full((case.pages.shape[0], size + 24), float("nan")).bfloat16()
    buffer[:, :size] = case.pages.flatten(1)
    case.pages = buffer[:, :size].unflatten(1, case.pages.shape[1:])
    assert torch.equal(attend(case), expected)


def test_a_batch_of_no_tokens_gives_no_rows():
    case = make_attention_case(torch.bfloat16, [(2, 9)])
    empty = with_work(
        dataclasses.replace(case, q_THE=case.q_THE[:0]),
        query_starts=torch.zeros(1, dtype=torch.int32),
        context_lens=case.work.context_lens[:0],
        page_table=case.work.page_table[:0],
    )
    assert attend(empty).shape == (0, 14, 64)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_THE", lambda q: q[:, :13], "query heads"),
        ("q_THE", lambda q: q[..., :32], "head size"),
        ("q_THE", Tensor.float, "q_THE is"),
        ("q_THE", lambda q: q.mT.contiguous().mT, "q_THE has strides"),
        ("q_THE", lambda q: q.to("meta"), "q_THE is on meta"),
        ("pages", lambda pages: pages[0], "pages"),
        ("pages", lambda pages: pages.mT.contiguous().mT, "pages have strides"),
        ("pages", lambda pages: pages.to("meta"), "pages is on meta"),
        ("layer", lambda layer: 2, "layer is 2"),
        ("layer", lambda layer: -1, "layer is -1"),
        ("window", lambda window: 0, "window"),
    ],
)
def test_wrong_arguments_are_named(name, change, message):
    case = make_attention_case(torch.bfloat16, [(1, 30), (4, 9)])
    arguments = {"q_THE": moved(case.q_THE), "pages": moved(case.pages), "layer": 1}
    arguments |= {"work": moved_work(case), "scale": 1.0, "window": None}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        attention.paged_attention(**arguments)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("context_lens", lambda lens: lens[:-1], "query_starts"),
        ("context_lens", Tensor.long, "context_lens"),
        ("query_starts", Tensor.long, "query_starts"),
        ("query_starts", lambda starts: starts.to("meta"), "query_starts is on meta"),
        ("page_table", Tensor.long, "page_table"),
        ("page_table", lambda table: table[:, :1], "page_table"),
    ],
)
def test_wrong_work_is_named(field, change, message):
    case = make_attention_case(torch.bfloat16, [(1, 30), (4, 9)])
    work = moved_work(case)
    work = dataclasses.replace(work, **{field: change(getattr(work, field))})
    q_THE, pages = moved(case.q_THE), moved(case.pages)
    with pytest.raises(ValueError, match=message):
        attention.paged_attention(q_THE, pages, 1, work, 1.0, None)


@pytest.mark.parametrize(
    ("dtype", "head_size", "message"),
    [
        (torch.float64, 64, "float64"),
        (torch.bfloat16, 257, "257"),
    ],
)
def test_types_and_heads_that_the_kernels_do_not_know_are_named(dtype, head_size, message):
    case = make_attention_case(dtype, [(1, 3)], (1, 1), head_size)
    with pytest.raises(ValueError, match=message):
        attend(case)


def test_splits_are_few_powers_of_two_that_fill_the_device_and_no_more():
    found = {
        attention_decode.num_splits(programs, context, 132)
        for programs in range(1, 600)
        for context in (0, 1, 127, 128, 1000, 4096, 131_072)
    }
    assert found == {1, 2, 4, 8, 16, 32, 64}
    assert attention_decode.num_splits(8, 131_072, 132) == 32
    assert attention_decode.num_splits(8, 1024, 132) == 8
    assert attention_decode.num_splits(8, 255, 132) == 1
    assert attention_decode.num_splits(256, 131_072, 132) == 1


def test_blocks_are_of_few_sizes():
    keys = {block_keys(size, item, 128) for size in range(1, 257) for item in (2, 4)}
    assert keys == {16, 32, 64, 128}
    rows = {
        attention_prefill.block_rows(group, tokens, item)
        for group in range(1, 17)
        for tokens in range(2, 300)
        for item in (2, 4)
    }
    assert rows == {16, 64, 128}
