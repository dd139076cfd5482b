"""Every method merges: transformers on the merged checkpoint computes what PEFT computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import BeftConfig
from safetensors.torch import load_file
from torch import Tensor

from adapter_factory import load_peft_adapter
from general_form import logits_of, save_peft
from loraswarm.errors import AdapterError
from loraswarm.kernels import cpu
from loraswarm.models.merge import merge
from method_cases import METHOD_CASES
from model_factory import load_ours, load_reference, save_tiny_model
from tied_lora import load_tied_lora
from tolerance import TOLERANCE, assert_close

VARIANTS = ("llama", "qwen2-tied")
UNMERGEABLE = {("llama", "alora"), ("qwen2-tied", "alora"), ("qwen2-tied", "lora-bias")}
CASES = [(variant, name) for variant in VARIANTS for name in METHOD_CASES]


pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not load vera_A"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {
        variant: save_tiny_model(path / variant, variant, dtype=torch.bfloat16)
        for variant in VARIANTS
    }


def logits_of_peft(model: Path, name: str, adapter: Path) -> Tensor:
    base = load_reference(model, torch.float32)
    load = load_tied_lora if name == "tied-lora" else load_peft_adapter
    expected = logits_of(load(base, adapter))
    relative, absolute = TOLERANCE[torch.bfloat16]
    assert not torch.allclose(expected, logits_of(base), rtol=relative, atol=absolute)
    return expected


def run(model: Path, adapter: Path, out: Path, dtype: str = "auto") -> Path:
    merge(model, adapter, out, dtype, lambda line: None)
    return out


@pytest.mark.parametrize(("variant", "name"), [c for c in CASES if c not in UNMERGEABLE])
def test_a_merged_method_gives_the_logits_of_peft(tmp_path, models, variant, name):
    model = models[variant]
    adapter = tmp_path / "adapter"
    METHOD_CASES[name](load_reference(model, torch.float32), adapter)
    wide = run(model, adapter, tmp_path / "wide", "float32")
    expected = logits_of_peft(model, name, adapter)
    assert_close(logits_of(load_reference(wide, torch.float32)), expected, torch.float32)
    load_ours(wide, torch.float32, cpu)

    merged = load_file(run(model, adapter, tmp_path / "merged") / "model.safetensors")
    exact = load_file(wide / "model.safetensors")
    assert merged.keys() == exact.keys()
    for tensor_name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[tensor_name].bfloat16()), tensor_name


def test_new_biases_of_beft_are_stored(tmp_path, models):
    model = models["llama"]
    config = BeftConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"])
    save_peft(load_reference(model, torch.float32), tmp_path / "adapter", config)
    merged = run(model, tmp_path / "adapter", tmp_path / "merged", "float32")
    expected = logits_of_peft(model, "beft", tmp_path / "adapter")
    assert_close(logits_of(load_reference(merged, torch.float32)), expected, torch.float32)


@pytest.mark.parametrize(("variant", "name"), sorted(UNMERGEABLE))
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path, models, variant, name):
    model = models[variant]
    METHOD_CASES[name](load_reference(model, torch.float32), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"adapter 'adapter' cannot be merged.*unmerged"):
        run(model, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
