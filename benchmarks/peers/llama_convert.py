"""Makes GGUF files of the model and the adapters; run by llama_cpp with its own interpreter.

    python llama_convert.py SOURCE_OF_LLAMA_CPP SWARM OUT NUM_ADAPTERS

llama.cpp's converters refuse a tokenizer whose way of splitting text they do not know; prompts
here are token ids, so any name of one will do.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

PRE_TOKENIZER = "qwen2"


def main() -> None:
    if sys.argv[1] == "--one":
        convert_one(Path(sys.argv[2]), sys.argv[3:])
        return
    source, swarm, out = (Path(argument) for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    model = swarm / "model"
    types = ["--outtype", "bf16"]
    _convert(source, out / "model.gguf", ["convert_hf_to_gguf.py", str(model), *types])
    for index in range(int(sys.argv[4])):
        name = f"a{index:03}"
        adapter = [str(swarm / "adapters" / name), "--base", str(model), *types]
        _convert(source, out / f"{name}.gguf", ["convert_lora_to_gguf.py", *adapter])


def convert_one(source: Path, arguments: list[str]) -> None:
    """Run one converter in this process, with the name of the pre-tokenizer given."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    sys.argv = [str(source / arguments[0]), *arguments[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _convert(source: Path, out: Path, arguments: list[str]) -> None:
    """Each in a process of its own: the converters keep state in their modules."""
    if out.exists():
        return
    part = out.with_suffix(".part")
    command = [sys.executable, __file__, "--one", str(source), *arguments, "--outfile", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    os.rename(part, out)


if __name__ == "__main__":
    main()
