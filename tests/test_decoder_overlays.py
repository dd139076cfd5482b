"""What adapters change beside the linears equals PEFT: embedding, lm_head and norms, tied or not.

Each kind of change runs alone and all of them in one batch with the base. PEFT runs in the same
dtype, with values that the dtype can hold.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapter_factory import peft_warnings_ignored
from batch_factory import AdapterPool, BatchFactory, HandAdapter, Rows
from loraswarm.adapters.adapter import EMBEDDING_A
from loraswarm.core.base_shape import TARGETS, BaseShape, module_path
from loraswarm.kernels import Kernels, cpu, reference
from loraswarm.models import loader
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.weight import Weight
from loraswarm.models.source import read_config
from model_factory import load_ours, load_reference, save_tiny_model
from tile_factory import SiteWeights
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
UNTIED, TIED = "qwen3", "qwen3-biased"
ALPHA = 7.0
TOKEN_IDS = [0, 5, 7, 64, 131]
# The prompts below are made of these ids, so that some tokens are replaced and some are not.
PROMPT_IDS = [*TOKEN_IDS, 1, 6, 8, 63, 65, 132]
KINDS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": ["q_proj", "down_proj"], "r": 3},
    "embedding": {"target_modules": ["embed_tokens"], "r": 20},
    "head": {"target_modules": ["lm_head"], "r": 17},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 1},
    "saved-norms": {"modules_to_save": ["norm"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "embedding-tokens": {"trainable_token_indices": {"embed_tokens": TOKEN_IDS}},
    "head-tokens": {"trainable_token_indices": {"lm_head": TOKEN_IDS}},
}


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def kernels(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def save(variant: str) -> Path:
        return save_tiny_model(tmp_path_factory.mktemp(variant), variant)

    return save


@pytest.fixture(scope="module")
def swarm(checkpoint):
    """The swarm of a variant in a dtype, made once."""

    @functools.cache
    def make(variant: str, dtype: torch.dtype) -> Swarm:
        return Swarm(checkpoint(variant), dtype)

    return make


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(PROMPT_IDS), (num_tokens,), generator=generator)
    return [PROMPT_IDS[index] for index in chosen.tolist()]


@torch.inference_mode()
def run(decoder: Decoder, batch: Batch) -> Tensor:
    return decoder.forward(batch)


@torch.inference_mode()
def run_reference(model: Any, token_ids: list[int]) -> Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def differs(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two results are apart by far more than rounding."""
    relative, absolute = TOLERANCE[dtype]
    return not torch.allclose(left.float(), right, rtol=5 * relative, atol=5 * absolute)


def peft_model(base: Any, kind: str, dtype: torch.dtype) -> Any:
    """PEFT's model of one kind, all that it trains random and rounded to `dtype`."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 1, "target_modules": ["v_proj"]} | KINDS[kind]
    config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=ALPHA, **options)
    with peft_warnings_ignored():
        # Said of a model that ties them: the two are adapted apart, which is what is tested.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(sorted(KINDS).index(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_scaled(name, values).to(dtype))
    return model


def _scaled(name: str, values: Tensor) -> Tensor:
    """Sizes at which a change shows and 16-bit rounding stays within the tolerance."""
    if values.dim() == 1:
        return (1 + 0.3 * values) * (0.5 if "model.norm." in name else 1.0)
    if "lora_embedding_A" in name:
        return values * 0.5
    if "lora_B" in name or "lora_embedding_B" in name:
        return values * 0.1
    return values * values.shape[1] ** -0.5


def by_hand(model: Any, shape: BaseShape) -> HandAdapter:
    """What PEFT's model holds, in the form that tiles and overlays take."""
    from peft.tuners.lora import Embedding, Linear
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    sites: dict[int, SiteWeights] = {}
    overlays = []
    modules = dict(model.base_model.model.named_modules())
    for site in range(shape.head_site + 1):
        module = modules[shape.site_path(site)]
        if isinstance(module, Linear):
            sites |= _linear_sites(module, site, shape)
        if isinstance(module, Embedding):
            b_DR = module.lora_embedding_B["default"].data
            unread = torch.full((b_DR.shape[1], 1), float("nan"))
            sites[site] = SiteWeights(unread, b_DR, module.scaling["default"])
            overlays.append(Rows((EMBEDDING_A,), module.lora_embedding_A["default"].data.T))
    for path, module in modules.items():
        if isinstance(module, ModulesToSaveWrapper):
            weight = module.modules_to_save["default"].weight.data
            overlays.append(Rows((path,), weight.view(-1, weight.shape[-1])))
        if isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            ids = torch.tensor(tokens.token_indices["default"])
            overlays.append(Rows((path,), tokens.trainable_tokens_delta["default"].data, ids))
    return HandAdapter(sites, overlays)


