"""Triton's rotation of q and k on their way into the pages equals the reference, bit for bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from loraswarm.kernels import HeadNorms, reference
from loraswarm.kernels.triton.launch import DEVICE_TYPE
from loraswarm.kernels.triton.rotating import heads_of_program, rotate_and_write_kv_, write_kv_
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
EPS = 1e-6
LAYER = 1
SHAPES = [((14, 2), 64, 16), ((4, 4), 80, 1), ((3, 1), 6, 16), ((2, 1), 16, 7), ((32, 8), 128, 16)]
"""(Query heads, kv heads), head size, tokens of a page; the last is of two programs a token."""


pytestmark = pytest.mark.usefixtures("interpreted_triton")


def make_case(dtype, num_tokens, shape=SHAPES[0]):
    """Arguments of `rotate_and_write_kv_` on the host: layer 1 of 3, more slots than tokens.

    The pages are NaN.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    (num_heads, num_kv_heads), size, page_tokens = shape
    num_pages = num_tokens // page_tokens + 2
    qkv_TNE = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, size, generator=generator)
    angles_T1F = torch.rand(num_tokens, 1, size // 2, generator=generator) * 100
    cos_T1F, sin_T1F = angles_T1F.cos().to(dtype), angles_T1F.sin().to(dtype)
    page_shape = (num_pages, 3, 2, num_kv_heads, page_tokens, size)
    return {
        "qkv_TNE": qkv_TNE.to(dtype),
        "num_heads": num_heads,
        "cos_T1E": torch.cat((cos_T1F, cos_T1F), dim=-1),
        "sin_T1E": torch.cat((-sin_T1F, sin_T1F), dim=-1),
        "pages": torch.full(page_shape, math.nan, dtype=dtype),
        "layer": LAYER,
        "slots_T": torch.randperm(num_pages * page_tokens, generator=generator)[:num_tokens],
    }


def make_norms(dtype, size):
    generator = torch.Generator().manual_seed(7)
    q_weight_E, k_weight_E = (torch.randn(2, size, generator=generator) + 1).to(dtype)
    return HeadNorms(q_weight_E, k_weight_E, EPS)


def copied(case, device="cpu"):
    return {
        name: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }


def results(case, rotate, norms=None, device="cpu"):
    """q [T, H, E], v [T, K, E] and the pages after `rotate`; the case stays as it is."""
    given = copied(case, device)
    if norms is not None:
        norms = HeadNorms(norms.q_weight_E.to(device), norms.k_weight_E.to(device), norms.eps)
    rotate(**given, norms=norms)
    qkv_TNE, num_kv_heads = given["qkv_TNE"].cpu(), case["pages"].shape[3]
    return qkv_TNE[:, : case["num_heads"]], qkv_TNE[:, -num_kv_heads:], given["pages"].cpu()


def rotated(case, norms=None):
    return results(case, rotate_and_write_kv_, norms, DEVICE_TYPE)


def expected_of(case, norms=None):
    return results(case, reference.rotate_and_write_kv_, norms)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_q_is_rotated_in_place_and_k_and_v_are_in_their_slots(shape, num_tokens, dtype):
    case = make_case(dtype, num_tokens, shape)
    q_THE, v_TKE, pages = rotated(case)
    expected_q_THE, _, expected_pages = expected_of(case)
    assert_same(q_THE, expected_q_THE)
    assert_same(pages, expected_pages)
    num_kv_heads = pages.shape[3]
    assert torch.equal(v_TKE, case["qkv_TNE"][:, -num_kv_heads:])
    assert not torch.equal(q_THE, case["qkv_TNE"][:, : case["num_heads"]])
    assert (~pages.isnan()).sum() == 2 * v_TKE.numel()


def test_many_tokens_are_rotated_each_by_its_own_angle():
    case = make_case(torch.bfloat16, 133)
    q_THE, _, pages = rotated(case)
    expected_q_THE, _, expected_pages = expected_of(case)
    assert_same(q_THE, expected_q_THE)
    assert_same(pages, expected_pages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_are_normalised_before_they_turn(shape, dtype):
    case, norms = make_case(dtype, 7, shape), make_norms(dtype, shape[1])
    q_THE, _, pages = rotated(case, norms)
    expected_q_THE, _, expected_pages = expected_of(case, norms)
    assert torch.equal(pages.isnan(), expected_pages.isnan())
    pairs = [(q_THE, expected_q_THE), (pages.nan_to_num(), expected_pages.nan_to_num())]
    for actual, expected in pairs:
        assert_close(actual, expected, dtype)
    if dtype != torch.float32:
        # sums of squares in another order move a rounding now and then
        num_other = sum((actual != expected).sum() for actual, expected in pairs)
        assert num_other <= 1 + expected_q_THE.numel() // 100
    assert not torch.equal(expected_q_THE, expected_of(case)[0])


def test_eps_is_added_to_the_mean_square_of_a_head():
    case, ones_E = make_case(torch.float32, 3), torch.ones(64)
    case["qkv_TNE"].fill_(1e-3)
    q_THE, _, _ = rotated(case, HeadNorms(ones_E, ones_E, 1e-6))
    case["qkv_TNE"].fill_(math.sqrt(0.5))
    assert_close(q_THE, expected_of(case)[0], torch.float32)


@pytest.mark.parametrize("has_norms", [False, True])
def test_results_do_not_depend_on_the_run_nor_on_the_batch(has_norms):
    case = make_case(torch.bfloat16, 7)
    norms = make_norms(torch.bfloat16, 64) if has_norms else None
    first, second = rotated(case, norms), rotated(case, norms)
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)
    for token in (0, 3, 6):
        alone = case | {
            name: case[name][token : token + 1]
            for name in ("qkv_TNE", "cos_T1E", "sin_T1E", "slots_T")
        }
        q_THE, _, pages = rotated(alone, norms)
        assert_same(q_THE[0], first[0][token])
        page, row = divmod(int(case["slots_T"][token]), 16)
        assert_same(pages[page, LAYER, :, :, row], first[2][page, LAYER, :, :, row])


def test_tokens_without_a_slot_are_stored_nowhere():
    case = make_case(torch.bfloat16, 7)
    slots_T = case["slots_T"].clone()
    case["slots_T"][[0, 4]] = torch.tensor([-1, -100])
    q_THE, _, pages = rotated(case)
    kept = [1, 2, 3, 5, 6]
    names = ("qkv_TNE", "cos_T1E", "sin_T1E", "slots_T")
    expected_q_THE, _, expected_pages = expected_of(
        case | {name: case[name][kept] for name in names}
    )
    assert_same(q_THE[kept], expected_q_THE)
    assert_same(pages, expected_pages)
    assert not torch.equal(pages.isnan(), rotated(case | {"slots_T": slots_T})[2].isnan())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("has_norms", [False, True])
def test_a_head_that_is_not_finite_leaves_the_others_alone(has_norms, value):
    case = make_case(torch.bfloat16, 3)
    norms = make_norms(torch.bfloat16, 64) if has_norms else None
    expected_q_THE, _, expected_pages = rotated(case, norms)
    case["qkv_TNE"][1, 5, 40] = value
    q_THE, _, pages = rotated(case, norms)
    assert not q_THE[1, 5].isfinite().all()
    q_THE[1, 5] = expected_q_THE[1, 5]
    assert_same(q_THE, expected_q_THE)
    assert_same(pages, expected_pages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_may_lie_apart_in_memory(shape, dtype):
    """As those of one layer of a larger pool do, in another order of their axes."""
    case = make_case(dtype, 7, shape)
    expected_q_THE, _, expected_pages = expected_of(case)
    given = copied(case, DEVICE_TYPE)
    num_pages, num_layers, _, num_kv_heads, page_tokens, size = given["pages"].shape
    wide = torch.full(
        (num_layers, num_pages, page_tokens, 2, num_kv_heads + 1, size + 3),
        math.nan,
        dtype=dtype,
        device=DEVICE_TYPE,
    )
    given["pages"] = wide[..., :num_kv_heads, :size].permute(1, 0, 3, 4, 2, 5)
    rotate_and_write_kv_(**given)
    assert_same(given["pages"].cpu(), expected_pages)
    assert_same(given["qkv_TNE"][:, : case["num_heads"]].cpu(), expected_q_THE)
    assert wide[..., num_kv_heads:, :].isnan().all()
    assert wide[..., size:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 33])
@pytest.mark.parametrize("shape", [*SHAPES, ((1, 3), 133, 5), ((1, 1), 1, 1)])
def test_k_and_v_are_written_to_their_slots(shape, num_tokens, dtype):
    (_, num_kv_heads), size, page_tokens = shape
    arguments = make_writing(dtype, num_tokens, (num_kv_heads, size, page_tokens))
    expected = arguments["pages"].clone()
    reference.write_kv_(**arguments | {"pages": expected})
    given = copied(arguments, DEVICE_TYPE)
    write_kv_(**given)
    assert_same(given["pages"].cpu(), expected)
    assert (~expected.isnan()).sum() == 2 * arguments["k_TKE"].numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [("k_TKE", "v_TKE"), ("v_TKE", "k_TKE")])
