"""VeRA equals PEFT, and Tied-LoRA its definition; a matrix they share is one for all its users."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adapter_factory import WEIGHTS_FILE, tiny_llama
from general_form import TOKENS, ModelBase, applied, check_equals_peft, logits_of, read, save_peft
from loraswarm.adapters.adapter import Adapter
from loraswarm.adapters.reading import read_adapter, read_adapter_info
from loraswarm.adapters.tensor_file import TensorFile
from loraswarm.core.base_shape import TARGETS, module_path
from loraswarm.errors import AdapterError
from tied_lora import TiedLoraModel, TiedLoraRecipe, load_tied_lora
from tiny_models import change_config, change_tensors, tiny_qwen
from tolerance import TOLERANCE, assert_close

SHARED = ("base_model.vera_A", "base_model.vera_B")


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen])
def model(request) -> PreTrainedModel:
    return request.param()


@contextmanager
def projection_warnings_ignored() -> Iterator[None]:
    """PEFT warns of adapters without vera_A and vera_B, which it draws again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A")
        yield


def save_vera(model: PreTrainedModel, path: Path, *, seed: int = 0, **keys: Any) -> Path:
    with projection_warnings_ignored():
        config = VeraConfig(**{"r": 7, "target_modules": list(TARGETS)} | keys)
        save_peft(model, path, config, seed=seed)
    return path


def digests(model: PreTrainedModel, path: Path) -> list[str]:
    info = read_adapter_info(path, "a", ModelBase(model).shape)
    return [matrix.digest for matrix in info.shared_matrices()]


@pytest.mark.parametrize("has_projection", [True, False])
@pytest.mark.parametrize("targets", [TARGETS, ["k_proj"], ["v_proj", "up_proj"]])
def test_vera_equals_peft(tmp_path, model, has_projection, targets):
    save_vera(model, tmp_path, target_modules=list(targets), save_projection=has_projection)
    assert all((name in load_file(tmp_path / WEIGHTS_FILE)) == has_projection for name in SHARED)
    with projection_warnings_ignored():
        adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.method == "vera"
    assert adapter.info.max_rank == 7
    assert len(adapter.shared) == 2


