"""Merged checkpoints: what transformers computes from one is what PEFT computes unmerged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from adapter_factory import load_peft_adapter
from general_form import logits_of, save_peft
from loraswarm.errors import AdapterError, ConfigError
from loraswarm.kernels import cpu
from loraswarm.models import merge as merge_module
from loraswarm.models.merge import merge
from model_factory import load_ours, load_reference, save_tiny_model
from tolerance import TOLERANCE, assert_close

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(**changes) -> LoraConfig:
    arguments = {"r": 5, "lora_alpha": 8, "target_modules": SEVEN, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(arguments | changes))


def save_adapter(model: Path, path: Path, **changes) -> Path:
    save_peft(load_reference(model, torch.float32), path, lora_config(**changes))
    return path


def run(model: Path, adapter: Path, out: Path, dtype: str = "auto") -> Path:
    merge(model, adapter, out, dtype, lambda line: None)
    return out


def check_equals_peft(model: Path, adapter: Path, merged: Path, dtype: torch.dtype) -> None:
    """transformers on `merged` gives PEFT's logits in float32, and not the base's."""
    base = load_reference(model, torch.float32)
    expected = logits_of(load_peft_adapter(base, adapter))
    relative, absolute = TOLERANCE[dtype]
    assert not torch.allclose(expected, logits_of(base), rtol=10 * relative, atol=10 * absolute)
    assert_close(logits_of(load_reference(merged, torch.float32)), expected, dtype)


@pytest.mark.parametrize(
    "variant", ["llama", "llama-biased", "llama3-tied", "mistral", "qwen2-tied", "qwen3"]
)
def test_a_merged_checkpoint_gives_the_logits_of_peft(tmp_path, variant):
    model = save_tiny_model(tmp_path / "model", variant)
    adapter = save_adapter(model, tmp_path / "adapter", use_rslora=True)
    merged = run(model, adapter, tmp_path / "merged")
    check_equals_peft(model, adapter, merged, torch.float32)
    load_ours(merged, torch.float32, cpu)


def test_only_what_the_adapter_changes_is_computed(tmp_path):
    model = save_tiny_model(tmp_path / "model", "qwen2-tied")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    result = merge(model, adapter, tmp_path / "merged", "auto", lambda line: None)
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert (result.num_changed, result.num_tensors) == (2, len(before))
    assert result.num_bytes == sum(tensor.nbytes for tensor in after.values())


def test_weights_are_rounded_once_to_the_dtype_of_their_file(tmp_path):
    model = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    merged = run(model, adapter, tmp_path / "merged")
    check_equals_peft(model, adapter, merged, torch.bfloat16)
    peft = load_peft_adapter(load_reference(model, torch.float32), adapter)
    exact = peft.merge_and_unload().state_dict()
    stored = load_file(merged / "model.safetensors")
    base = load_file(model / "model.safetensors")
    assert stored.keys() == base.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        is_target = "q_proj" in name or "down_proj" in name
        assert torch.equal(tensor, base[name]) != is_target
        # Half the distance of neighbouring bfloat16 numbers, and what float32 sums may differ by.
        half_steps = torch.exp2(torch.frexp(exact[name]).exponent.float() - 9)
        error = (tensor.float() - exact[name]).abs()
        assert bool((error <= half_steps + 1e-6).all()), name


def test_another_dtype_is_written_on_request(tmp_path):
    model = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    adapter = save_adapter(model, tmp_path / "adapter")
    merged = run(model, adapter, tmp_path / "merged", "float32")
    assert {t.dtype for t in load_file(merged / "model.safetensors").values()} == {torch.float32}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    check_equals_peft(model, adapter, merged, torch.float32)


def test_every_spelling_of_the_dtype_in_the_config_is_set(tmp_path):
    model = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    adapter = save_adapter(model, tmp_path / "adapter")
    run(model, adapter, tmp_path / "merged", "float16")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["dtype"] == merged["torch_dtype"] == "float16"


def test_the_copy_of_a_tied_head_and_old_rope_tables_are_left_out(tmp_path):
    model = save_tiny_model(tmp_path / "model", "qwen2-tied")
    adapter = save_adapter(model, tmp_path / "adapter")
    tensors = load_file(model / "model.safetensors")
    names = tensors.keys() - {"lm_head.weight"}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    merged = run(model, adapter, tmp_path / "merged")
    assert load_file(merged / "model.safetensors").keys() == names
    check_equals_peft(model, adapter, merged, torch.float32)


def test_values_that_the_dtype_cannot_hold_are_refused_by_name(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", lora_alpha=10**8)
    with pytest.raises(ConfigError, match=r"'model\.layers\..*float16 cannot hold"):
        run(model, adapter, tmp_path / "merged", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_base_in_shards_stays_in_shards(tmp_path):
    model = save_tiny_model(tmp_path / "model", "qwen3", max_shard_size="40KB")
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 2
    adapter = save_adapter(model, tmp_path / "adapter")
    merged = run(model, adapter, tmp_path / "merged")
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    before, after = (
        json.loads((path / "model.safetensors.index.json").read_text()) for path in (model, merged)
    )
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    check_equals_peft(model, adapter, merged, torch.float32)


def test_blocks_of_few_rows_make_the_same_checkpoint(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    whole = load_file(run(model, adapter, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(merge_module, "BLOCK_ELEMENTS", 133)
    cut = load_file(run(model, adapter, tmp_path / "cut") / "model.safetensors")
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert_close(cut[name], tensor, torch.float32)


def test_no_tensor_is_ever_whole_in_memory(tmp_path, monkeypatch):
    vocab_size = 100_003
    model = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16, vocab_size=vocab_size)
    adapter = save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(merge_module, "BLOCK_ELEMENTS", 1 << 16)
    held_bytes = []
    write = merge_module.write_tensors

    def measuring(file, specs, blocks):
        def measured(name):
            for block in blocks(name):
                held_bytes.append(anonymous_bytes())
                yield block

        write(file, specs, measured)

    monkeypatch.setattr(merge_module, "write_tensors", measuring)
    merged = run(model, adapter, tmp_path / "merged", "float32")
    table_bytes = vocab_size * 48 * 4
    assert (merged / "model.safetensors").stat().st_size > 2 * table_bytes
    assert len(held_bytes) > 100
    assert max(held_bytes) - held_bytes[0] < table_bytes / 4


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_everything_but_weights_and_config_is_copied(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_text(f"{name} here")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools here")
    (model / "consolidated.safetensors").write_text("a second copy of the weights")
    merged = run(model, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    copied = {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()}
    assert copied == files - {"consolidated.safetensors"}
    for name in copied - {"config.json", "model.safetensors"}:
        assert (merged / name).read_bytes() == (model / name).read_bytes()
    assert (merged / "config.json").read_text() == (model / "config.json").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    model = save_tiny_model(tmp_path / "model", max_shard_size="40KB")
    adapter = save_adapter(model, tmp_path / "adapter")
    written = []
    write = merge_module.write_tensors

    def stopping(file, specs, blocks):
        write(file, specs, blocks)
        written.append(file)
        if len(written) == 2:
            raise error("stopped")

    monkeypatch.setattr(merge_module, "write_tensors", stopping)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        run(model, adapter, tmp_path / "merged")
    assert len(written) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        run(model, adapter, model)
    with pytest.raises(ConfigError, match="is a file"):
        run(model, adapter, model / "config.json")
    assert (model / "model.safetensors").read_bytes() == before
    (tmp_path / "merged").mkdir()
    run(model, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    usage = merge_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="1,000 free"):
        run(model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_whose_tensors_differ_from_its_config_is_refused(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(ConfigError, match=r"lacks tensor 'model\.layers\.0\.self_attn\.k_proj\.b"):
        run(model, adapter, tmp_path / "merged")
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 77}))
    with pytest.raises(ConfigError, match=r"config\.json calls for"):
        run(model, adapter, tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapter = save_adapter(save_tiny_model(tmp_path / "other"), tmp_path / "adapter")
    model = save_tiny_model(tmp_path / "model", intermediate_size=77)
    with pytest.raises(AdapterError, match="another base model"):
        run(model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
