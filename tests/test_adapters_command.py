"""`loraswarm adapters` and `loraswarm merge` as commands: verdicts, tables, JSON, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_factory import SMALL_SHAPE, save_random_adapter, write_adapter
from command_line import error_line, run_here, run_process
from loraswarm.adapters.inferred_shape import infer_shape
from loraswarm.adapters.source import open_source
from loraswarm.commands.adapter_report import as_table
from loraswarm.commands.adapters import CheckOptions, check, convert
from loraswarm.commands.merge import merge
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import ConfigError
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from method_cases import METHOD_CASES
from model_factory import load_reference, save_tiny_model
from nemo_factory import Layout, peft_to_nemo

LAYER = "base_model.model.model.layers.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", "qwen3", head_dim=8)


@pytest.fixture(scope="module")
def shape(model) -> BaseShape:
    return decoder_config(read_config(model)).shape()


def checked(capsys, *paths: Path, **options) -> tuple[int, dict[str, dict]]:
    """Exit code and facts by name, of a check in this process."""
    code = check([str(path) for path in paths], CheckOptions(**options), True)
    rows = json.loads(capsys.readouterr().out)
    return code, {row["name"]: row for row in rows}


def save_with_nan(path: Path, shape: BaseShape) -> Path:
    save_random_adapter(path, shape)
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    return write_adapter(path, config, tensors)


def test_facts_of_adapters_are_listed_and_their_bytes_add_up(tmp_path, capsys, model, shape):
    save_random_adapter(tmp_path / "swarm" / "wide", shape, rank=16)
    save_random_adapter(
        tmp_path / "swarm" / "mixed", shape, rank={"q_proj": 3, "v_proj": 7}, layers=[1],
        targets=["q_proj", "v_proj"],
    )  # fmt: skip
    code, rows = checked(capsys, tmp_path / "swarm", model=str(model), dtype="bfloat16")
    assert code == 0
    wide, mixed = rows["wide"], rows["mixed"]
    assert {row["verdict"] for row in rows.values()} == {"ok"}
    assert {row["checked_against"] for row in rows.values()} == {str(model)}
    assert (mixed["min_rank"], mixed["max_rank"], mixed["num_layers"]) == (3, 7, 1)
    assert mixed["targets"] == ["q_proj", "v_proj"]
    assert len(wide["targets"]) == 7
    assert wide["num_layers"] is None
    elements = 16 * shape.num_layers * sum(sum(sizes) for sizes in shape.target_sizes)
    assert wide["bytes_on_device"] == 2 * elements
    _, rows = checked(capsys, tmp_path / "swarm", model=str(model))
    assert rows["wide"]["bytes_on_device"] == 4 * elements, "the base is float32"


def test_one_refused_adapter_makes_the_exit_code_1_and_says_why(tmp_path, capsys, model, shape):
    save_random_adapter(tmp_path / "swarm" / "good", shape)
    save_random_adapter(tmp_path / "swarm" / "bad", shape, config_overrides={"brand_new_key": 1})
    (tmp_path / "swarm" / "empty").mkdir()
    (tmp_path / "swarm" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "swarm" / ".hidden").mkdir()
    code, rows = checked(capsys, tmp_path / "swarm", model=str(model))
    assert code == 1
    assert rows.keys() == {"good", "bad", "empty", "gone"}
    assert [name for name, row in rows.items() if row["verdict"] == "ok"] == ["good"]
    assert "brand_new_key" in rows["bad"]["reason"]
    assert "adapter_config.json is missing" in rows["empty"]["reason"]
    assert checked(capsys, tmp_path / "swarm" / "good", model=str(model))[0] == 0


def test_weights_are_read_unless_headers_are_enough(tmp_path, capsys, model, shape):
    path = save_with_nan(tmp_path / "broken", shape)
    code, rows = checked(capsys, path, model=str(model))
    assert code == 1
    assert "has NaN" in rows["broken"]["reason"]
    assert rows["broken"]["max_rank"] == 8, "what is known of a refused adapter is still shown"
    assert checked(capsys, path, model=str(model), reads_weights=False)[0] == 0


def test_values_must_fit_the_dtype(tmp_path, capsys, model, shape):
    path = save_random_adapter(tmp_path / "large", shape, std=1e6)
    assert checked(capsys, path, model=str(model))[0] == 0
    code, rows = checked(capsys, path, model=str(model), dtype="float16")
    assert code == 1
    assert "float16 ends at" in rows["large"]["reason"]


def test_the_base_that_an_adapter_names_is_used_if_it_is_here(tmp_path, capsys, model, shape):
    named = {"base_model_name_or_path": str(model)}
    save_random_adapter(tmp_path / "fits", shape, config_overrides=named)
    save_random_adapter(tmp_path / "other", SMALL_SHAPE, config_overrides=named)
    code, rows = checked(capsys, tmp_path)
    assert code == 1
    assert rows["fits"]["checked_against"] == str(model)
    assert rows["fits"]["verdict"] == "ok"
    assert "another base" in rows["other"]["reason"]


def test_a_named_base_that_cannot_be_read_is_no_fault_of_the_adapter(tmp_path, capsys, shape):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mamba"}')
    named = {"base_model_name_or_path": str(tmp_path / "base")}
    path = save_random_adapter(tmp_path / "adapter", shape, config_overrides=named)
    code, rows = checked(capsys, path)
    assert code == 0
    assert rows["adapter"]["verdict"] == "needs_model"
    assert "mamba" in rows["adapter"]["reason"]


@pytest.mark.parametrize("named", ["x" * 5000, "a\0b", "", 7, ["."]])
def test_a_base_that_is_no_directory_here_is_not_asked(tmp_path, capsys, shape, named):
    overrides = {"base_model_name_or_path": named}
    path = save_random_adapter(tmp_path / "adapter", shape, config_overrides=overrides)
    code, rows = checked(capsys, path)
    assert code == 0
    assert rows["adapter"]["checked_against"] is None


def test_without_a_base_sizes_come_from_the_tensors(tmp_path, capsys, shape):
    path = save_random_adapter(tmp_path / "alone", shape, rank=5, targets=["k_proj", "down_proj"])
    code, rows = checked(capsys, path)
    assert code == 0
    assert rows["alone"]["verdict"] == "ok"
    assert rows["alone"]["checked_against"] is None
    elements = 5 * shape.num_layers * sum(sum(shape.target_sizes[i]) for i in (1, 6))
    assert 2 * elements <= rows["alone"]["bytes_on_device"] <= 2 * elements * 1.2
    code = check([str(path)], CheckOptions(), False)
    assert code == 0
    assert "ok, not checked against a base" in capsys.readouterr().out


def test_what_no_base_could_serve_is_refused_without_one(tmp_path, capsys, shape):
    missing = save_random_adapter(tmp_path / "missing", shape)
    tensors = load_file(missing / "adapter_model.safetensors")
    del tensors[f"{LAYER}.self_attn.k_proj.lora_B.weight"]
    write_adapter(missing, json.loads((missing / "adapter_config.json").read_text()), tensors)
    write_adapter(tmp_path / "unknown", {"peft_type": "NO_SUCH"}, {"x": torch.ones(3)})
    code, rows = checked(capsys, tmp_path)
    assert code == 1
    assert {row["verdict"] for row in rows.values()} == {"refused"}
    assert "k_proj.lora_B.weight" in rows["missing"]["reason"]
    assert "NO_SUCH" in rows["unknown"]["reason"]


@pytest.mark.filterwarnings("ignore:Specified to not load vera_A")
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_no_served_method_is_refused_with_or_without_its_base(tmp_path, capsys, variant):
    model = save_tiny_model(tmp_path / "model", variant)
    for name, save in METHOD_CASES.items():
        save(load_reference(model, torch.float32), tmp_path / "swarm" / name)
        config_file = tmp_path / "swarm" / name / "adapter_config.json"
        config = json.loads(config_file.read_text()) | {"base_model_name_or_path": None}
        config_file.write_text(json.dumps(config))
    code, rows = checked(capsys, tmp_path / "swarm", model=str(model))
    assert code == 0
    assert {name: row["reason"] for name, row in rows.items()} == dict.fromkeys(METHOD_CASES)
    assert all(row["bytes_on_device"] > 0 for row in rows.values())
    assert {name for name, row in rows.items() if row["shared_bytes_on_device"]} == {
        "vera",
        "vera-regenerated",
        "miss",
        "tied-lora",
    }
    with_ranks = {name for name, row in rows.items() if row["max_rank"]}
    assert rows.keys() - with_ranks == {"only-tokens", "ln-tuning", "ia3"}
    assert "norms" in rows["saved-norms"]["targets"]
    assert "lm_head" in rows["lm-head"]["targets"]
    assert rows["trained-tokens"]["num_tokens"] == 4

    code, rows = checked(capsys, tmp_path / "swarm")
    assert code == 0
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert set(verdicts.values()) == {"ok", "needs_model"}
    for name in ("lora", "rslora", "lora-bias", "adalora", "alora"):
        assert verdicts[name] == "ok", name
    for name in ("dora", "pissa", "vera", "lm-head", "trained-tokens"):
        assert verdicts[name] == "needs_model", name


def test_a_nemo_file_is_checked_converted_and_merged(tmp_path, capsys, model, shape):
    save_random_adapter(tmp_path / "peft", shape, rank=6, alpha=12)
    file = peft_to_nemo(tmp_path / "peft", tmp_path / "made.nemo", shape, Layout(is_fused=False))
    code, rows = checked(capsys, file, model=str(model))
    assert code == 0
    assert rows["made"]["format"] == "nemo"
    assert rows["made"]["max_rank"] == 6
    assert checked(capsys, file)[0] == 0
    for source, out in ((tmp_path / "peft", "from-peft"), (file, "from-nemo")):
        merge(str(model), str(source), str(tmp_path / out), "auto")
    convert(str(file), str(tmp_path / "converted"))
    merge(str(model), str(tmp_path / "converted"), str(tmp_path / "from-converted"), "auto")
    expected, *others = (
        load_file(tmp_path / out / "model.safetensors")
        for out in ("from-peft", "from-nemo", "from-converted")
    )
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in expected.items())


def test_an_adapter_whose_tensors_tell_too_little_needs_the_model(tmp_path, capsys, shape):
    path = save_random_adapter(tmp_path / "a", shape, config_overrides={"use_qalora": True})
    code, rows = checked(capsys, path)
    assert code == 0
    assert rows["a"]["verdict"] == "needs_model"
    assert "what base it fits" in rows["a"]["reason"]


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_the_inferred_shape_agrees_with_the_base_where_tensors_tell(tmp_path, shape, layers):
    path = save_random_adapter(tmp_path / "a", shape, layers=layers)
    with open_source(path) as source:
        inferred = infer_shape(source)
    assert inferred is not None
    assert inferred.target_sizes == shape.target_sizes
    assert inferred.num_layers == max(layers) + 1


@pytest.mark.parametrize(
    ("peft_type", "name", "sizes"),
    [
        ("VERA", f"{LAYER}.self_attn.q_proj.lora_A.weight", (3, 5)),
        ("LORA", "base_model.model.lm_head.lora_A.weight", (3, 5)),
        ("LORA", f"{LAYER}.self_attn.q_proj.lora_B.weight", (5, 3)),
        ("LORA", f"{LAYER}.self_attn.q_proj.lora_A.weight", (3, 0)),
        ("LORA", f"{LAYER}.self_attn.q_proj.lora_A.weight", (5,)),
        ("LORA", "base_model.model.model.layers.999999.mlp.up_proj.lora_A.weight", (3, 5)),
    ],
)
def test_no_shape_is_inferred_from_tensors_that_do_not_tell(tmp_path, peft_type, name, sizes):
    path = write_adapter(tmp_path / "a", {"peft_type": peft_type}, {name: torch.ones(sizes)})
    with open_source(path) as source:
        assert infer_shape(source) is None


def test_tables_keep_within_the_terminal(tmp_path, capfd, model, shape):
    save_random_adapter(tmp_path / "sql", shape, rank=24)
    save_random_adapter(tmp_path / "bad", shape, config_overrides={"brand_new_key": 1})
    wide = run_here(capfd, "adapters", "check", tmp_path, "--model", model, columns=200)
    assert wide.returncode == 1
    heading, *lines = wide.stdout.splitlines()
    assert re.split(r"\s{2,}", heading)[-2:] == ["bytes on device", "verdict"]
    row = next(line for line in lines if line.startswith("sql"))
    assert re.split(r"\s{2,}", row)[:5] == ["sql", "peft", "lora", "24", "all 7"]
    narrow = run_here(capfd, "adapters", "check", tmp_path, "--model", model, columns=44)
    assert max(map(len, narrow.stdout.splitlines())) <= 44
    assert "sql: ok\n  peft lora, rank 24, all 7, " in narrow.stdout
    assert "bad: refused\n" in narrow.stdout
    assert "brand_new_key" in narrow.stdout


def test_no_adapters_make_a_table_of_headings():
    assert as_table([], 100).split()[0] == "name"


def test_headers_are_checked_without_torch(tmp_path, shape):
    path = save_random_adapter(tmp_path / "a", shape)
    code = (
        "import sys; from loraswarm.commands.adapters import CheckOptions, check; "
        f"code = check([{str(path)!r}], CheckOptions(reads_weights=False), False); "
        "sys.exit(code or bool({'torch', 'numba', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapters"], "Missing command"),
        (["adapters", "check"], "Missing argument"),
        (["adapters", "check", "/nonexistent"], "'/nonexistent' does not exist"),
        (["adapters", "check", "MODEL/config.json"], "config.json' is not a directory"),
        (["adapters", "check", "MODEL"], "holds no adapters"),
        (["adapters", "check", "ADAPTER", "--model", "/nonexistent"], "no such directory"),
        (["adapters", "check", "ADAPTER", "--model", "ADAPTER"], "has no config.json"),
        (["adapters", "check", "ADAPTER", "--dtype", "int3"], "--dtype is 'int3'"),
        (["adapters", "convert", "/nonexistent", "-o", "OUT"], "'/nonexistent' does not exist"),
        (["adapters", "convert", "ADAPTER", "-o", "MODEL"], "is not empty"),
        (["adapters", "convert", "MODEL", "-o", "OUT"], "adapter_config.json is missing"),
        (["merge", "MODEL", "ADAPTER"], "Missing option"),
        (["merge", "MODEL", "/nonexistent", "-o", "OUT"], "'/nonexistent' does not exist"),
        (["merge", "/nonexistent", "ADAPTER", "-o", "OUT"], "no such directory"),
        (["merge", "ADAPTER", "ADAPTER", "-o", "OUT"], "has no config.json"),
        (["merge", "MODEL", "MODEL", "-o", "OUT"], "adapter_config.json is missing"),
        (["merge", "MODEL", "ADAPTER", "-o", "MODEL"], "is not empty"),
        (["merge", "MODEL", "ADAPTER", "-o", "OUT", "--dtype", "int3"], "--dtype is 'int3'"),
        (["merge", "MODEL", "ADAPTER", "-o", "MODEL/config.json/x"], "cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, capfd, model, shape, arguments, message):
    adapter = save_random_adapter(tmp_path / "adapter", shape)
    places = {"MODEL": model, "ADAPTER": adapter, "OUT": tmp_path / "out"}
    filled = [re.sub("MODEL|ADAPTER|OUT", lambda m: str(places[m[0]]), text) for text in arguments]
    done = run_here(capfd, *filled)
    assert message in error_line(done)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


def test_convert_writes_what_peft_writes(tmp_path, capfd, model, shape):
    source = save_random_adapter(tmp_path / "source", shape)
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    done = run_process("adapters", "convert", source, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    converted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    checking = run_here(capfd, "adapters", "check", tmp_path / "out", "--model", model)
    assert checking.returncode == 0


@pytest.mark.parametrize("arguments", [["adapters"], ["adapters", "check"], ["merge"]])
def test_help_needs_no_torch(arguments):
    code = (
        "import sys; from loraswarm.__main__ import app; "
        f"app({[*arguments, '--help']!r}, standalone_mode=False); "
        "sys.exit(bool({'torch', 'numba', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_a_mistyped_path_is_an_error_of_its_own():
    with pytest.raises(ConfigError, match="does not exist"):
        check(["/nonexistent"], CheckOptions(), False)


def test_of_a_hub_model_only_the_config_is_fetched_for_headers(
    tmp_path, capsys, monkeypatch, model, shape
):
    asked = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(model)

    monkeypatch.setattr("loraswarm.models.hub.snapshot_download", download)
    save_random_adapter(tmp_path / "a", shape)
    for reads_weights in (False, True):
        options = CheckOptions(model="owner/name", reads_weights=reads_weights)
        assert check([str(tmp_path)], options, is_json=True) == 0
    assert asked[0] == ["config.json"]
    assert "model*.safetensors" in asked[1]
    assert "ok" in capsys.readouterr().out