def test_vera_on_some_layers_is_sized_by_those(tmp_path, model):
    save_vera(model, tmp_path, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    adapter = check_equals_peft(model, tmp_path)
    assert {module.info.layer for module in adapter.modules} == {1}


@pytest.mark.parametrize("key", [0, 7, 2**40, -3])
@pytest.mark.parametrize("targets", [TARGETS, ["down_proj"]])
def test_vera_projections_are_drawn_bit_for_bit_as_peft_draws_them(tmp_path, key, targets):
    model = tiny_llama(num_layers=1)
    recipe = {"target_modules": list(targets), "projection_prng_key": key}
    save_vera(model, tmp_path / "drawn", save_projection=False, **recipe)
    save_vera(model, tmp_path / "stored", save_projection=True, **recipe)
    stored = load_file(tmp_path / "stored" / WEIGHTS_FILE)
    adapter = read(model, tmp_path / "drawn")
    a_RI, bt_RO = (adapter.shared[matrix.digest] for matrix in adapter.info.shared_matrices())
    assert torch.equal(a_RI, stored[SHARED[0]])
    assert torch.equal(bt_RO, stored[SHARED[1]].T)


def test_vera_adapters_with_equal_projections_share_them(tmp_path):
    model = tiny_llama()
    paths = [save_vera(model, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    assert digests(model, paths[0]) == digests(model, paths[1])
    adapters = [read(model, path) for path in paths]
    assert not torch.equal(adapters[0].modules[0].vectors["u"], adapters[1].modules[0].vectors["u"])
    other = save_vera(model, tmp_path / "other", projection_prng_key=1)
    assert not set(digests(model, paths[0])) & set(digests(model, other))


@pytest.mark.parametrize("side", [0, 1])
def test_vera_projections_that_differ_in_one_value_are_not_shared(tmp_path, side):
    model = tiny_llama()
    path = save_vera(model, tmp_path)
    before = digests(model, path)
    matrix = load_file(path / WEIGHTS_FILE)[SHARED[side]]
    matrix[-1, -1] += 1
    change_tensors(path, {SHARED[side]: matrix})
    after = digests(model, path)
    assert before[side] != after[side]
    assert before[1 - side] == after[1 - side]


def test_drawn_projections_are_shared_when_key_and_sizes_agree(tmp_path):
    model = tiny_llama()
    recipes: list[dict[str, Any]] = [
        {},
        {"projection_prng_key": 1},
        {"r": 6},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "up_proj"]},
    ]
    found = []
    for number, recipe in enumerate(recipes):
        path = save_vera(model, tmp_path / str(number), save_projection=False, **recipe)
        found += digests(model, path)
    assert len(set(found)) == 2 * len(recipes)
    again = save_vera(model, tmp_path / "again", save_projection=False, seed=5)
    assert digests(model, again) == found[:2]


@pytest.mark.parametrize("key", ["0", None, 1.0, True, 2**64, -(2**63) - 1])
def test_vera_without_projections_needs_a_key(tmp_path, key):
    model = tiny_llama(num_layers=1)
    path = save_vera(model, tmp_path, save_projection=False)
    change_config(path, projection_prng_key=key)
    with pytest.raises(AdapterError, match="projection_prng_key is"):
        read(model, path)


def test_vera_projections_that_the_config_does_not_promise_are_refused(tmp_path):
    model = tiny_llama(num_layers=1)
    path = save_vera(model, tmp_path)
    change_config(path, save_projection=False)
    with pytest.raises(
        AdapterError, match=r"'base_model\.vera_A' is none that the config calls for"
    ):
        read(model, path)


def test_vera_of_a_narrower_base_is_refused_by_its_projection(tmp_path):
    model = tiny_llama(num_layers=1)
    path = save_vera(model, tmp_path, target_modules=["v_proj", "down_proj"])
    change_config(path, target_modules=["v_proj"])
    with pytest.raises(AdapterError, match=r"base_model.*down_proj"):
        read(model, path)
    kept = {k: v for k, v in load_file(path / WEIGHTS_FILE).items() if "down_proj" not in k}
    save_file(kept, path / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"'base_model.vera_A' has shape \[7, 52\]"):
        read(model, path)


def test_vera_has_no_exclude_modules(tmp_path):
    model = tiny_llama(num_layers=1)
    path = save_vera(model, tmp_path)
    change_config(path, exclude_modules=["q_proj"])
    with pytest.raises(AdapterError, match="exclude_modules is"):
        read(model, path)


def check_equals_reference(model: PreTrainedModel, tied: TiedLoraModel, path: Path) -> Adapter:
    """Assert that what we read from `path` gives the logits of the torch modules it came from."""
    adapter = read(model, path)
    with torch.inference_mode():
        expected = tied(TOKENS).logits
    relative, absolute = TOLERANCE[torch.float32]
    assert not torch.allclose(expected, logits_of(model), rtol=10 * relative, atol=10 * absolute)
    assert_close(logits_of(applied(model, adapter)), expected, torch.float32)
    return adapter


@pytest.mark.parametrize("shares_qkv", [False, True])
@pytest.mark.parametrize(("has_u", "has_v"), [(True, True), (True, False), (False, True)])
def test_tied_lora_equals_its_definition(tmp_path, model, shares_qkv, has_u, has_v):
    recipe = TiedLoraRecipe(5, 15, TARGETS, shares_qkv, has_u, has_v)
    tied = TiedLoraModel(model, recipe)
    tied.randomize()
    adapter = check_equals_reference(model, tied, tied.save(tmp_path))
    assert torch.equal(logits_of(load_tied_lora(model, tmp_path)), logits_of(tied))
    assert adapter.info.method == "tied_lora"
    assert {module.info.rank for module in adapter.modules} == {5}
    assert len(adapter.shared) == (5 if shares_qkv else 7) + 7


def test_tied_lora_without_vectors_is_one_lora_for_all_layers(tmp_path):
    model = tiny_llama()
    tied = TiedLoraModel(model, TiedLoraRecipe(3, 6, ["q_proj"], has_u=False, has_v=False))
    tied.randomize()
    adapter = check_equals_reference(model, tied, tied.save(tmp_path))
    assert {module.info.vectors for module in adapter.modules} == {()}
    assert len({module.info.shared_a for module in adapter.modules}) == 1
    assert {module.info.scale for module in adapter.modules} == {2.0}


def test_tied_lora_of_some_layers_and_the_lm_head(tmp_path):
    model = tiny_llama()
    tied = TiedLoraModel(model, TiedLoraRecipe(3, 6, ["v_proj", "lm_head"]))
    tied.randomize()
    check_equals_reference(model, tied, tied.save(tmp_path))
    change_config(tmp_path, layers_to_transform=[0, 2])
    with pytest.raises(AdapterError, match=r"layers\.1.*none that the config calls for"):
        read(model, tmp_path)


def test_tied_lora_is_trained_from_the_base_on(tmp_path):
    model = tiny_llama(num_layers=2)
    tied = TiedLoraModel(model, TiedLoraRecipe(4, 16, ["q_proj", "v_proj", "down_proj"]))
    assert_close(tied(TOKENS).logits, logits_of(model), torch.float32)
    trained = [parameter for parameter in tied.parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 2 + 2 * 3 * 2
    optimizer = torch.optim.Adam(trained, lr=0.1)
    losses = []
    for _ in range(8):
        loss = tied(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    check_equals_reference(model, tied, tied.save(tmp_path))


def test_tied_lora_matrices_are_stored_once_and_shared_by_equal_content(tmp_path):
    model = tiny_llama()
    tied = TiedLoraModel(model, TiedLoraRecipe(3, 6, ["q_proj"]))
    tied.randomize()
    first = tied.save(tmp_path / "first")
    with torch.no_grad():
        tied.model.model.layers[0].self_attn.q_proj.u_R.add_(1)
    second = tied.save(tmp_path / "second")
    assert len(digests(model, first)) == 2
    assert digests(model, first) == digests(model, second)
    with torch.no_grad():
        tied.shared_b["q_proj"].add_(1)
    third = digests(model, tied.save(tmp_path / "third"))
    assert third[0] == digests(model, first)[0]
    assert third[1] != digests(model, first)[1]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"share_qkv_A": True}, "tied_lora_A.q_proj"),
        ({"has_u": False}, "tied_lora_u"),
        ({"has_v": False}, "tied_lora_v"),
        ({"has_v": "no"}, "true or false"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": None}, "r is None"),
        ({"r": 4}, "has shape"),
    ],
)
def test_a_tied_lora_config_that_does_not_fit_is_refused(tmp_path, keys, says):
    model = tiny_llama()
    TiedLoraModel(model, TiedLoraRecipe(3, 6, ["q_proj"])).save(tmp_path)
    change_config(tmp_path, **keys)
    with pytest.raises(AdapterError, match=says):
        read(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_matrices_are_in_the_bases_dtype_and_vectors_in_float32(tmp_path, dtype):
    model = tiny_llama(num_layers=1)
    adapter = read(model, save_vera(model, tmp_path), dtype)
    exact = read(model, tmp_path)
    for digest, matrix in adapter.shared.items():
        assert matrix.dtype == dtype
        assert matrix.is_contiguous()
        assert torch.equal(matrix, exact.shared[digest].to(dtype))
    path = module_path(0, 0)
    stored = load_file(tmp_path / WEIGHTS_FILE)[f"base_model.model.{path}.vera_lambda_b"]
    assert torch.equal(adapter.modules[0].vectors["v"], stored)


def test_shared_matrices_are_hashed_when_described_and_not_again_when_read(tmp_path, monkeypatch):
    model = tiny_qwen()
    save_peft(model, tmp_path, VeraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj"]))
    hashed = []
    content_digest = TensorFile.content_digest
    monkeypatch.setattr(
        TensorFile,
        "content_digest",
        lambda self, names: hashed.append(names) or content_digest(self, names),
    )
    base = ModelBase(model)
    info = read_adapter_info(tmp_path, "a", base.shape)
    assert len(hashed) == 2
    assert len(read_adapter(info, base, torch.float32).shared) == 2
    assert len(hashed) == 2
