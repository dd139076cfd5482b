"""Wrong arguments of a kernel raise ValueError that names them, and nothing is written."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernel_cases import (
    BACKENDS,
    FIRST_SITE,
    make_attention_case,
    make_general_case,
    make_lora_case,
    use_all_threads,
)
from loraswarm.kernels import cpu, reference
from tile_factory import SiteWeights, TilePool

SEGMENTS = [("adapter0", 3), (None, 4), ("adapter3", 7)]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


def replaced(name):
    """A change of one field of a dataclass."""
    return lambda change: lambda old: dataclasses.replace(old, **{name: change(getattr(old, name))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x_TI", torch.Tensor.float, "pool is"),
        ("x_TI", lambda x: x.T.contiguous().T, "x_TI"),
        ("pool", lambda pool: pool[None], "pool"),
        ("first_site", lambda site: 3, "sites"),
        ("tiles", replaced("segments")(lambda segments: segments[:-1]), "tiles"),
    ],
)
def test_wrong_arguments_of_shrink_are_named(backend, name, change, message):
    case = make_lora_case(torch.bfloat16, SEGMENTS)
    arguments = {"x_TI": case.x_TI, "pool": case.pool, "tiles": case.tiles}
    arguments |= {"first_site": FIRST_SITE, "num_parts": case.num_parts}
    with pytest.raises(ValueError, match=message):
        backend.lora_shrink(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("y_TO", torch.Tensor.float, "pool is"),
        ("y_TO", lambda y: y.T.contiguous().T, "y_TO"),
        ("y_TO", lambda y: y[:-1], "numbers of tokens"),
        ("h_QTR", lambda h: h.to(torch.bfloat16), "h_QTR"),
        ("h_QTR", lambda h: h[:2], "out_bounds"),
        ("h_QTR", lambda h: h[:, :, ::2], "h_QTR"),
        ("out_bounds", lambda bounds: (*bounds[:-1], bounds[-1] - 1), "out_bounds"),
        ("out_bounds", lambda bounds: (0, bounds[2], bounds[1], bounds[3]), "out_bounds"),
        ("first_site", lambda site: 2, "sites"),
        ("pool", lambda pool: pool[None], "pool"),
        ("tiles", replaced("segments")(lambda segments: segments[:-1]), "tiles"),
        ("tiles", replaced("gain_offset")(lambda offset: offset[:, :-1]), "gain_offset"),
    ],
)
def test_wrong_arguments_of_expand_are_named(backend, name, change, message):
    case = make_lora_case(torch.bfloat16, SEGMENTS)
    arguments = {"y_TO": case.y_TO, "h_QTR": case.shrink(reference), "pool": case.pool}
    arguments |= {"tiles": case.tiles, "first_site": FIRST_SITE, "out_bounds": case.out_bounds}
    arguments[name] = change(arguments[name])
    before = arguments["y_TO"].clone()
    with pytest.raises(ValueError, match=message):
        backend.lora_expand_(**arguments)
    assert torch.equal(arguments["y_TO"], before)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("bt_offset", lambda offset: offset + 10**6, "bt_offset"),
        ("bt_offset", lambda offset: offset - 10**6, "bt_offset"),
        ("ranks", lambda ranks: ranks * 0, "ranks"),
        ("ranks", lambda ranks: ranks + 16, "ranks"),
        ("ranges", lambda ranges: ranges + 100, "ranges"),
        ("ranges", lambda ranges: ranges - 1, "ranges"),
        ("segments", lambda segments: segments + 1, "segments"),
        ("segments", lambda segments: segments[[0, 2, 1, 3, 4]], "ascend"),
        ("bt_stride", lambda stride: stride * 0 + 12, "bt_stride"),
        ("bt_stride", lambda stride: stride - 10**6, "bt_stride"),
        ("bt_stride", lambda stride: stride + 10**6, "bt_offset"),
        ("bt_stride", lambda stride: stride[:-1], "bt_stride"),
        ("ranks", lambda ranks: ranks[:-1], "ranks"),
        ("scale", lambda scale: scale[:-1], "scale"),
        ("u_offset", lambda offset: offset[:-1], "u_offset"),
        ("u_offset", lambda offset: offset + 10**6, "u_offset"),
        ("u_offset", lambda offset: offset * 0 - 2, "u_offset"),
        ("v_offset", lambda offset: offset[:-1], "v_offset"),
        ("v_offset", lambda offset: offset + 10**6, "v_offset"),
        ("v_offset", lambda offset: offset * 0 - 2, "v_offset"),
        ("gain_offset", lambda offset: offset + 10**6, "gain_offset"),
        ("gain_offset", lambda offset: offset * 0 - 2, "gain_offset"),
    ],
)
def test_a_table_that_leads_outside_of_its_tensors_is_refused(field, change, message):
    case = make_general_case(torch.bfloat16, SEGMENTS)
    h_QTR = case.shrink(cpu)
    case.tiles = replaced(field)(change)(case.tiles)
    before = case.y_TO.clone()
    with pytest.raises(ValueError, match=message):
        cpu.lora_expand_(case.y_TO, h_QTR, case.pool, case.tiles, FIRST_SITE, case.out_bounds)
    assert torch.equal(case.y_TO, before)


def test_absent_vectors_are_no_error_in_a_pool_smaller_than_one():
    pool = TilePool({"a": {0: SiteWeights(torch.ones(1, 3), torch.ones(133, 1))}}, torch.bfloat16)
    assert pool.pool.view(torch.float32).numel() < 133
    y_TO = torch.zeros(2, 133, dtype=torch.bfloat16)
    h_QTR = torch.ones(1, 2, 16)
    cpu.lora_expand_(y_TO, h_QTR, pool.pool, pool.table(1, [("a", 2)]), 0, (0, 133))
    assert torch.equal(y_TO, torch.ones_like(y_TO))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("field", "size"), [("u_offset", 16), ("v_offset", 162), ("gain_offset", 162)]
)
def test_a_vector_may_end_where_the_pool_ends_and_no_later(field, size, dtype):
    case = make_general_case(dtype, [("adapter0", 3)], out_sizes=(162,))
    num_floats = case.pool.view(torch.float32).numel()
    h_QTR = case.shrink(cpu)
    offset = torch.full_like(getattr(case.tiles, field), num_floats - size)
    case.tiles = dataclasses.replace(case.tiles, **{field: offset})
    case.expanded(cpu, h_QTR)
    case.tiles = dataclasses.replace(case.tiles, **{field: offset + 1})
    with pytest.raises(ValueError, match=field):
        case.expanded(cpu, h_QTR)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("a_offset", lambda offset: offset + 10**6, "a_offset"),
        ("a_offset", lambda offset: offset - 10**6, "a_offset"),
        ("a_stride", lambda stride: stride * 0 + 36, "a_stride"),
        ("a_stride", lambda stride: stride + 10**6, "a_offset"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_outside_of_the_pool_are_refused(backend, field, change, message):
    case = make_general_case(torch.bfloat16, SEGMENTS)
    case.tiles = replaced(field)(change)(case.tiles)
    with pytest.raises(ValueError, match=message):
        case.shrink(backend)


def test_h_with_fewer_columns_than_the_tiles_is_refused():
    case = make_lora_case(torch.bfloat16, SEGMENTS)
    h_QTR = case.shrink(cpu)[:, :, :16].contiguous()
    with pytest.raises(ValueError, match="h_QTR"):
        case.expanded(cpu, h_QTR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_THE", lambda q: q[:, :13], "query heads"),
        ("q_THE", lambda q: q[..., :32], "head size"),
        ("q_THE", torch.Tensor.float, "q_THE is"),
        ("pages", lambda pages: pages[0], "pages"),
        ("work", replaced("context_lens")(lambda lens: lens[:-1]), "query_starts"),
        ("window", lambda window: 0, "window"),
    ],
)
def test_wrong_arguments_of_attention_are_named(backend, name, change, message):
    case = make_attention_case(torch.bfloat16, [(1, 30), (4, 9)])
    arguments = {"q_THE": case.q_THE, "pages": case.pages, "layer": 1, "work": case.work}
    arguments |= {"scale": 1.0, "window": None}
    with pytest.raises(ValueError, match=message):
        backend.paged_attention(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("page_table", lambda table: table + 100, "page_table"),
        ("page_table", lambda table: table - 100, "page_table"),
        ("page_table", lambda table: table[:, :1].contiguous(), "page_table"),
        ("query_starts", lambda starts: starts + 1, "query_starts"),
        ("query_starts", lambda starts: starts.flip(0), "query_starts"),
        ("context_lens", lambda lens: lens - 8, "context_lens"),
    ],
)
def test_work_that_leads_outside_of_the_pages_is_refused(field, change, message):
    case = make_attention_case(torch.bfloat16, [(1, 30), (4, 9)])
    case.work = replaced(field)(change)(case.work)
    with pytest.raises(ValueError, match=message):
        case.attend(cpu)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_the_pages_do_not_have_is_refused(layer):
    case = make_attention_case(torch.bfloat16, [(1, 30)])
    case.layer = layer
    with pytest.raises(ValueError, match="layer"):
        case.attend(cpu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k_TKE", lambda k: k[:, :1], "k_TKE"),
        ("v_TKE", lambda v: v[:2], "v_TKE"),
        ("k_TKE", torch.Tensor.float, "dtype"),
        ("slots_T", lambda slots: slots[:2], "slots_T"),
        ("slots_T", torch.Tensor.int, "slots_T"),
        ("pages", lambda pages: pages[0], "pages"),
    ],
)
def test_wrong_arguments_of_write_kv_are_named(backend, name, change, message):
    arguments = write_arguments()
    before = arguments["pages"].clone()
    with pytest.raises(ValueError, match=message):
        backend.write_kv_(**arguments | {name: change(arguments[name])})
    assert torch.equal(arguments["pages"], before)


@pytest.mark.parametrize("slot", [-1, 64])
def test_a_slot_outside_of_the_pages_is_refused_before_anything_is_written(slot):
    arguments = write_arguments()
    arguments["slots_T"][2] = slot
    with pytest.raises(ValueError, match="slots_T"):
        cpu.write_kv_(**arguments)
    assert not arguments["pages"].any()


def write_arguments():
    ones_TKE = torch.ones(3, 2, 20, dtype=torch.bfloat16)
    pages = torch.zeros(4, 2, 2, 2, 16, 20, dtype=torch.bfloat16)
    slots_T = torch.tensor([1, 40, 7])
    return {"pages": pages, "layer": 1, "k_TKE": ones_TKE, "v_TKE": ones_TKE, "slots_T": slots_T}


def test_types_that_the_cpu_kernels_do_not_know_are_named():
    with pytest.raises(ValueError, match="float64"):
        make_lora_case(torch.float64, SEGMENTS).shrink(cpu)
    case = make_attention_case(torch.bfloat16, [(1, 30)])
    case.pages, case.q_THE = case.pages.to("meta"), case.q_THE.to("meta")
    with pytest.raises(ValueError, match="meta"):
        case.attend(cpu)


@pytest.mark.parametrize("num_threads", [0, -1, 10**6])
def test_an_impossible_number_of_threads_is_refused(num_threads):
    with pytest.raises(ValueError, match=str(num_threads)):
        cpu.set_num_threads(num_threads)
    case = make_lora_case(torch.bfloat16, SEGMENTS)
    assert torch.equal(case.expanded(cpu, case.shrink(cpu)), case.expanded(cpu, case.shrink(cpu)))


def test_warm_up_reports_each_kernel_once():
    lines = []
    cpu.warm_up("bfloat16", lines.append)
    kernels = ("lora_shrink", "lora_expand_", "write_kv_", "paged_attention")
    assert lines == [f"{kernel} bfloat16" for kernel in kernels]
