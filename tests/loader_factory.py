"""A tiny base and adapters on disk for tests of the loader, and ways to wait for its results."""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapter_factory import save_random_adapter
from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.local_store import LocalStore
from loraswarm.adapters.reading import read_adapter, read_adapter_info, stamped
from loraswarm.adapters.stores import Found
from loraswarm.core.base_shape import BaseShape
from loraswarm.engine.loader import Loader
from loraswarm.engine.loader_jobs import Job, Loaded, LoadJob, Result
from loraswarm.engine.loader_worker import WorkerSpec
from loraswarm.kernels import reference
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.image import AdapterImage, pack_adapter
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from model_factory import load_ours

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WAIT_S = 120.0


def shape_at(path: Path) -> BaseShape:
    """The sizes of the base in `path`/model."""
    return decoder_config(read_config(path / "model")).shape()


def spec_of(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> WorkerSpec:
    """A worker for `path`/model and `path`/adapters."""
    (path / "adapters").mkdir(exist_ok=True)
    defaults: dict[str, Any] = {
        "roots": (str(path / "adapters"),),
        "shape": shape_at(path),
        "geometry": page_geometry(shape_at(path), dtype.itemsize),
        "dtype_name": DTYPE_NAMES[dtype],
        "model_path": str(path / "model"),
        "model_name": "tiny",
        "host_cache_bytes": 1 << 30,
    }
    return WorkerSpec(**(defaults | options))


def save_lora(path: Path, name: str, **options: Any) -> Found:
    """A random adapter `path`/adapters/`name`, as a scan would find it."""
    save_random_adapter(path / "adapters" / name, shape_at(path), **options)
    return found_at(path, name)


def found_at(path: Path, name: str) -> Found:
    """What lies at `path`/adapters/`name` now, or would."""
    place = path / "adapters" / name
    if not place.exists():
        return Found(name, str(place), "gone")
    found = LocalStore(str(path / "adapters")).locate(name)
    assert found is not None
    return found


def expected_image(path: Path, found: Found, dtype: torch.dtype = torch.float32) -> AdapterImage:
    """The image of an adapter as it is read with the engine's own decoder."""
    shape = shape_at(path)
    decoder = load_ours(path / "model", dtype, reference)
    info = read_adapter_info(Path(found.location), found.name, shape)
    adapter = read_adapter(info, decoder, dtype)
    geometry = page_geometry(shape, dtype.itemsize)
    image = pack_adapter(adapter, shape, geometry, lambda size: np.zeros(size, dtype=np.uint8))
    return replace(image, info=stamped(image.info, found.stamp))


def assert_same_image(image: AdapterImage, expected: AdapterImage) -> None:
    """Byte for byte, with the same description."""
    assert image.info == expected.info
    assert image.info.plan is None
    assert expected.own.any()
    assert np.array_equal(image.own, expected.own)
    assert image.shared.keys() == expected.shared.keys()
    for matrix, values in expected.shared.items():
        assert np.array_equal(image.shared[matrix], values)


def results_of(loader: Loader, *jobs: Job) -> list[Result]:
    """Submit the jobs; their results in the order of the jobs."""
    for job in jobs:
        loader.submit(job)
    results = wait_for(loader, len(jobs))
    numbers = [job.job_id for job in jobs]
    assert sorted(result.job_id for result in results) == sorted(numbers)
    return sorted(results, key=lambda result: numbers.index(result.job_id))


def wait_for(loader: Loader, num_results: int) -> list[Result]:
    """The next results, waited for by the loader's descriptor."""
    results: list[Result] = []
    deadline = time.monotonic() + WAIT_S
    while len(results) < num_results:
        left = deadline - time.monotonic()
        assert left > 0, f"{len(results)} of {num_results} results after {WAIT_S} s"
        select.select([loader.fileno()], [], [], left)
        results += loader.take_done()
    return results


def load(loader: Loader, found: Found, job_id: int = 1) -> Loaded:
    """Load one adapter, which must succeed."""
    (result,) = results_of(loader, LoadJob(job_id, found))
    assert isinstance(result, Loaded), result
    return result


def described(path: Path, found: Found) -> AdapterInfo:
    """The description of what was found, as the identity of a generation."""
    info = read_adapter_info(Path(found.location), found.name, shape_at(path))
    return stamped(info, found.stamp)


def num_descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_open_images(pid: int | str = "self") -> int:
    """Open memory files of images."""
    links = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            links += "loraswarm-image" in os.readlink(f"/proc/{pid}/fd/{name}")
    return links


def num_mappings_of_images(pid: int | str = "self") -> int:
    """Mapped memory files of images."""
    return Path(f"/proc/{pid}/maps").read_text().count("loraswarm-image")
