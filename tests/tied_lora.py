"""Tied-LoRA as torch modules: what the format of docs/tied_lora.md means, and how to train it.

PEFT has no such method, so that this is what our reading of the format is compared with. Knows
transformers models and the file format; nothing of the package.
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
QKV = ("q_proj", "k_proj", "v_proj")
TARGETS = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TiedLoraRecipe:
    """Keys of the config; the vectors u and v may be absent as a whole."""

    r: int
    lora_alpha: float
    target_modules: Sequence[str]
    share_qkv_A: bool = False
    has_u: bool = True
    has_v: bool = True


class TiedLinear(nn.Module):
    """y = W x + b + scale * v * (B (u * (A x))); A and B are the same objects in other layers."""

    def __init__(
        self, base: nn.Linear, a_RI: nn.Parameter, b_OR: nn.Parameter, recipe: TiedLoraRecipe
    ) -> None:
        super().__init__()
        self.base = base
        self.a_RI, self.b_OR = a_RI, b_OR
        self.scale = recipe.lora_alpha / recipe.r
        self.u_R = nn.Parameter(torch.ones(recipe.r)) if recipe.has_u else None
        self.v_O = nn.Parameter(torch.zeros(base.out_features)) if recipe.has_v else None

    def forward(self, x_TI: Tensor) -> Tensor:
        h_TR = x_TI @ self.a_RI.T
        if self.u_R is not None:
            h_TR = h_TR * self.u_R
        y_TO = h_TR @ self.b_OR.T
        if self.v_O is not None:
            y_TO = y_TO * self.v_O
        return self.base(x_TI) + self.scale * y_TO


class TiedLoraModel(nn.Module):
    """A copy of a transformers model whose linears of some targets have Tied-LoRA.

    It starts out equal to the base: v is zero, or without v, B is. Only the adapter is trained.
    """

    def __init__(self, model: PreTrainedModel, recipe: TiedLoraRecipe, *, seed: int = 0) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.shared_a: dict[str, nn.Parameter] = {}
        self.shared_b: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for path, linear in list(self.model.named_modules()):
            target = path.rpartition(".")[2]
            if target in recipe.target_modules and isinstance(linear, nn.Linear):
                self._adapt(path, linear, generator)

    def forward(self, tokens: Tensor, labels: Tensor | None = None):
        return self.model(tokens, labels=labels)

    def randomize(self, seed: int = 1, std: float = 0.2) -> None:
        """Move every parameter of the adapter, so that each of them shows."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters under their names in the file."""
        tensors: dict[str, nn.Parameter] = {}
        for name, parameter in self.shared_a.items():
            tensors[f"base_model.tied_lora_A.{name}"] = parameter
        for name, parameter in self.shared_b.items():
            tensors[f"base_model.tied_lora_B.{name}"] = parameter
        for name, module in self.model.named_modules():
            if isinstance(module, TiedLinear):
                vectors = {"u": module.u_R, "v": module.v_O}
                tensors |= {
                    f"base_model.model.{name}.tied_lora_{vector}": parameter
                    for vector, parameter in vectors.items()
                    if parameter is not None
                }
        return tensors

    def save(self, path: Path) -> Path:
        """Write the format of docs/tied_lora.md; returns `path`."""
        recipe = asdict(self.recipe) | {"target_modules": list(self.recipe.target_modules)}
        config = {
            "base_model_name_or_path": None,
            "bias": "none",
            "lora_dropout": 0.0,
            "peft_type": "TIED_LORA",
            "task_type": "CAUSAL_LM",
        }
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(config | recipe))
        tensors = {name: parameter.detach() for name, parameter in self.named_tensors().items()}
        save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
        return path

    def _adapt(self, path: str, linear: nn.Linear, generator: torch.Generator) -> None:
        recipe = self.recipe
        parent, _, target = path.rpartition(".")
        name_a = "qkv_proj" if recipe.share_qkv_A and target in QKV else target
        if name_a not in self.shared_a:
            drawn = torch.randn(recipe.r, linear.in_features, generator=generator)
            self.shared_a[name_a] = nn.Parameter(drawn / linear.in_features**0.5)
        if target not in self.shared_b:
            drawn = torch.randn(linear.out_features, recipe.r, generator=generator)
            start = drawn / recipe.r**0.5 if recipe.has_v else torch.zeros_like(drawn)
            self.shared_b[target] = nn.Parameter(start)
        tied = TiedLinear(linear, self.shared_a[name_a], self.shared_b[target], recipe)
        setattr(self.model.get_submodule(parent), target, tied)


def save_random_tied_lora(model: PreTrainedModel, path: Path, *, rank: int, seed: int) -> None:
    """An adapter of all linears of the layers, q, k and v sharing A, with random parameters."""
    tied = TiedLoraModel(model, TiedLoraRecipe(rank, 2 * rank, TARGETS, share_qkv_A=True))
    tied.randomize(seed)
    tied.save(path)


def load_tied_lora(model: PreTrainedModel, path: Path) -> TiedLoraModel:
    """The adapter in `path` on a copy of `model`, in eval mode."""
    config = json.loads((path / CONFIG_FILE).read_text())
    recipe = TiedLoraRecipe(**{field.name: config[field.name] for field in fields(TiedLoraRecipe)})
    tied = TiedLoraModel(model, recipe)
    stored = load_file(path / WEIGHTS_FILE)
    parameters = tied.named_tensors()
    assert stored.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    return tied.eval()
