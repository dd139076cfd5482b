"""The loader in a process of its own: the same images, and no harm to the engine if it dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loader_factory import (
    assert_same_image,
    described,
    expected_image,
    found_at,
    load,
    num_descriptors,
    num_mappings_of_images,
    num_open_images,
    results_of,
    save_lora,
    spec_of,
    wait_for,
)
from loraswarm.engine import loader_process
from loraswarm.engine.loader_frames import Frame, MemoryFiles, receive
from loraswarm.engine.loader_jobs import (
    JobFailed,
    Loaded,
    LoadJob,
    ScanDone,
    ScanJob,
    Surveyed,
    SurveyJob,
    WatchJob,
)
from loraswarm.engine.loader_process import ProcessLoader
from method_cases import METHOD_CASES
from model_factory import save_tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base and adapters."""
    path = tmp_path_factory.mktemp("loader")
    save_tiny_model(path / "model", "llama-biased")
    model = AutoModelForCausalLM.from_pretrained(path / "model").eval()
    for name in ("dora", "vera"):
        METHOD_CASES[name](model, path / "adapters" / name)
    for rank in (1, 7, 33):
        save_lora(path, f"rank-{rank}", rank=rank, seed=rank)
    (path / "adapters" / "bad").mkdir()
    (path / "adapters" / "bad" / "adapter_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def loader(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessLoader]:
    """One process for all tests that do not end it; it downloads to a directory of its own."""
    downloads = tmp_path_factory.mktemp("downloads")
    loader = ProcessLoader(spec_of(home, torch.bfloat16, download_dir=str(downloads)))
    yield loader
    loader.close()
    assert not list(downloads.iterdir())


@pytest.mark.parametrize("name", ["rank-1", "rank-7", "rank-33", "dora", "vera"])
def test_images_cross_processes_unchanged(home: Path, loader: ProcessLoader, name: str):
    image = load(loader, found_at(home, name)).image
    assert_same_image(image, expected_image(home, found_at(home, name), torch.bfloat16))
    for values in (image.own, *image.shared.values()):
        assert not values.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


def test_matrices_at_hand_stay_where_they_are(home: Path, loader: ProcessLoader):
    found = found_at(home, "vera")
    matrices = described(home, found).shared_matrices()
    (result,) = results_of(loader, LoadJob(1, found, frozenset(matrices)))
    assert isinstance(result, Loaded)
    assert result.image.shared == {}


def test_other_jobs_cross_too(home: Path, loader: ProcessLoader):
    bad, good = found_at(home, "bad"), found_at(home, "rank-7")
    surveyed, failed, scanned = results_of(
        loader, SurveyJob(7, (bad, good)), LoadJob(8, bad), ScanJob(9)
    )
    assert isinstance(surveyed, Surveyed)
    assert [found for found, _ in surveyed.rows] == [bad, good]
    assert isinstance(failed, JobFailed)
    assert (failed.error.http_status, "'bad'" in failed.error.message) == (422, True)
    assert isinstance(scanned, ScanDone)
    assert scanned.change.is_first


def test_the_process_gives_way_and_leaves_signals_to_the_engine(home: Path, loader: ProcessLoader):
    load(loader, found_at(home, "rank-7"))
    pid = loader.pid
    assert pid is not None
    for thread in os.listdir(f"/proc/{pid}/task"):
        assert os.sched_getscheduler(int(thread)) == os.SCHED_IDLE
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    load(loader, found_at(home, "rank-7"))
    assert loader.pid == pid


def test_images_hold_no_descriptors_and_go_with_their_last_reference(
    home: Path, loader: ProcessLoader
):
    load(loader, found_at(home, "vera"))
    assert wait_until(lambda: num_mappings_of_images() == 0)
    before = num_descriptors()
    images = [load(loader, found_at(home, "vera"), number).image for number in range(20)]
    assert num_descriptors() == before
    assert num_mappings_of_images() == 60  # own, and two shared matrices
    part = images[0].own[3:7]
    kept = bytes(part)
    del images
    assert wait_until(lambda: num_mappings_of_images() == 1)
    assert bytes(part) == kept
    del part
    assert wait_until(lambda: num_mappings_of_images() == 0)


def test_loading_leaks_nothing(home: Path, loader: ProcessLoader, tmp_path: Path):
    names = ("rank-7", "dora", "vera", "rank-33", "bad")
    pid = loader.pid
    assert pid is not None

    def load_all(num_loads: int) -> None:
        for number in range(0, num_loads, len(names)):
            jobs = [LoadJob(number + i, found_at(home, name)) for i, name in enumerate(names)]
            results = results_of(loader, *jobs)
            assert [type(result) for result in results[-2:]] == [Loaded, JobFailed]

    def counts() -> tuple[int, ...]:
        threads = threading.active_count(), len(os.listdir(f"/proc/{pid}/task"))
        return num_descriptors(), num_descriptors(pid), *threads

    load_all(20)
    assert wait_until(lambda: num_open_images(pid) == 0)
    before = counts()
    load_all(200)
    assert wait_until(lambda: counts() == before), (before, counts())
    assert wait_until(lambda: num_mappings_of_images() == 0)
    assert loader.pid == pid


def test_images_in_files_come_back_after_a_restart(home: Path, tmp_path: Path):
    spec = spec_of(home, host_cache_dir=str(tmp_path / "cache"))
    for is_from_file in (False, True):
        loader = ProcessLoader(spec)
        result = load(loader, found_at(home, "vera"))
        assert result.is_from_file == is_from_file
        assert_same_image(result.image, expected_image(home, found_at(home, "vera")))
        loader.close()


def test_a_killed_process_fails_its_jobs_and_is_started_again(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    loader = ProcessLoader(spec_of(home, download_dir=str(tmp_path)))
    found = found_at(home, "rank-7")
    kept = load(loader, found).image
    watched = dataclasses.replace(found, name="watched", stamp="before", is_by_request=True)
    loader.submit(WatchJob(2, watched))
    first = loader.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    for number in (3, 4):
        loader.submit(LoadJob(number, found))
    os.kill(first, signal.SIGKILL)
    lost = wait_for(loader, 2)
    assert {result.job_id for result in lost} == {3, 4}
    for result in lost:
        assert isinstance(result, JobFailed)
        assert (result.error.http_status, result.error.error_type) == (503, "store_error")
        assert "interrupted" in result.error.message
    (scanned,) = results_of(loader, ScanJob(5))
    assert isinstance(scanned, ScanDone)
    change = scanned.change
    assert "watched" in {each.name for each in (*change.found, *change.pending)}
    assert loader.pid not in (None, first)
    assert not Path(f"/proc/{first}").exists()
    assert_same_image(kept, load(loader, found, 6).image)
    loader.close()
    assert not list(tmp_path.iterdir())


def test_a_process_that_keeps_dying_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader_process, "MAX_STARTS_PER_MINUTE", 1)
    loader = ProcessLoader(spec_of(home))
    pid = loader.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: loader.pid is None)
    (result,) = results_of(loader, LoadJob(0, found_at(home, "rank-7")))
    assert isinstance(result, JobFailed)
    assert result.error.http_status == 503
    assert "within a minute" in result.error.message
    loader.close()


