"""Rotating q and k on their way into the pages equals rope, then `write_kv_`, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kernel_cases import BACKENDS, THREAD_COUNTS, use_all_threads
from loraswarm.kernels import HeadNorms, cpu, reference
from loraswarm.models.layers.rope import Rotation
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
LAYER = 1
EPS = 1e-6


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


def make_case(dtype, num_tokens, heads=(14, 2), head_size=64, page_tokens=16):
    """Arguments of `rotate_and_write_kv_`: layer 1 of 3, more slots than tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    num_heads, num_kv_heads = heads
    num_pages = num_tokens // page_tokens + 2
    shape = (num_pages, 3, 2, num_kv_heads, page_tokens, head_size)
    qkv_TNE = torch.randn(
        num_tokens, num_heads + 2 * num_kv_heads, head_size, generator=generator
    ).to(dtype)
    angles_T1F = torch.rand(num_tokens, 1, head_size // 2, generator=generator) * 100
    cos_T1F, sin_T1F = angles_T1F.cos().to(dtype), angles_T1F.sin().to(dtype)
    return {
        "qkv_TNE": qkv_TNE,
        "num_heads": num_heads,
        "cos_T1E": torch.cat((cos_T1F, cos_T1F), dim=-1),
        "sin_T1E": torch.cat((-sin_T1F, sin_T1F), dim=-1),
        "pages": torch.randn(shape, generator=generator).to(dtype),
        "layer": LAYER,
        "slots_T": torch.randperm(num_pages * page_tokens, generator=generator)[:num_tokens],
    }


def make_norms(dtype, head_size):
    generator = torch.Generator().manual_seed(7)
    q_weight_E, k_weight_E = (torch.randn(2, head_size, generator=generator) + 1).to(dtype)
    return HeadNorms(q_weight_E, k_weight_E, EPS)


def copied(case):
    return case | {"qkv_TNE": case["qkv_TNE"].clone(), "pages": case["pages"].clone()}


def expected_of(case, norms=None):
    """q [T, H, E] and the pages after the layers of the model have done it in torch."""
    qkv_TNE, num_heads, pages = case["qkv_TNE"].clone(), case["num_heads"], case["pages"].clone()
    num_kv_heads = pages.shape[3]
    qk_TNE, v_TKE = qkv_TNE[:, :-num_kv_heads], qkv_TNE[:, -num_kv_heads:]
    if norms is not None:
        qk_TNE = F.rms_norm(qk_TNE, qk_TNE.shape[-1:], None, norms.eps)
        qk_TNE[:, :num_heads].mul_(norms.q_weight_E)
        qk_TNE[:, num_heads:].mul_(norms.k_weight_E)
    Rotation(case["cos_T1E"], case["sin_T1E"]).apply_(qk_TNE)
    reference.write_kv_(pages, LAYER, qk_TNE[:, num_heads:], v_TKE, case["slots_T"])
    return qk_TNE[:, :num_heads], pages


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 133])
@pytest.mark.parametrize(("heads", "head_size"), [((14, 2), 64), ((4, 4), 40), ((3, 1), 6)])
def test_q_is_rotated_in_place_and_k_and_v_are_in_their_slots(
    backend, heads, head_size, num_tokens, dtype
):
    case = make_case(dtype, num_tokens, heads, head_size)
    expected_q_THE, expected_pages = expected_of(case)
    given = copied(case)
    backend.rotate_and_write_kv_(**given)
    assert torch.equal(given["qkv_TNE"][:, : heads[0]], expected_q_THE)
    assert torch.equal(given["pages"], expected_pages)
    assert not torch.equal(expected_q_THE, case["qkv_TNE"][:, : heads[0]])
    assert torch.equal(given["qkv_TNE"][:, -heads[1] :], case["qkv_TNE"][:, -heads[1] :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 40, 6])
