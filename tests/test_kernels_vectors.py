"""Tiles with vectors and shared matrices, and gains with or without tiles, in one batch.

The reference equals the formula on the adapters' own matrices; the CPU kernels equal the reference.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernel_cases import (
    BACKENDS,
    FIRST_SITE,
    KINDS,
    THREAD_COUNTS,
    make_general_case,
    make_lora_case,
    segments_of,
    use_all_threads,
)
from loraswarm.kernels import cpu, reference
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
MIXED = [
    ("adapter0", 9),
    (None, 4),
    ("adapter2", 1),
    ("adapter3", 33),
    ("adapter4", 2, "adapter2"),
    ("adapter5", 1, "adapter4", "adapter9"),
    ("adapter6", 7),
    ("adapter7", 1),
    ("adapter9", 3),
]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


def formula(case):
    """y = g * (y + sum of v * (B (scale * u * (A x)))) + c, from the adapters' matrices."""
    y_TO = case.y_TO.float().clone()
    dtype = case.x_TI.dtype
    begin = 0
    for first, count, *others in case.segments:
        tokens = slice(begin, begin + count)
        begin += count
        for part in range(case.num_parts):
            columns = slice(case.out_bounds[part], case.out_bounds[part + 1])
            for name in (first, *others):
                weights = case.adapters.get(name, {}).get(FIRST_SITE + part)
                if weights is not None and weights.a is not None:
                    update = part_update(weights, case.x_TI[tokens], dtype)
                    y_TO[tokens, columns] += update[:, : columns.stop - columns.start]
            weights = case.adapters.get(first, {}).get(FIRST_SITE + part)
            if weights is not None and weights.g is not None:
                y_TO[tokens, columns] *= weights.g
            if weights is not None and weights.c is not None:
                y_TO[tokens, columns] += weights.c
    return y_TO