def test_a_process_that_cannot_begin_says_why(home: Path, tmp_path: Path):
    spec = dataclasses.replace(spec_of(home), roots=("gopher://nowhere",))
    loader = ProcessLoader(spec)
    (result,) = results_of(loader, LoadJob(0, found_at(home, "rank-7")))
    assert isinstance(result, JobFailed)
    assert result.error.error_type == "config_error"
    assert "gopher" in result.error.message
    loader.close()


def test_a_process_may_wait_for_its_first_job(home: Path):
    loader = ProcessLoader(spec_of(home), starts_at_once=False)
    assert loader.pid is None
    load(loader, found_at(home, "rank-7"))
    assert loader.pid is not None
    loader.close()


def test_closing_ends_the_process_and_leaves_nothing(home: Path, tmp_path: Path):
    threads, descriptors = threading.active_count(), num_descriptors()
    loader = ProcessLoader(spec_of(home, download_dir=str(tmp_path)))
    found = found_at(home, "rank-7")
    image = load(loader, found).image
    pid = loader.pid
    for number in range(50):
        loader.submit(LoadJob(number, found))
    assert loader.num_open == 50
    loader.close()
    loader.close()
    assert loader.num_open == 0
    assert not Path(f"/proc/{pid}").exists()
    assert not list(tmp_path.iterdir())
    assert_same_image(image, expected_image(home, found))
    del image
    assert num_mappings_of_images() == 0
    assert (threading.active_count(), num_descriptors()) == (threads, descriptors)


PARENT = """
import os, pickle, sys
from loraswarm.engine.loader_process import ProcessLoader
loader = ProcessLoader(pickle.load(open(sys.argv[1], "rb")))
print(loader.pid, flush=True)
sys.stdin.read(1)
os.kill(os.getpid(), 9)
"""


def test_the_process_does_not_outlive_the_engine(home: Path, tmp_path: Path):
    import pickle

    (tmp_path / "downloads").mkdir()
    spec = spec_of(home, download_dir=str(tmp_path / "downloads"))
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "spec")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.communicate(b"x", timeout=60)
    assert parent.returncode == -signal.SIGKILL
    assert wait_until(lambda: not is_running(pid))
    assert not list((tmp_path / "downloads").iterdir())


def test_frames_carry_any_number_of_arrays():
    ours, theirs = socket.socketpair()
    before = num_descriptors()
    arrays = [np.full(number + 1, number % 251, dtype=np.uint8) for number in range(300)]
    item = {"arrays": arrays, "again": arrays[7], "empty": np.empty(0, np.uint8), "n": 133}
    with MemoryFiles() as files:
        assert files.add(arrays[0]) == files.add(arrays[0])
        Frame(item, files).send(ours)
        assert len(files.descriptors) == 300
    Frame("next").send(ours)
    received = receive(theirs)
    assert num_descriptors() == before
    for array, expected in zip(received["arrays"], arrays, strict=True):
        assert np.array_equal(array, expected)
        assert not array.flags.writeable
    assert np.array_equal(received["again"], arrays[7])
    assert (received["empty"].size, received["n"]) == (0, 133)
    assert receive(theirs) == "next"
    ours.close()
    with pytest.raises(EOFError):
        receive(theirs)
    theirs.close()


def is_running(pid: int) -> bool:
    """Not a zombie: its parent here is one that reaps late, or never."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
