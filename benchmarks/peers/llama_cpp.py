"""llama.cpp's server, built here from the source that `llama-cpp-python` carries.

    python benchmarks/peers/llama_cpp.py --workloads base,uniform

A request names its adapter by its place in the list the server was started with. One that names
none gets the sum of all of them, so a request for the base names one with scale 0. Needs cmake and
a C++ compiler.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from peer import BASE_NAME, REQUEST_TIMEOUT_S, HttpPeer, Setting
from venvs import TORCH, make_venv_once, run_pip
from workloads import CONCURRENCY, Workload

from loraswarm.bench.http_target import HttpTarget
from loraswarm.bench.records import PlannedRequest

VERSION = "0.3.36"
STEPS = (("install", TORCH), ("install", "transformers==5.23.0", "gguf==0.19.0", "sentencepiece"))
BUILD_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
NUM_BUILD_JOBS = 3
SLOT_STEP_TOKENS = 64


class LlamaCpp(HttpPeer):
    """bf16 model and adapters; the K/V cache has room for what is in flight, and no more."""

    name = "llama.cpp"

    def install(self, setting: Setting) -> None:
        directory = setting.work / "llama"
        python = make_venv_once(directory / "venv", STEPS, setting.uses_torch_index)
        _unpack_once(python, directory)
        _build_once(directory)
        swarm = setting.swarm
        script = Path(__file__).with_name("llama_convert.py")
        arguments = [_source(directory), swarm.path, _gguf(setting), swarm.num_adapters]
        subprocess.run([str(python), str(script), *map(str, arguments)], check=True)

    def versions(self, setting: Setting) -> dict[str, str]:
        server = [str(_server(setting.work / "llama")), "--version"]
        printed = subprocess.run(server, capture_output=True, text=True, check=True)
        lines = (printed.stdout + printed.stderr).splitlines()
        about = next((line for line in lines if "version" in line), "unknown")
        return {"llama.cpp": about, "llama-cpp-python": VERSION}

    def command(self, setting: Setting, workload: Workload, port: int) -> list[str]:
        files = [str(_gguf(setting) / f"{name}.gguf") for name in setting.swarm.names]
        threads = str(setting.num_threads)
        slot_tokens = -(-(workload.longest_tokens + 1) // SLOT_STEP_TOKENS) * SLOT_STEP_TOKENS
        command = [str(_server(setting.work / "llama")), "-m", str(_gguf(setting) / "model.gguf")]
        command += ["--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads]
        command += ["-np", str(CONCURRENCY), "-c", str(CONCURRENCY * slot_tokens)]
        command += ["--cache-ram", "0", "--no-cache-prompt"]
        return [*command, "--lora", ",".join(files), "--lora-init-without-apply"]

    def target(self, url: str, setting: Setting) -> HttpTarget:
        """With a new connection for each request: under load it closes those that are kept."""
        places = {name: place for place, name in enumerate(setting.swarm.names)}

        def body_of(request: PlannedRequest) -> dict[str, Any]:
            adapter = request.adapter
            chosen = {"id": 0, "scale": 0.0}
            if adapter is not None:
                chosen = {"id": places[adapter], "scale": 1.0}
            return {
                "model": BASE_NAME,
                "prompt": request.prompt_token_ids,
                "max_tokens": request.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "lora": [chosen],
            }

        return HttpTarget(
            url, BASE_NAME, timeout_s=REQUEST_TIMEOUT_S, keeps_alive=False, body_of=body_of
        )


def _unpack_once(python: Path, directory: Path) -> None:
    if _source(directory).exists():
        return
    name = f"llama-cpp-python=={VERSION}"
    arguments = ["download", "--no-deps", "--no-binary", ":all:", "-d", str(directory), name]
    run_pip(python, arguments)
    with tarfile.open(directory / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
        archive.extractall(directory, filter="data")


def _build_once(directory: Path) -> None:
    if _server(directory).exists():
        return
    build = str(directory / "build")
    configure = ["cmake", "-S", str(_source(directory)), "-B", build, *BUILD_OPTIONS]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    make = ["cmake", "--build", build, "--target", "llama-server", "-j", str(NUM_BUILD_JOBS)]
    subprocess.run(make, check=True, stdout=sys.stderr)


def _source(directory: Path) -> Path:
    return directory / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"


def _server(directory: Path) -> Path:
    return directory / "build" / "bin" / "llama-server"


def _gguf(setting: Setting) -> Path:
    return setting.swarm.path / "gguf"


if __name__ == "__main__":
    from session import main

    main([LlamaCpp()])