def test_k_and_v_may_be_views_of_any_strides(names, dtype):
    arguments = make_writing(dtype, 7, (2, 20, 16))
    expected = arguments["pages"].clone()
    reference.write_kv_(**arguments | {"pages": expected})
    given = copied(arguments, DEVICE_TYPE)
    fused = torch.full((7, 9, 20), math.nan, dtype=dtype, device=DEVICE_TYPE)
    fused[:, 3:5] = given[names[0]]
    turned = torch.full((20, 2, 15), math.nan, dtype=dtype, device=DEVICE_TYPE)
    turned[:, :, ::2][:, :, :7] = given[names[1]].permute(2, 1, 0)
    given |= {names[0]: fused[:, 3:5], names[1]: turned[:, :, ::2][:, :, :7].permute(2, 1, 0)}
    write_kv_(**given)
    assert_same(given["pages"].cpu(), expected)


def test_writing_skips_tokens_without_a_slot():
    arguments = make_writing(torch.bfloat16, 3, (2, 20, 16))
    arguments["slots_T"][1] = -1
    given = copied(arguments, DEVICE_TYPE)
    write_kv_(**given)
    names = ("k_TKE", "v_TKE", "slots_T")
    reference.write_kv_(**arguments | {name: arguments[name][[0, 2]] for name in names})
    assert_same(given["pages"].cpu(), arguments["pages"])