def test_heads_are_normalised_before_they_turn(backend, head_size, dtype):
    case, norms = make_case(dtype, 33, (6, 2), head_size), make_norms(dtype, head_size)
    expected_q_THE, expected_pages = expected_of(case, norms)
    given = copied(case)
    backend.rotate_and_write_kv_(**given, norms=norms)
    assert_close(given["qkv_TNE"][:, :6], expected_q_THE, dtype)
    assert_close(given["pages"], expected_pages, dtype)
    num_other = (given["pages"] != expected_pages).sum() + (
        given["qkv_TNE"][:, :6] != expected_q_THE
    ).sum()
    if dtype != torch.float32:
        # sums of squares in another order move a rounding now and then
        assert num_other <= expected_q_THE.numel() // 100
    assert not torch.equal(expected_q_THE, expected_of(case)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_equal_bit_for_bit_for_any_number_of_threads(dtype):
    case, norms = make_case(dtype, 133), make_norms(dtype, 64)
    results = []
    for count in THREAD_COUNTS:
        cpu.set_num_threads(count)
        given = copied(case)
        cpu.rotate_and_write_kv_(**given, norms=norms)
        results.append((given["qkv_TNE"][:, :14], given["pages"]))
    for q_THE, pages in results[1:]:
        assert torch.equal(q_THE, results[0][0])
        assert torch.equal(pages, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_layer_equals_its_kernels_one_by_one(dtype):
    first, second = make_case(dtype, 33), make_case(dtype, 7)
    expected = [expected_of(case) for case in (first, second)]
    given = [copied(case) for case in (first, second)]
    with cpu.recording():
        for case in given:
            cpu.rotate_and_write_kv_(**case)
        assert all(
            torch.equal(case["pages"], before["pages"])
            for case, before in zip(given, (first, second), strict=True)
        )
    for case, (q_THE, pages) in zip(given, expected, strict=True):
        assert torch.equal(case["qkv_TNE"][:, :14], q_THE)
        assert torch.equal(case["pages"], pages)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv_TNE", lambda qkv: qkv[:, :-1].contiguous(), "qkv_TNE"),
        ("qkv_TNE", lambda qkv: qkv.transpose(0, 1).contiguous().transpose(0, 1), "qkv_TNE"),
        ("qkv_TNE", torch.Tensor.float, "pages are"),
        ("num_heads", lambda count: count + 1, "qkv_TNE"),
        ("cos_T1E", lambda cos: cos[:2], "cos_T1E"),
        ("sin_T1E", torch.Tensor.float, "sin_T1E"),
        ("slots_T", lambda slots: slots[:2], "slots_T"),
        ("slots_T", torch.Tensor.int, "slots_T"),
        ("pages", lambda pages: pages[0], "pages"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(backend, name, change, message):
    case = make_case(torch.bfloat16, 3)
    given = copied(case)
    given[name] = change(given[name])
    before = copied(given)
    with pytest.raises(ValueError, match=message):
        backend.rotate_and_write_kv_(**given)
    assert torch.equal(given["qkv_TNE"], before["qkv_TNE"])
    assert torch.equal(given["pages"], before["pages"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("field", ["q_weight_E", "k_weight_E"])
def test_norm_weights_of_another_shape_are_refused(backend, field):
    case, norms = make_case(torch.bfloat16, 3), make_norms(torch.bfloat16, 64)
    fields = {"q_weight_E": norms.q_weight_E, "k_weight_E": norms.k_weight_E}
    wrong = HeadNorms(**fields | {field: norms.q_weight_E[:32]}, eps=EPS)
    with pytest.raises(ValueError, match=field):
        backend.rotate_and_write_kv_(**case, norms=wrong)


@pytest.mark.parametrize("slot", [-1, 32])
def test_a_slot_outside_of_the_pages_is_refused_before_anything_is_written(slot):
    case = make_case(torch.bfloat16, 3) | {"slots_T": torch.tensor([1, 3, slot])}
    assert case["pages"].shape[0] * 16 == 32
    given = copied(case)
    with pytest.raises(ValueError, match="slots_T"):
        cpu.rotate_and_write_kv_(**given)
    assert torch.equal(given["qkv_TNE"], case["qkv_TNE"])
    assert torch.equal(given["pages"], case["pages"])


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_pages_do_not_have_is_refused(layer):
    case = make_case(torch.bfloat16, 3) | {"layer": layer}
    with pytest.raises(ValueError, match="layer"):
        cpu.rotate_and_write_kv_(**case)