def _linear_sites(module: Any, site: int, shape: BaseShape) -> dict[int, SiteWeights]:
    a_RI, b_OR = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
    scale = module.scaling["default"]
    if site != shape.head_site:
        return {site: SiteWeights(a_RI, b_OR, scale)}
    return {
        site + part: SiteWeights(a_RI, b_OR[low:high], scale)
        for part, (low, high) in enumerate(pairwise(shape.head_bounds()))
    }


class Swarm:
    """PEFT's models of all kinds over one base, and the same adapters in one pool of ours."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.base = load_reference(path, dtype)
        self.models = {kind: peft_model(self.base, kind, dtype) for kind in KINDS}
        self.shape = decoder_config(read_config(path)).shape()
        adapters = {kind: by_hand(model, self.shape) for kind, model in self.models.items()}
        self.pool = AdapterPool(adapters, self.shape, dtype)
        self._path, self._dtype = path, dtype

    def decoder(self, kernels: Kernels) -> Decoder:
        return load_ours(self._path, self._dtype, kernels)

    def batch(self, prompts: dict[str, list[int]]) -> Batch:
        return BatchFactory(self.shape, self._dtype).batch(prompts)

    def expected(self, kind: str | None, token_ids: list[int]) -> Tensor:
        return run_reference(self.base if kind is None else self.models[kind], token_ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [UNTIED, TIED])
def test_every_kind_of_change_alone_equals_peft(variant, dtype, swarm):
    peft, token_ids = swarm(variant, dtype), prompt(33)
    decoder, batch = peft.decoder(reference), peft.batch({"a": token_ids})
    base_ZV = run(decoder, batch)
    for kind in KINDS:
        expected_ZV = peft.expected(kind, token_ids)
        adapted_ZV = run(decoder, peft.pool.adapt(batch, [(kind, 33)]))
        assert differs(expected_ZV, base_ZV, dtype), kind
        assert_close(adapted_ZV, expected_ZV, dtype)


def mixed_rows() -> list[tuple[str | None, int]]:
    """Every kind, two of them with one token, among runs of the base."""
    lengths = (7, 1, 33, 3, 16, 1, 9, 5, 2)
    rows: list[tuple[str | None, int]] = list(zip(KINDS, lengths, strict=True))
    return [(None, 3), *rows[:4], (None, 1), *rows[4:], (None, 7)]


def prompts_of(rows: list[tuple[str | None, int]]) -> dict[str, list[int]]:
    return {str(row): prompt(length, seed=row) for row, (_, length) in enumerate(rows)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [UNTIED, TIED])
def test_all_kinds_in_one_batch_equal_each_alone(variant, dtype, kernels, swarm):
    peft, rows = swarm(variant, dtype), mixed_rows()
    decoder, prompts = peft.decoder(kernels), prompts_of(rows)
    lengths = [length for _, length in rows]
    batch = peft.batch(prompts)
    without = run(decoder, batch).split(lengths)
    adapted = run(decoder, peft.pool.adapt(batch, rows)).split(lengths)
    for row, (kind, _) in enumerate(rows):
        assert_close(adapted[row], peft.expected(kind, prompts[str(row)]), dtype)
        # Tokens of the base keep their bits beside any neighbour.
        assert (kind is None) == torch.equal(adapted[row], without[row]), kind


def test_what_changes_the_head_is_found_by_logit_row(kernels, swarm):
    peft = swarm(TIED, torch.float32)
    decoder = peft.decoder(kernels)
    for kind in ("head", "saved-norms", "saved-head", "head-tokens"):
        rows = [(None, 7), (kind, 3), ("embedding-and-head", 1), (kind, 5), (None, 2)]
        batch = peft.pool.adapt(peft.batch(prompts_of(rows)), rows)
        every_ZV = run(decoder, batch)
        for wanted in ([6, 9, 10, 15, 17], [9, 15], [6, 8, 17], [10], []):
            logit_rows = torch.tensor(wanted, dtype=torch.int64)
            some = peft.pool.adapt(dataclasses.replace(batch, logit_rows=logit_rows), rows)
            assert_close(run(decoder, some), every_ZV[wanted], torch.float32)


def test_a_prompt_in_chunks_with_any_kind_of_change_equals_the_whole(kernels, swarm):
    peft, token_ids = swarm(UNTIED, torch.float32), prompt(33)
    decoder = peft.decoder(kernels)
    for kind in KINDS:
        factory = BatchFactory(peft.shape, torch.float32)
        parts = []
        for at in range(0, 33, 7):
            batch = factory.batch({"a": token_ids[at : at + 7]})
            rows = [(kind, len(batch.token_ids))]
            parts.append(run(decoder, peft.pool.adapt(batch, rows)))
        assert_close(torch.cat(parts), peft.expected(kind, token_ids), torch.float32)


@pytest.mark.parametrize(
    ("rows", "products"),
    [
        ([("saved-head", 4)], []),
        ([("saved-head", 3), ("saved-head", 1)], []),
        ([("saved-head", 3), (None, 1)], [4]),
        ([("head-tokens", 4)], [4]),
        ([(None, 4)], [4]),
    ],
)
def test_the_bases_head_is_computed_once_or_if_every_row_has_its_own_never(
    rows, products, swarm, monkeypatch
):
    peft = swarm(UNTIED, torch.float32)
    decoder, calls = peft.decoder(reference), []
    multiply = decoder.lm_head.multiply

    def recorded(x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        calls.append(len(x_TI))
        return multiply(x_TI, bias_O)

    monkeypatch.setattr(decoder.lm_head, "multiply", recorded)
    run(decoder, peft.pool.adapt(peft.batch({"a": prompt(4)}), rows))
    assert calls == products


@pytest.mark.parametrize(
    ("dtype", "at_once"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_gains_without_tiles_scale_and_shift_any_output(dtype, at_once, kernels, checkpoint):
    path = checkpoint("llama-biased")
    decoder, token_ids = load_ours(path, dtype, kernels), prompt(7)
    shape = decoder.config.shape()
    batch = BatchFactory(shape, dtype).batch({"a": token_ids, "b": token_ids})
    base_ZV = run(decoder, batch)
    sites = [*range(len(TARGETS)), shape.num_linears - 1, shape.embedding_site, shape.head_site]
    for chosen in [sites] if at_once else [[site] for site in sites]:
        model = load_reference(path, dtype)
        adapter: dict[int, SiteWeights] = {}
        for site in chosen:
            g_O, c_O = random_gains(shape.site_sizes(site)[1], seed=site)
            adapter |= gain_sites(site, g_O, c_O, shape)
            change_output_(model.get_submodule(shape.site_path(site)), g_O, c_O)
        pool = AdapterPool({"a": HandAdapter(adapter)}, shape, dtype)
        adapted_ZV = run(decoder, pool.adapt(batch, [("a", 7), (None, 7)]))
        expected_ZV = run_reference(model, token_ids)
        assert differs(expected_ZV, base_ZV[:7], dtype), chosen
        assert_close(adapted_ZV[:7], expected_ZV, dtype)
        assert torch.equal(adapted_ZV[7:], base_ZV[7:])


def random_gains(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g_O, c_O = torch.randn(2, size, generator=generator)
    return 1 + g_O * 0.3, c_O * 0.1


def gain_sites(site: int, g_O: Tensor, c_O: Tensor, shape: BaseShape) -> dict[int, SiteWeights]:
    """g and c of one module; those of the lm_head are cut like its columns."""
    bounds = shape.head_bounds() if site == shape.head_site else (0, len(g_O))
    return {
        site + part: SiteWeights(None, None, g=g_O[low:high].clone(), c=c_O[low:high].clone())
        for part, (low, high) in enumerate(pairwise(bounds))
    }


def change_output_(module: nn.Module, g_O: Tensor, c_O: Tensor) -> None:
    """Make transformers' module scale its output by g and shift it by c."""
    module.register_forward_hook(lambda _, __, y: (y.float() * g_O + c_O).to(y.dtype))