def test_batches_without_tokens_write_nothing():
    case = make_case(torch.bfloat16, 1)
    names = ("qkv_TNE", "cos_T1E", "sin_T1E", "slots_T")
    assert rotated(case | {name: case[name][:0] for name in names})[2].isnan().all()
    given = copied(make_writing(torch.bfloat16, 0, (2, 20, 16)), DEVICE_TYPE)
    write_kv_(**given)
    assert given["pages"].isnan().all()


def make_writing(dtype, num_tokens, shape):
    """Arguments of `write_kv_` on the host; pages of NaN."""
    num_kv_heads, size, page_tokens = shape
    case = make_case(dtype, num_tokens, ((0, num_kv_heads), 2 * size, page_tokens))
    k_TKE, v_TKE = case["qkv_TNE"][..., :size].tensor_split(2, dim=1)
    return {
        "pages": case["pages"][..., :size].contiguous(),
        "layer": LAYER,
        "k_TKE": k_TKE.contiguous(),
        "v_TKE": v_TKE.contiguous(),
        "slots_T": case["slots_T"],
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv_TNE", lambda qkv: qkv[:, :-1].contiguous(), "qkv_TNE"),
        ("qkv_TNE", lambda qkv: qkv.transpose(0, 1).contiguous().transpose(0, 1), "qkv_TNE"),
        ("qkv_TNE", torch.Tensor.float, "pages are"),
        ("num_heads", lambda count: count + 1, "qkv_TNE"),
        ("cos_T1E", lambda cos: cos[:2], "cos_T1E"),
        ("cos_T1E", lambda cos: cos.to("meta"), "cos_T1E"),
        ("sin_T1E", torch.Tensor.float, "sin_T1E"),
        ("slots_T", lambda slots: slots[:2], "slots_T"),
        ("slots_T", lambda slots: slots.repeat_interleave(2)[::2], "slots_T"),
        ("slots_T", torch.Tensor.int, "slots_T"),
        ("pages", lambda pages: pages[0], "pages"),
        ("pages", lambda pages: pages.mT.contiguous().mT, "pages"),
        ("layer", lambda layer: 3, "layer"),
        ("layer", lambda layer: -1, "layer"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(name, change, message):
    given = copied(make_case(torch.bfloat16, 3), DEVICE_TYPE)
    given[name] = change(given[name])
    before_TNE = given["qkv_TNE"].clone()
    with pytest.raises(ValueError, match=message):
        rotate_and_write_kv_(**given)
    assert torch.equal(given["qkv_TNE"], before_TNE)
    assert given["pages"].isnan().all()


@pytest.mark.parametrize("field", ["q_weight_E", "k_weight_E"])
@pytest.mark.parametrize("change", [lambda weight: weight[:32], lambda weight: weight.to("meta")])
def test_wrong_weights_of_norms_are_named(field, change):
    norms = make_norms(torch.bfloat16, 64)
    moved = HeadNorms(norms.q_weight_E.to(DEVICE_TYPE), norms.k_weight_E.to(DEVICE_TYPE), EPS)
    wrong = dataclasses.replace(moved, **{field: change(getattr(moved, field))})
    given = copied(make_case(torch.bfloat16, 3), DEVICE_TYPE)
    with pytest.raises(ValueError, match=field):
        rotate_and_write_kv_(**given, norms=wrong)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k_TKE", lambda k: k[:, :1], "k_TKE"),
        ("v_TKE", lambda v: v[:2], "v_TKE"),
        ("v_TKE", lambda v: v.to("meta"), "v_TKE"),
        ("k_TKE", torch.Tensor.float, "dtype"),
        ("slots_T", lambda slots: slots[:2], "slots_T"),
        ("slots_T", torch.Tensor.int, "slots_T"),
        ("pages", lambda pages: pages[0], "pages"),
        ("layer", lambda layer: 3, "layer"),
    ],
)
def test_wrong_arguments_of_writing_are_named(name, change, message):
    given = copied(make_writing(torch.bfloat16, 3, (2, 20, 16)), DEVICE_TYPE)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        write_kv_(**given)
    assert given["pages"].isnan().all()


def test_types_that_the_kernels_do_not_know_are_named():
    given = copied(make_case(torch.float64, 3), DEVICE_TYPE)
    with pytest.raises(ValueError, match=r"pages is torch\.float64"):
        rotate_and_write_kv_(**given)


def test_programs_have_few_sizes():
    for num_columns in (1, 8, 64, 128, 2048):
        counts = {heads_of_program(num_heads, num_columns) for num_heads in range(1, 200)}
        assert all(count & (count - 1) == 0 for count in counts)
        assert max(counts) * num_columns <= max(1024, num_columns)
