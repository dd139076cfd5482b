"""The CPU kernels equal the reference on awkward batches, and the reference equals plain torch."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_cases import (
    BATCH_SIZES,
    FIRST_SITE,
    PATTERNS,
    make_attention_case,
    make_lora_case,
    segments_of,
)
from loraswarm.kernels import cpu, reference
from loraswarm.kernels.cpu import jit
from loraswarm.kernels.cpu.lora import crossover
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
BACKENDS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]
THREAD_COUNTS = [count for count in (1, 2, 4) if count <= len(os.sched_getaffinity(0))]
MIXED = [("adapter0", 9), (None, 4), ("adapter2", 1), ("adapter3", 40), ("adapter4", 2)]
DECODE_AND_PREFILL = [(1, 1), (1, 700), (5, 21), (37, 133), (3, 3), (1, 257)]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    """Even the smallest call is spread over threads, and no measured crossover takes part."""
    monkeypatch.setattr(jit, "PARALLEL_PRODUCTS", 0)
    monkeypatch.setattr(crossover, "_max_tokens", {})
    cpu.set_num_threads(THREAD_COUNTS[-1])
    yield
    cpu.set_num_threads(THREAD_COUNTS[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", BATCH_SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_equals_reference_for_every_popularity(pattern, num_tokens, dtype):
    case = make_lora_case(dtype, segments_of(pattern, num_tokens))
    expected_h = case.shrink(reference)
    h_QTR = case.shrink(cpu)
    assert_close(case.defined(h_QTR), case.defined(expected_h), torch.float32)
    expected = case.expanded(reference, expected_h)
    if any(name is not None for name, count in case.segments if count):
        assert not torch.equal(expected, case.y_TO)
    assert_close(case.expanded(cpu, h_QTR), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, (1,)), (16, (256, 64)), (300, (515, 7)), (999, (16, 1290))])
def test_lora_equals_reference_for_every_width(sizes, dtype):
    in_features, out_sizes = sizes
    case = make_lora_case(dtype, MIXED, in_features, out_sizes)
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(cpu)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_update_equals_the_formula_for_one_adapter(backend, dtype):
    case = make_lora_case(dtype, [("adapter3", 7)], out_sizes=(48,))
    first, last = case.tiles.ranges[FIRST_SITE, 0].tolist()
    expected = case.y_TO.float()
    for tile in range(first, last):
        ranks = int(case.tiles.ranks[tile])
        a_at, bt_at = int(case.tiles.a_offset[tile]), int(case.tiles.bt_offset[tile])
        a_RI = case.pool[a_at : a_at + ranks * 37].view(ranks, 37).float()
        bt_RO = case.pool[bt_at : bt_at + ranks * 48].view(ranks, 48).float()
        expected += float(case.tiles.scale[tile]) * (case.x_TI.float() @ a_RI.T @ bt_RO)
    assert last - first > 1
    assert_close(case.expanded(backend, case.shrink(backend)), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_tiles_keep_their_bits(backend, dtype):
    case = make_lora_case(dtype, MIXED)
    case.y_TO[9:13] = float("nan")
    bits = case.y_TO.view(torch.uint8)
    result = case.expanded(backend, case.shrink(backend)).view(torch.uint8)
    assert torch.equal(result[9:13], bits[9:13])
    assert not torch.equal(result[:9], bits[:9])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_an_adapter_does_not_have_keep_their_bits(backend):
    case = make_lora_case(torch.bfloat16, MIXED)
    result = case.expanded(backend, case.shrink(backend))
    low = case.out_bounds[2]
    assert torch.equal(result[13, low:], case.y_TO[13, low:])
    assert not torch.equal(result[13, :low], case.y_TO[13, :low])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_numbers_stay_with_their_adapter(backend, dtype):
    clean = make_lora_case(dtype, MIXED)
    poisoned = make_lora_case(dtype, MIXED, poisoned="adapter3")
    expected = clean.expanded(backend, clean.shrink(backend))
    result = poisoned.expanded(backend, poisoned.shrink(backend))
    others = [*range(14), 54, 55]
    assert torch.equal(result[others], expected[others])
    assert result[14:54].isnan().any(dim=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_a_number_stays_alone(backend, dtype):
    case = make_lora_case(dtype, MIXED)
    expected = case.expanded(backend, case.shrink(backend))
    case.x_TI[3] = float("nan")
    result = case.expanded(backend, case.shrink(backend))
    others = [*range(3), *range(4, 56)]
    assert torch.equal(result[others], expected[others])
    assert result[3, :61].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch(dtype):
    case = make_lora_case(dtype, MIXED)
    together = case.expanded(cpu, case.shrink(cpu))
    for token in (0, 8, 14, 53):
        name = "adapter0" if token < 9 else "adapter3"
        segment = 0 if token < 9 else 3
        alone = dataclasses.replace(
            case,
            x_TI=case.x_TI[token : token + 1],
            y_TO=case.y_TO[token : token + 1],
            tiles=dataclasses.replace(
                case.tiles,
                segments=torch.tensor([0, 1], dtype=torch.int32),
                ranges=case.tiles.ranges[:, segment : segment + 1].contiguous(),
            ),
            segments=[(name, 1)],
        )
        assert torch.equal(alone.expanded(cpu, alone.shrink(cpu))[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_equal_bit_for_bit_for_any_number_of_threads(dtype):
    lora = make_lora_case(dtype, MIXED, 300, (515, 7, 64))
    attention = make_attention_case(dtype, DECODE_AND_PREFILL)
    results = []
    for count in [*THREAD_COUNTS, *THREAD_COUNTS]:
        cpu.set_num_threads(count)
        h_QTR = lora.shrink(cpu)
        results.append(
            (lora.defined(h_QTR), lora.expanded(cpu, h_QTR), attention.attend(cpu, window=400))
        )
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_writes_only_its_columns_of_a_wider_tensor(backend, dtype):
    case = make_lora_case(dtype, MIXED)
    h_QTR = case.shrink(backend)
    wider = torch.full((56, case.y_TO.shape[1] + 20), 7.0, dtype=dtype)
    part = wider[:, 9 : 9 + case.y_TO.shape[1]]
    part.copy_(case.y_TO)
    backend.lora_expand_(part, h_QTR, case.pool, case.tiles, FIRST_SITE, case.out_bounds)
    assert torch.equal(part, case.expanded(backend, h_QTR))
    assert (wider[:, :9] == 7).all()
    assert (wider[:, -11:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_tokens", [0, 8, 39])
def test_segments_past_the_crossover_equal_reference(max_tokens, dtype):
    case = make_lora_case(dtype, MIXED)
    crossover.set_max_tokens(dtype, max_tokens)
    h_QTR = case.shrink(cpu)
    assert_close(case.defined(h_QTR), case.defined(case.shrink(reference)), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_rounded_to_nearest_even(backend, dtype):
    case = make_lora_case(dtype, [("adapter4", 515)], out_sizes=(1,))
    tile = int(case.tiles.ranges[FIRST_SITE, 0, 0])
    case.tiles.scale[:] = 1.0
    assert int(case.tiles.ranks[tile]) == 1
    case.pool[int(case.tiles.bt_offset[tile])] = 1.0
    exact = torch.randn(515, generator=torch.Generator().manual_seed(1)) * 100
    ties = torch.tensor([1.00390625, 1.01171875, 1.00048828125, 1.00146484375, -1.00390625])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, 65520.0, 1e-40])
    exact[:5], exact[5:11] = ties, special
    y_TO = torch.zeros(515, 1, dtype=dtype)
    h_QTR = torch.zeros(1, 515, 16)
    h_QTR[0, :, 0] = exact
    backend.lora_expand_(y_TO, h_QTR, case.pool, case.tiles, FIRST_SITE, (0, 1))
    torch.testing.assert_close(y_TO[:, 0], exact.to(dtype), rtol=0, atol=0, equal_nan=True)


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


def wrong_lora_arguments():
    case = make_lora_case(torch.bfloat16, MIXED)
    tiles, bounds = case.tiles, case.out_bounds
    common = ("pool", "first_site")
    good = {"y": case.y_TO, "h": case.shrink(reference), "pool": case.pool, "tiles": tiles}
    return case, good | {"first_site": FIRST_SITE, "out_bounds": bounds}, common


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("y", lambda y: y.float(), "pool is"),
        ("y", lambda y: y.T.contiguous().T, "y_TO"),
        ("y", lambda y: y[:-1], "h_QTR"),
        ("h", lambda h: h.to(torch.bfloat16), "h_QTR"),
        ("h", lambda h: h[:2], "out_bounds"),
        ("out_bounds", lambda bounds: (*bounds[:-1], bounds[-1] - 1), "out_bounds"),
        ("out_bounds", lambda bounds: (bounds[0], bounds[2], bounds[1], bounds[3]), "out_bounds"),
        ("first_site", lambda site: 2, "site"),
        ("pool", lambda pool: pool[None], "pool"),
    ],
)
def test_wrong_arguments_of_expand_are_named_and_nothing_is_written(backend, name, change, message):
    case, arguments, _ = wrong_lora_arguments()
    changed = arguments | {name: change(arguments[name])}
    y_TO = changed["y"]
    before = y_TO.clone()
    with pytest.raises(ValueError, match=message):
        backend.lora_expand_(
            y_TO,
            changed["h"],
            changed["pool"],
            changed["tiles"],
            changed["first_site"],
            changed["out_bounds"],
        )
    assert torch.equal(y_TO, before)