def part_update(weights, x_TI, dtype):
    a_RI = weights.a.to(dtype).float()[:, : x_TI.shape[1]]
    b_OR = weights.b.to(dtype).float()
    u = torch.ones(a_RI.shape[0]) if weights.u is None else weights.u
    update_TO = (weights.scale * u * (x_TI.float() @ a_RI.T)) @ b_OR.T
    return update_TO if weights.v is None else weights.v * update_TO[:, : weights.v.shape[0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_equal_the_formula(backend, dtype):
    case = make_general_case(dtype, MIXED)
    result = case.expanded(backend, case.shrink(backend))
    assert_close(result, formula(case), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_each_kind_alone_equals_the_formula_and_differs_from_the_base(backend, number):
    case = make_general_case(torch.float32, [(f"adapter{number}", 7)])
    result = case.expanded(backend, case.shrink(backend))
    assert_close(result, formula(case), torch.float32)
    first_part = slice(case.out_bounds[1])
    assert not torch.isclose(result[:, first_part], case.y_TO[:, first_part]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 133])
@pytest.mark.parametrize("pattern", ["distinct", "zipf", "skewed"])
def test_cpu_equals_reference_for_every_popularity(pattern, num_tokens, dtype):
    case = make_general_case(dtype, segments_of(pattern, num_tokens))
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(cpu)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, (1,)), (16, (256, 64)), (300, (515, 7)), (999, (16, 1290))])
def test_cpu_equals_reference_for_every_width(sizes, dtype):
    in_features, out_sizes = sizes
    case = make_general_case(dtype, MIXED, in_features, out_sizes)
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(cpu)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("field", "first_token"),
    [("u_offset", 0), ("v_offset", 0), ("gain_offset", 0), ("u_offset", 14), ("v_offset", 47)],
)
def test_every_vector_counts(backend, field, first_token):
    case = make_general_case(torch.float32, MIXED)
    result = case.expanded(backend, case.shrink(backend))
    without = torch.full_like(getattr(case.tiles, field), -1)
    case.tiles = dataclasses.replace(case.tiles, **{field: without})
    other = case.expanded(backend, case.shrink(backend))
    assert not torch.isclose(result[first_token], other[first_token]).all()
    assert torch.equal(result[9:13], other[9:13])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gains_apply_where_no_segment_has_tiles(backend, dtype):
    case = make_general_case(dtype, [("adapter6", 3), (None, 2), ("adapter7", 1)])
    no_tiles = torch.zeros_like(case.tiles.ranges)
    no_gains = case.tiles.gain_offset.clone()
    no_gains[:, -1] = -1
    case.tiles = dataclasses.replace(
        case.tiles, ranges=no_tiles, gain_offset=no_gains, max_tiles=(0,) * len(no_tiles)
    )
    h_QTR = case.shrink(backend)
    assert h_QTR.shape == (3, 6, 0)
    result = case.expanded(backend, h_QTR)
    assert_close(result, formula(case), dtype)
    assert not torch.isclose(result[:3], case.y_TO[:3]).all()
    assert torch.equal(result[3:5], case.y_TO[3:5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_tile_and_no_gain_touches_keeps_its_bits(backend, dtype):
    case = make_general_case(dtype, [("adapter2", 9), (None, 4), ("adapter5", 3)])
    case.y_TO[9:13, ::2] = float("nan")
    case.y_TO[9:13, 1::2] = -0.0
    low = case.out_bounds[2]
    case.y_TO[:9, low:] = -0.0
    result = case.expanded(backend, case.shrink(backend)).view(torch.uint8)
    bits = case.y_TO.view(torch.uint8)
    low *= dtype.itemsize
    assert torch.equal(result[9:13], bits[9:13])
    assert torch.equal(result[:9, low:], bits[:9, low:])
    assert torch.equal(result[13:, low:], bits[13:, low:])
    assert not torch.equal(result[:9, :low], bits[:9, :low])
    assert not torch.equal(result[13:, :low], bits[13:, :low])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_is_rounded_once(backend):
    case = make_general_case(torch.bfloat16, [("adapter5", 5)], out_sizes=(300,))
    first, last = case.tiles.ranges[FIRST_SITE, 0].tolist()
    g_at, c_at = case.tiles.gain_offset[FIRST_SITE, 0].tolist()
    floats = case.pool.view(torch.float32)
    floats[g_at : g_at + 300], floats[c_at : c_at + 300] = 3.0, -3.0
    case.tiles.scale[:] = 1.0
    bt_at = int(case.tiles.bt_offset[first])
    case.pool[bt_at : bt_at + 300] = 1.0
    case.y_TO[:] = 1.0
    h_QTR = torch.zeros(1, 5, 16 * (last - first))
    h_QTR[:, :, 0] = 2.0**-9
    assert (1 + torch.full((), 2.0**-9)).bfloat16() == 1
    assert (case.expanded(backend, h_QTR) == 3 * 2.0**-9).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("field", ["u", "v", "g", "c"])
def test_vectors_that_are_not_numbers_stay_with_their_adapter(backend, field):
    segments = [("adapter0", 9), (None, 4), ("adapter2", 1), ("adapter3", 40), ("adapter9", 2)]
    case = make_general_case(torch.bfloat16, segments)
    expected = case.expanded(backend, case.shrink(backend))
    floats = case.pool.view(torch.float32)
    first = int(case.tiles.ranges[FIRST_SITE, 0, 0])
    offsets = {
        "u": int(case.tiles.u_offset[first]),
        "v": int(case.tiles.v_offset[first]),
        "g": int(case.tiles.gain_offset[FIRST_SITE, 0, 0]),
        "c": int(case.tiles.gain_offset[FIRST_SITE, 0, 1]),
    }
    floats[offsets[field]] = float("nan")
    result = case.expanded(backend, case.shrink(backend))
    assert torch.equal(result[9:], expected[9:])
    assert result[:9, 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch(dtype):
    case = make_general_case(dtype, MIXED, 300, (515, 7, 64))
    together = case.expanded(cpu, case.shrink(cpu))
    for token in (0, 8, 13, 30, 48, 49, 50, 57, 60):
        alone = case.alone(token)
        assert torch.equal(alone.expanded(cpu, alone.shrink(cpu))[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_equal_bit_for_bit_for_any_number_of_threads(dtype):
    case = make_general_case(dtype, MIXED, 300, (515, 7, 64))
    results = []
    for count in [*THREAD_COUNTS, *THREAD_COUNTS]:
        cpu.set_num_threads(count)
        results.append(case.expanded(cpu, case.shrink(cpu)))
    for y_TO in results[1:]:
        assert torch.equal(y_TO, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sites_that_share_matrices_point_at_the_same_elements(backend):
    case = make_general_case(torch.bfloat16, [("adapter0", 3), ("adapter2", 3)])
    first_tiles = case.tiles.ranges[FIRST_SITE : FIRST_SITE + 2, :2, 0].flatten().long()
    for offsets in (case.tiles.a_offset, case.tiles.bt_offset):
        assert len(set(offsets[first_tiles].tolist())) == 1
    assert (case.tiles.a_stride > 37).all()
    plain = make_lora_case(torch.bfloat16, [("adapter0", 3)])
    assert (plain.tiles.a_stride == 37).all()
    assert_close(case.expanded(backend, case.shrink(backend)), formula(case), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_tokens_is_left_as_it_is(backend):
    case = make_general_case(torch.bfloat16, [])
    assert case.expanded(backend, case.shrink(backend)).shape == (0, 162)
