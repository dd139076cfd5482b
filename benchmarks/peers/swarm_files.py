"""The model and the adapters that every peer serves: random weights, one set of files for all.

benchmarks/random_swarm writes them; the tokenizer is replaced by one that has a text for every id
of the model, because peers send no event for a token without text, or hold it back. Knows nothing
about peers. Used by peer, and by the peers' own conversions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
END_TOKEN = "<|endoftext|>"
# Fewer are always there: the alphabet of bytes, the end token and one merge.
NUM_RESERVED = 258


@dataclass(frozen=True, slots=True)
class Swarm:
    """A directory with `model` and `adapters/a000` and on."""

    path: Path
    size: str
    num_adapters: int
    ranks: str

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"a{index:03}" for index in range(self.num_adapters))

    @property
    def rank_of(self) -> dict[str, int]:
        """By the adapter's name; the ranks take turns, as random_swarm writes them."""
        ranks = [int(rank) for rank in self.ranks.split(",")]
        return {name: ranks[index % len(ranks)] for index, name in enumerate(self.names)}

    @property
    def vocab_size(self) -> int:
        return int(json.loads((self.model / "config.json").read_text())["vocab_size"])

    @property
    def weight_bytes(self) -> int:
        """Of the model's matrices: what a server reads of it for a token of one stream."""
        return sum(file.stat().st_size for file in self.model.glob("*.safetensors"))


def write_swarm_once(work: Path, size: str, num_adapters: int, ranks: str) -> Swarm:
    """The files under `work`, written unless a complete set is there."""
    name = f"swarm-{size}-{num_adapters}-r{ranks.replace(',', '-')}"
    swarm = Swarm(work / name, size, num_adapters, ranks)
    done = swarm.path / "complete"
    if done.exists():
        return swarm
    command = [sys.executable, str(BENCHMARKS / "random_swarm.py"), str(swarm.path)]
    command += ["--size", size, "--adapters", str(num_adapters), "--ranks", ranks]
    subprocess.run(command, check=True)
    write_tokenizer(swarm.model, swarm.vocab_size)
    done.touch()
    return swarm


def write_tokenizer(model: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, all but the bytes plain ASCII.

    Token 0 ends a text, as the model's config says. Nothing here encodes text with it: prompts
    are token ids.
    """
    if vocab_size < NUM_RESERVED:
        raise ValueError(f"vocab_size {vocab_size} is below {NUM_RESERVED}")
    tokens = [END_TOKEN, *_byte_alphabet(), "th"]
    tokens += [f"Ġw{index}" for index in range(vocab_size - len(tokens))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(0, END_TOKEN)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [["t", "h"]],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    text = json.dumps(tokenizer, ensure_ascii=False)
    (model / "tokenizer.json").write_text(text, encoding="utf-8")
    (model / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (model / "chat_template.jinja").unlink(missing_ok=True)


def _added(index: int, text: str) -> dict[str, object]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": index, "content": text, "special": True} | dict.fromkeys(flags, False)


def _byte_alphabet() -> list[str]:
    """One printable character for each byte, as byte-level BPE writes them (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