def test_an_adapter_of_gains_only_calls_no_shrink(checkpoint):
    decoder = load_ours(checkpoint("llama"), torch.float32, without_shrink())
    shape = decoder.config.shape()
    sites: dict[int, SiteWeights] = {}
    for site in (0, shape.embedding_site, shape.head_site):
        size = shape.site_sizes(site)[1]
        sites |= gain_sites(site, torch.full((size,), 2.0), torch.zeros(size), shape)
    pool = AdapterPool({"a": HandAdapter(sites)}, shape, torch.float32)
    batch = BatchFactory(shape, torch.float32).batch({"a": prompt(3)})
    assert differs(run(decoder, pool.adapt(batch, [("a", 3)])), run(decoder, batch))


def without_shrink() -> Kernels:
    return SimpleNamespace(**{k: v for k, v in vars(reference).items() if k != "lora_shrink"})


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("variant", ["llama-biased", "qwen2-tied"])
def test_methods_read_the_bases_own_weights_by_path(variant, is_packed, checkpoint, monkeypatch):
    if not is_packed:
        monkeypatch.setattr(loader, "can_pack", lambda dtype, device: False)
    path = checkpoint(variant)
    decoder = load_ours(path, torch.bfloat16, reference)
    theirs = dict(load_reference(path, torch.bfloat16).named_modules())
    shape = decoder.config.shape()
    for site in range(shape.head_site + 1):
        name = shape.site_path(site)
        assert torch.equal(decoder.weight(name), theirs[name].weight), name
        bias_O, expected_O = decoder.bias(name), getattr(theirs[name], "bias", None)
        assert (bias_O is None) == (expected_O is None) == (not shape.has_bias(site)), name
        assert bias_O is None or torch.equal(bias_O, expected_O), name


def test_parts_of_one_packed_weight_are_unpacked_once_and_forgotten_after(checkpoint, monkeypatch):
    decoder = load_ours(checkpoint("llama"), torch.float32, reference)
    rows, unpacked = Weight.rows, []

    def recorded(weight: Weight) -> Tensor:
        unpacked.append(weight)
        return rows.fget(weight)

    monkeypatch.setattr(Weight, "rows", property(recorded))
    for target in range(len(TARGETS)):
        decoder.weight(module_path(1, target))
    assert unpacked == [linear.weight for linear in decoder.layers[1].linears()]
    batch = BatchFactory(decoder.config.shape(), torch.float32).batch({"a": prompt(3)})
    run(decoder, batch)
    decoder.weight(module_path(1, len(TARGETS) - 1))
    assert unpacked[-2:] == [decoder.layers[1].mlp.down.weight] * 2


def test_a_path_the_base_does_not_have_is_a_bug(checkpoint):
    decoder = load_ours(checkpoint("llama"), torch.float32, reference)
    for read in (decoder.weight, decoder.bias):
        with pytest.raises(AssertionError, match=r"model\.norm"):
            read("model.norm")
