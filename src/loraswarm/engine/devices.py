"""The device an engine computes on: what "auto" means, its kernels, its threads, its memory.

Knows no model. Called by engine/setup.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import psutil
import torch

from loraswarm.config import Device
from loraswarm.errors import ConfigError
from loraswarm.kernels import Kernels

MAX_CPU_POOL_BYTES = 4 << 30
CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def resolve_device(device: Device) -> torch.device:
    """The device that is meant; "auto" is the CPU: what computes on CUDA has yet to be run there.

    Raises   ConfigError if "cuda" is asked for and cannot be had.
    """
    if device != "cuda":
        return torch.device("cpu")
    fault = _cuda_fault()
    if fault is not None:
        raise ConfigError(f"device 'cuda' cannot be used: {fault}; use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _cuda_fault() -> str | None:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "its kernels need the package triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, which runs its kernels on the CPU"
    try:
        torch.cuda.current_device()
    except RuntimeError as error:  # a driver that is too old, a device that another process has
        return str(error).partition("\n")[0]
    return None


def load_kernels(device: torch.device) -> Kernels:
    """The kernels for a device; imports what they are written in."""
    if device.type == "cuda":
        from loraswarm.kernels import triton

        return triton
    from loraswarm.kernels import cpu

    return cpu


def set_threads(device: torch.device, wanted: int | None) -> int:
    """Let torch, and the kernels if they run on the CPU, use `wanted` threads; None: the physical
    cores. Returns how many.

    Raises   ConfigError if there are not so many.
    """
    num_threads = wanted or physical_cores()
    if device.type == "cpu":
        from loraswarm.kernels import cpu

        num_threads = wanted or min(num_threads, cpu.max_num_threads())
        try:
            cpu.set_num_threads(num_threads)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    torch.set_num_threads(num_threads)
    return num_threads


def default_pool_bytes(device: torch.device, utilization: float, step_bytes: int) -> int:
    """Bytes for the page pool once the weights are loaded, a share of what is available less what
    a step takes."""
    if device.type == "cuda":
        return max(0, int(utilization * (free_bytes(device) - step_bytes)))
    return min(MAX_CPU_POOL_BYTES, int(utilization * free_bytes(device)))


def free_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that nobody has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def memory_report(device: torch.device) -> str:
    """How much of the device's memory is free, for messages."""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return f"{device} has {free_bytes:,} of {total_bytes:,} bytes free"
    memory = psutil.virtual_memory()
    return f"this machine has {memory.available:,} of {memory.total:,} bytes free"


def physical_cores() -> int:
    """Cores this process may run on and be busy on, without hyper-threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(allowed or 1, psutil.cpu_count(logical=False) or 1)
    return max(1, min(cores, _cpu_quota(CPU_QUOTA_FILE) or cores))


def _cpu_quota(file: Path) -> int | None:
    """CPUs that a container may use at once, at least 1; None if nothing limits them."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # not Linux, another version of control groups, or "max"
        return None
