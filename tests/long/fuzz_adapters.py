"""Mutates valid adapter files of every format: each must be read, or refused by an AdapterError.

    python tests/long/fuzz_adapters.py [--inputs 100000] [--seed 0]

Any other exception, a result after MAX_SECONDS, or a message of more than one line is a failure and
prints the seed of its input; `--seed THAT --inputs 1` repeats it. tests/test_fuzz_slice.py runs a
few inputs of each kind with every test run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, random_tensors
from loraswarm.adapters.printable import MAX_MESSAGE_CHARACTERS
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.source import open_source
from loraswarm.core.base_shape import TARGETS, BaseShape
from loraswarm.errors import AdapterError
from nemo_factory import Layout, nemo_config, shared_a, state_dicts, write_nemo

MAX_SECONDS = 5.0
PICKLE_FILE = "adapter_model.bin"
NEMO_FILE = "a.nemo"
YAML_MEMBER = "model_config.yaml"
SHAPE = BaseShape(
    num_layers=2,
    num_kv_heads=2,
    head_size=3,
    vocab_size=11,
    target_sizes=((12, 12), (12, 6), (12, 6), (12, 12), (12, 14), (12, 14), (14, 12)),
)
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": list(TARGETS),
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {},
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "modules_to_save": None,
    "layers_to_transform": None,
    "exclude_modules": None,
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "init_lora_weights": True,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
PEFT_TYPES = ("LORA", "ADALORA", "VERA", "LOHA", "LOKR", "IA3", "MISS", "OFT", "VBLORA", "DELORA")
VALUES: Sequence[Any] = (
    None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("inf"),
    float("nan"), "", "none", "all", "q_proj", "all-linear", "(.*)*", "[", "\ud800", "\x00\n",
    [], ["q_proj"], ["lm_head"], ["embed_tokens"], ["norm"], [0], [None], [[]], [2**70],
    {}, {"q_proj": 2}, {"a": {}}, {"": 1}, "pissa", "gaussian", "canonical", "x" * 5000,
)  # fmt: skip
# Words that YAML libraries take for more than text.
YAML_WORDS = (
    b"!!bool ", b"!!int ", b"!!float ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!omap ",
    b"!!python/name:os ", b"!x ", b"&a ", b"*a ", b"<<: ", b"? ", b"- ", b"0x_", b"0b_", b"1:1:",
    b".inf", b"2001-99-99", b"{", b"[", b"|\n", b"%YAML 9\n", b"---\n", b"\"\\x1b\"", b"=",
)  # fmt: skip
BYTES = (0, 1, 2, 4, 10, 32, 40, 46, 71, 82, 93, 125, 127, 128, 255)

Files = dict[str, bytes]
Mutate = Callable[[Files, random.Random], Files]


class Fuzzer:
    """Valid files of every format, and ways to spoil them; `directory` is written over."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        tensors = shared_a(random_tensors(SHAPE, dict.fromkeys(TARGETS, 2), range(2)))
        config = json.dumps(CONFIG).encode()
        self._safetensors = {CONFIG_FILE: config, WEIGHTS_FILE: self._saved(tensors, "safe")}
        self._pickle = {CONFIG_FILE: config, PICKLE_FILE: self._saved(tensors, "bin")}
        self._layouts = [
            Layout(),
            Layout(is_fused=False, has_dot_prefix=True),
            Layout(tensor_parallel=2, pipeline_parallel=2),
        ]
        self._states = [state_dicts(tensors, SHAPE, layout) for layout in self._layouts]
        self._configs = [nemo_config(SHAPE, set(TARGETS), 2, layout) for layout in self._layouts]
        self._archives = [
            self._packed(*parts)
            for parts in zip(self._configs, self._states, self._layouts, strict=True)
        ]
        self.kinds: dict[str, Callable[[random.Random], Files]] = {
            "config": lambda rng: self._safetensors | _spoil_config(rng),
            "config bytes": lambda rng: _spoil(self._safetensors, CONFIG_FILE, rng),
            "safetensors": lambda rng: _spoil_header(self._safetensors, rng),
            "safetensors bytes": lambda rng: _spoil(self._safetensors, WEIGHTS_FILE, rng),
            "pickle": lambda rng: _spoil_pickle(self._pickle, rng),
            "pickle bytes": lambda rng: _spoil(self._pickle, PICKLE_FILE, rng),
            "nemo config": self._nemo_config,
            "nemo yaml": self._nemo_yaml,
            "nemo bytes": self._nemo_bytes,
            "nemo gzip": self._nemo_gzip,
        }

    def check_valid(self) -> None:
        """The files as they are must be read, or nothing that follows means anything."""
        whole = [self._safetensors, self._pickle, *({NEMO_FILE: data} for data in self._archives)]
        for files in whole:
            assert self._outcome(files) == "read", list(files)

    def run(self, seed: int) -> tuple[str, str]:
        """Kind and outcome ("read" or "refused") of one input.

        Raises    whatever is a failure.
        """
        rng = random.Random(seed)
        kind = rng.choice(list(self.kinds))
        files = self.kinds[kind](rng)
        start_s = time.perf_counter()
        outcome = self._outcome(files)
        elapsed_s = time.perf_counter() - start_s
        assert elapsed_s < MAX_SECONDS, f"{elapsed_s:.1f} s"
        return kind, outcome

    def _outcome(self, files: Files) -> str:
        for path in self._directory.iterdir():
            path.unlink()
        for name, content in files.items():
            (self._directory / name).write_bytes(content)
        message = None
        try:
            read_adapter_info(self._directory, "a", SHAPE)
            with open_source(self._directory) as source:
                for name in source.tensors:
                    source.read(name)
        except AdapterError as error:
            message = str(error)
        if message is None:
            return "read"
        assert len(message) <= MAX_MESSAGE_CHARACTERS, "a long message"
        assert message.isprintable(), "a message of several lines, or with terminal escapes"
        return "refused"

    def _saved(self, tensors: dict[str, torch.Tensor], kind: str) -> bytes:
        from safetensors.torch import save

        if kind == "safe":
            return save(tensors)
        torch.save(tensors, self._directory / "x")
        return (self._directory / "x").read_bytes()

    def _packed(self, config: Any, states: Any, layout: Layout) -> bytes:
        return write_nemo(self._directory / NEMO_FILE, config, states, layout).read_bytes()

    def _nemo_config(self, rng: random.Random) -> Files:
        """One value of the config is another."""
        index = rng.randrange(len(self._configs))
        config = json.loads(json.dumps(self._configs[index]))
        section = rng.choice([config, config["peft"], config["peft"]["lora_tuning"]])
        section[rng.choice([*section, "new_key"])] = random_value(rng)
        text = yaml.safe_dump(json.loads(json.dumps(config)), allow_unicode=False)
        return self._with_yaml(index, text.encode())

    def _nemo_yaml(self, rng: random.Random) -> Files:
        index = rng.randrange(len(self._configs))
        text = bytearray(yaml.safe_dump(self._configs[index]).encode())
        for _ in range(rng.randint(0, 2)):
            # In place of a value, or anywhere.
            colons = [place + 2 for place in range(len(text)) if text[place : place + 1] == b":"]
            place = rng.choice(colons) if rng.random() < 0.7 else rng.randrange(len(text))
            text[place : place + rng.choice([0, 0, 1, 9])] = rng.choice(YAML_WORDS)
        return self._with_yaml(index, _mutated(text, rng) if rng.random() < 0.5 else bytes(text))

    def _with_yaml(self, index: int, text: bytes) -> Files:
        """Replaces the archive's first member, whose header has the size and a checksum."""
        archive = self._archives[index]
        name = archive.index(YAML_MEMBER.encode())
        name -= 2 if self._layouts[index].has_dot_prefix else 0
        header = bytearray(archive[name : name + 512])
        old_size = int(header[124:135], 8)
        header[124:136] = b"%011o\0" % len(text)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        rest = archive[name + 512 + -(-old_size // 512) * 512 :]
        padded = text + bytes(-len(text) % 512)
        return {NEMO_FILE: archive[:name] + bytes(header) + padded + rest}

    def _nemo_bytes(self, rng: random.Random) -> Files:
        return {NEMO_FILE: _mutated(rng.choice(self._archives), rng)}

    def _nemo_gzip(self, rng: random.Random) -> Files:
        packed = gzip.compress(rng.choice(self._archives), 1)
        return {NEMO_FILE: _mutated(packed, rng) if rng.random() < 0.9 else packed}


def random_value(rng: random.Random) -> Any:
    """Any JSON value, mostly one that some key of a config takes."""
    value = rng.choice(VALUES)
    if rng.random() < 0.2:
        value = rng.choice([[value], {"q_proj": value}, {"k": [value]}])
    return value


def _spoil_config(rng: random.Random) -> Files:
    config: dict[str, Any] = dict(CONFIG)
    if rng.random() < 0.3:
        config["peft_type"] = rng.choice(PEFT_TYPES)
    for _ in range(rng.randint(1, 3)):
        config[rng.choice([*CONFIG, "new_key", "layers_pattern", "init_r"])] = random_value(rng)
    return {CONFIG_FILE: json.dumps(config).encode()}


def _spoil_header(files: Files, rng: random.Random) -> Files:
    """The header stays JSON of its true length."""
    data = files[WEIGHTS_FILE]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(list(header))
    match rng.randrange(4):
        case 0:
            header[name][rng.choice(["dtype", "shape", "data_offsets", "new"])] = random_value(rng)
        case 1:
            header[rng.choice([*header, "x", "\n"])] = header.pop(name)
        case 2:
            header[name] = random_value(rng)
        case _:
            field = rng.choice(["shape", "data_offsets"])
            header[name][field][rng.randrange(2)] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    return files | {WEIGHTS_FILE: len(text).to_bytes(8, "little") + text + data[8 + length :]}


def _spoil_pickle(files: Files, rng: random.Random) -> Files:
    """Only bytes of the pickle itself and of the zip's directory."""
    data = bytearray(files[PICKLE_FILE])
    begin = data.index(b"\x80\x02}")
    end = data.index(b"PK", begin)
    if rng.random() < 0.3:
        begin, end = data.index(b"PK\1\2"), len(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(begin, end)
        data[place] = rng.choice([rng.choice(BYTES), data[rng.randrange(begin, end)]])
    return files | {PICKLE_FILE: bytes(data)}


def _spoil(files: Files, name: str, rng: random.Random) -> Files:
    return files | {name: _mutated(files[name], rng)}


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, or a part lost, doubled, or moved; more often near the begin and the end."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        size = len(result)
        reach = size if rng.random() < 0.3 else min(size, 2048)
        begin = rng.randrange(reach) if reach else 0
        if rng.random() < 0.3:
            begin = max(0, size - 1 - begin)
        end = min(size, begin + rng.choice([1, 2, 7, 133, 1000]))
        match rng.randrange(6):
            case 0 | 1:
                for place in range(begin, min(end, begin + 4)):
                    result[place] = rng.choice(BYTES)
            case 2:
                del result[begin:end]
            case 3:
                result[begin:begin] = result[begin:end]
            case 4:
                del result[begin:]
            case _:
                result[begin:end] = rng.randbytes(end - begin)
    return bytes(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = 0
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        fuzzer = Fuzzer(Path(directory))
        fuzzer.check_valid()
        for seed in range(options.seed, options.seed + options.inputs):
            try:
                outcomes[fuzzer.run(seed)] += 1
            except Exception as error:
                failures += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:20} {outcome:8} {count:7}")
    elapsed_s = time.perf_counter() - start_s
    print(f"{options.inputs} inputs, {failures} failures, {elapsed_s:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
