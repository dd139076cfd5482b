"""Jobs: what a worker makes of them, and that threads do them beside each other and the engine."""

from __future__ import annotations

import dataclasses
import errno
import json
import select
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, save_random_adapter
from loader_factory import (
    assert_same_image,
    described,
    expected_image,
    found_at,
    load,
    num_descriptors,
    results_of,
    save_lora,
    shape_at,
    spec_of,
    wait_for,
)
from loraswarm.adapters.local_store import LocalStore
from loraswarm.adapters.stores import Found, Store
from loraswarm.core.client import AdapterSummary
from loraswarm.engine import loader_worker
from loraswarm.engine.loader import Inbox, ThreadLoader
from loraswarm.engine.loader_jobs import (
    Job,
    JobFailed,
    Loaded,
    LoadJob,
    Located,
    LocateJob,
    Result,
    ScanDone,
    ScanJob,
    Surveyed,
    SurveyJob,
    UnwatchJob,
    WatchJob,
)
from loraswarm.engine.loader_worker import LoadWorker
from loraswarm.errors import AdapterError, StoreError
from loraswarm.memory.image_file import ImageFiles
from method_cases import METHOD_CASES
from model_factory import save_tiny_model

DTYPES = [torch.float32, torch.bfloat16]
# Methods that compute with the base's weights, and one whose matrices are shared.
BASED = ["dora", "pissa", "bias-all", "embeddings", "vera"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base with biases, and adapters."""
    path = tmp_path_factory.mktemp("loader")
    save_tiny_model(path / "model", "llama-biased")
    model = AutoModelForCausalLM.from_pretrained(path / "model").eval()
    for name in BASED:
        METHOD_CASES[name](model, path / "adapters" / name)
    for rank in (1, 7, 33):
        save_lora(path, f"rank-{rank}", rank=rank, seed=rank)
    return path


@pytest.fixture
def worker(home: Path) -> LoadWorker:
    return LoadWorker(spec_of(home))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rank-1", "rank-7", "rank-33"])
def test_a_loaded_image_has_the_bytes_of_the_adapter(home: Path, name: str, dtype: torch.dtype):
    found = found_at(home, name)
    result = LoadWorker(spec_of(home, dtype)).run(LoadJob(5, found))
    assert isinstance(result, Loaded), result
    assert_same_image(result.image, expected_image(home, found, dtype))
    assert (result.job_id, result.is_from_file, result.warning) == (5, False, None)
    assert result.num_file_bytes == (home / "adapters" / name / WEIGHTS_FILE).stat().st_size
    assert result.read_s > 0
    assert result.pack_s > 0
    assert not result.image.own.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BASED)
def test_what_is_computed_with_the_base_is_as_with_the_decoder(
    home: Path, name: str, dtype: torch.dtype
):
    found = found_at(home, name)
    result = LoadWorker(spec_of(home, dtype)).run(LoadJob(0, found))
    assert isinstance(result, Loaded), result
    assert_same_image(result.image, expected_image(home, found, dtype))


def test_another_base_gives_another_dora(home: Path, tmp_path: Path):
    save_tiny_model(tmp_path / "model", "llama-biased", seed=1)
    found = found_at(home, "dora")
    spec = dataclasses.replace(spec_of(home), model_path=str(tmp_path / "model"))
    result, other = (LoadWorker(each).run(LoadJob(0, found)) for each in (spec, spec_of(home)))
    assert isinstance(result, Loaded)
    assert isinstance(other, Loaded)
    assert not np.array_equal(result.image.own, other.image.own)


def test_matrices_at_hand_are_not_packed_again(home: Path, worker: LoadWorker):
    found = found_at(home, "vera")
    matrices = described(home, found).shared_matrices()
    assert len(matrices) == 2
    whole = worker.run(LoadJob(0, found))
    part = worker.run(LoadJob(1, found, frozenset(matrices[:1])))
    assert isinstance(whole, Loaded)
    assert isinstance(part, Loaded)
    assert whole.image.shared.keys() == set(matrices)
    assert part.image.shared.keys() == set(matrices[1:])
    assert np.array_equal(part.image.own, whole.image.own)


def test_a_spoiled_adapter_fails_its_own_job(tmp_path: Path, home: Path, worker: LoadWorker):
    shutil.copytree(home / "adapters" / "rank-7", tmp_path / "spoiled")
    with (tmp_path / "spoiled" / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1000)
    spec = dataclasses.replace(spec_of(home), roots=(*spec_of(home).roots, str(tmp_path)))
    worker = LoadWorker(spec)
    result = worker.run(LoadJob(0, Found("spoiled", str(tmp_path / "spoiled"), "s")))
    assert isinstance(result, JobFailed), result
    assert result.error.http_status == AdapterError.http_status
    assert result.error.error_type == AdapterError.error_type
    assert "'spoiled'" in result.error.message
    assert isinstance(worker.run(LoadJob(1, found_at(home, "rank-7"))), Loaded)


def test_an_adapter_that_is_gone_is_named(home: Path, worker: LoadWorker):
    result = worker.run(LoadJob(0, found_at(home, "gone")))
    assert isinstance(result, JobFailed), result
    assert "'gone'" in result.error.message


def test_what_no_store_can_serve_is_not_loaded(home: Path, worker: LoadWorker):
    found = dataclasses.replace(found_at(home, "rank-7"), problem="it has a bad name")
    result = worker.run(LoadJob(0, found))
    assert isinstance(result, JobFailed), result
    assert (result.error.http_status, "bad name" in result.error.message) == (422, True)


def test_a_bug_is_reported_and_logged(
    home: Path,
    worker: LoadWorker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(loader_worker, "read_adapter", fail)
    result = worker.run(LoadJob(0, found_at(home, "rank-7")))
    assert isinstance(result, JobFailed), result
    assert result.error.http_status == 500
    assert "'rank-7'" in result.error.message
    assert "ZeroDivisionError" in result.error.message
    assert "deep inside" in caplog.text  # with its traceback


def test_a_survey_describes_refuses_and_skips(home: Path, tmp_path: Path):
    save_random_adapter(
        tmp_path / "refused", shape_at(home), config_overrides={"peft_type": "NONSENSE"}
    )
    spec = dataclasses.replace(spec_of(home), roots=(*spec_of(home).roots, str(tmp_path)))
    good, refused = found_at(home, "rank-33"), LocalStore(str(tmp_path)).locate("refused")
    problem = dataclasses.replace(found_at(home, "rank-7"), problem="bad name")
    remote = Found("far", "s3://bucket/far", "s")
    result = LoadWorker(spec).run(SurveyJob(3, (good, refused, problem, remote)))
    assert isinstance(result, Surveyed)
    assert result.skipped == (remote,)
    assert [found for found, _ in result.rows] == [good, refused, problem]
    summary, refusal, other = (row for _, row in result.rows)
    info = described(home, good)
    assert summary == AdapterSummary(
        name="rank-33",
        path=good.location,
        method=info.method,
        max_rank=33,
        num_bytes=info.num_bytes,
        digest=info.digest,
        file_format="peft",
    )
    assert isinstance(refusal, str)
    assert "NONSENSE" in refusal
    assert isinstance(other, str)
    assert "bad name" in other


def test_stores_are_scanned_located_and_watched(home: Path, worker: LoadWorker):
    change = worker.run(ScanJob(0))
    assert isinstance(change, ScanDone)
    names = {found.name for found in (*change.change.found, *change.change.pending)}
    assert names == {*BASED, "rank-1", "rank-7", "rank-33"}
    located = worker.run(LocateJob(1, "other", str(home / "adapters" / "rank-7")))
    assert isinstance(located, Located), located
    assert located.found.name == "other"
    loaded = worker.run(LoadJob(2, located.found))
    assert isinstance(loaded, Loaded), loaded
    assert loaded.image.info.name == "other"
    assert worker.run(WatchJob(3, located.found)) is None
    assert worker.run(UnwatchJob(4, "other")) is None
    outside = worker.run(LocateJob(5, "evil", "/etc"))
    assert isinstance(outside, JobFailed)
    assert outside.error.http_status == 403


@pytest.mark.parametrize("name", ["rank-7", "vera", "dora"])
def test_the_next_worker_finds_images_in_files(home: Path, tmp_path: Path, name: str):
    spec = spec_of(home, host_cache_dir=str(tmp_path / "cache"))
    found = found_at(home, name)
    shared = frozenset(described(home, found).shared_matrices())
    first = LoadWorker(spec).run(LoadJob(0, found, shared))
    second = LoadWorker(spec).run(LoadJob(1, dataclasses.replace(found)))
    assert isinstance(first, Loaded)
    assert isinstance(second, Loaded)
    assert (first.is_from_file, second.is_from_file) == (False, True)
    assert_same_image(second.image, expected_image(home, found))


def test_an_image_serves_an_adapter_under_another_name(home: Path, tmp_path: Path):
    spec = spec_of(home, host_cache_dir=str(tmp_path / "cache"))
    worker = LoadWorker(spec)
    worker.run(LoadJob(0, found_at(home, "rank-7")))
    again = worker.run(LoadJob(1, dataclasses.replace(found_at(home, "rank-7"), name="alias")))
    assert isinstance(again, Loaded)
    assert again.is_from_file
    assert again.image.info.name == "alias"


def test_an_image_of_files_that_have_changed_is_not_used(home: Path, tmp_path: Path):
    save_tiny_model(tmp_path / "model", "llama-biased")
    found = save_lora(tmp_path, "a", rank=3, seed=1)
    worker = LoadWorker(spec_of(tmp_path, host_cache_dir=str(tmp_path / "cache")))
    first = worker.run(LoadJob(0, found))
    save_lora(tmp_path, "a", rank=3, seed=2)
    second = worker.run(LoadJob(1, found))  # of the same stamp: found before the change
    assert isinstance(first, Loaded)
    assert isinstance(second, Loaded)
    assert not second.is_from_file
    assert second.image.info.digest != first.image.info.digest
    assert_same_image(second.image, expected_image(tmp_path, found_at(tmp_path, "a")))


def test_images_of_another_base_are_not_used(home: Path, tmp_path: Path):
    shutil.copytree(home / "model", tmp_path / "model")
    shutil.copytree(home / "adapters" / "dora", tmp_path / "adapters" / "dora")
    spec = spec_of(tmp_path, host_cache_dir=str(tmp_path / "cache"))
    found = found_at(tmp_path, "dora")
    first = LoadWorker(spec).run(LoadJob(0, found))
    save_tiny_model(tmp_path / "model", "llama-biased", seed=1)
    second = LoadWorker(spec).run(LoadJob(1, found))
    assert isinstance(first, Loaded)
    assert isinstance(second, Loaded)
    assert not second.is_from_file
    assert not np.array_equal(first.image.own, second.image.own)


def test_a_full_disk_costs_the_file_only(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ImageFiles, "write", fail)
    found = found_at(home, "rank-7")
    result = LoadWorker(spec_of(home, host_cache_dir=str(tmp_path / "cache"))).run(
        LoadJob(0, found)
    )
    assert isinstance(result, Loaded), result
    assert result.warning is not None
    assert "No space left" in result.warning
    assert_same_image(result.image, expected_image(home, found))


class FarStore:
    """A store whose adapters must be downloaded; `roots` are directories that stand for it."""

    def __init__(self, source: Path) -> None:
        self.root = "fake://far"
        self.source = source
        self.fails = False

    def look(self) -> list[Found]:
        return []

    def look_again(self, found: Found) -> Found:
        return found

    def fetch(self, found: Found, into: Path) -> Path:
        shutil.copytree(self.source, into / "a")
        if self.fails:
            raise StoreError("store 'fake://far', adapter 'a': timed out")
        return into / "a"


class FarScanner:
    """A scanner of one far store."""

    def __init__(self, store: FarStore) -> None:
        self._store = store

    def store_of(self, location: str) -> Store:
        assert location.startswith("fake://far/")
        return self._store

    def rested_stamp(self, found: Found) -> str:
        return found.stamp


@pytest.fixture
def far(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FarStore, LoadWorker]:
    shutil.copytree(home / "adapters" / "rank-7", tmp_path / "origin")
    (tmp_path / "downloads").mkdir()
    store = FarStore(tmp_path / "origin")
    monkeypatch.setattr(loader_worker, "Scanner", lambda stores: FarScanner(store))
    options = {"roots": (), "download_dir": str(tmp_path / "downloads")}
    return store, LoadWorker(spec_of(home, **options))


def test_a_downloaded_adapter_leaves_nothing_behind(
    tmp_path: Path, far: tuple[FarStore, LoadWorker]
):
    store, worker = far
    result = worker.run(LoadJob(0, Found("a", "fake://far/a", "1")))
    assert isinstance(result, Loaded), result
    assert result.fetch_s > 0
    assert not list((tmp_path / "downloads").iterdir())
    store.fails = True
    failed = worker.run(LoadJob(1, Found("a", "fake://far/a", "1")))
    assert isinstance(failed, JobFailed)
    assert (failed.error.http_status, "timed out" in failed.error.message) == (503, True)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_download_has_the_same_digest_each_time_until_it_changes(
    far: tuple[FarStore, LoadWorker],
):
    _, worker = far
    found = Found("a", "fake://far/a", "1")
    results = [worker.run(LoadJob(number, found)) for number in range(2)]
    results.append(worker.run(LoadJob(2, dataclasses.replace(found, stamp="2"))))
    digests = [result.image.info.digest for result in results if isinstance(result, Loaded)]
    assert digests[0] == digests[1] != digests[2]


def test_an_image_in_a_file_spares_the_download(
    home: Path, tmp_path: Path, far: tuple[FarStore, LoadWorker]
):
    store, _ = far
    worker = LoadWorker(spec_of(home, roots=(), host_cache_dir=str(tmp_path / "cache")))
    found = Found("a", "fake://far/a", "1")
    first = worker.run(LoadJob(0, found))
    store.fails = True
    again = worker.run(LoadJob(1, found))
    other = worker.run(LoadJob(2, dataclasses.replace(found, stamp="2")))
    assert isinstance(first, Loaded)
    assert isinstance(again, Loaded), again
    assert again.is_from_file
    assert_same_image(again.image, first.image)
    assert isinstance(other, JobFailed)


class HeldRunner:
    """Jobs that end when they are told to, or at once; notes the order in which they begin."""

    def __init__(self, held: set[int]) -> None:
        self.gates = {job_id: threading.Event() for job_id in held}
        self.begun: list[int] = []
        self.has_begun = {job_id: threading.Event() for job_id in held}
        self.threads: list[int] = []

    def run(self, job: Job) -> Result | None:
        self.begun.append(job.job_id)
        self.threads.append(torch.get_num_threads())
        if job.job_id in self.gates:
            self.has_begun[job.job_id].set()
            assert self.gates[job.job_id].wait(60)
        return None if isinstance(job, WatchJob) else Surveyed(job.job_id, ())


def job_at(job_id: int, location: str) -> LoadJob:
    return LoadJob(job_id, Found("a", location, "s"))


def test_a_store_that_does_not_answer_keeps_no_other_waiting():
    runner = HeldRunner({0, 1, 2})
    loader = ThreadLoader(runner, num_threads=2)
    for job in (job_at(0, "s3://b/a"), job_at(1, "s3://b/a"), ScanJob(2)):
        loader.submit(job)
    assert [result.job_id for result in results_of(loader, job_at(3, "/near"))] == [3]
    assert loader.num_open == 3
    for gate in runner.gates.values():
        gate.set()
    assert {result.job_id for result in wait_for(loader, 3)} == {0, 1, 2}
    assert loader.num_open == 0
    loader.close()


def test_loads_go_before_surveys():
    runner = HeldRunner({0})
    loader = ThreadLoader(runner, num_threads=1)
    loader.submit(job_at(0, "/a"))
    assert runner.has_begun[0].wait(60)
    for job in (SurveyJob(1, ()), SurveyJob(2, ()), job_at(3, "/a"), job_at(4, "/a")):
        loader.submit(job)
    runner.gates[0].set()
    wait_for(loader, 5)
    assert runner.begun == [0, 3, 4, 1, 2]
    loader.close()


def test_jobs_compute_with_one_thread_and_nobody_else_does():
    before = torch.get_num_threads()
    assert before > 1, "set by conftest"
    runner = HeldRunner(set())
    loader = ThreadLoader(runner)
    results_of(loader, *(job_at(number, "/a") for number in range(5)))
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert set(runner.threads) == {1}
    assert found == [before]
    assert torch.get_num_threads() == before
    loader.close()


def test_a_loader_is_readable_while_it_has_results():
    loader = ThreadLoader(HeldRunner(set()))
    assert not is_readable(loader)
    for number in range(3):
        loader.submit(job_at(number, "/a"))
    loader.submit(WatchJob(9, Found("a", "/a", "s")))
    assert loader.num_open == 3
    assert len(wait_for(loader, 3)) == 3
    assert not is_readable(loader)
    assert loader.take_done() == []
    loader.close()
    loader.close()


def test_an_inbox_that_is_closed_takes_nothing():
    inbox = Inbox()
    inbox.put(Surveyed(0, ()))
    assert is_readable(inbox)
    inbox.close()
    inbox.put(Surveyed(1, ()))
    assert inbox.take() == []


def test_closing_gives_up_what_is_open():
    before = threading.active_count()
    runner = HeldRunner({0})
    loader = ThreadLoader(runner, num_threads=1)
    for number in range(3):
        loader.submit(job_at(number, "/a"))
    assert runner.has_begun[0].wait(60)
    threading.Timer(0.05, runner.gates[0].set).start()
    loader.close()
    assert runner.begun == [0]
    assert loader.num_open == 0
    assert wait_until(lambda: threading.active_count() == before)


def test_loading_leaks_nothing(home: Path, tmp_path: Path):
    """Files, threads and memory maps after many loads, and failed ones, are as before."""
    (tmp_path / "adapters" / "bad").mkdir(parents=True)
    (tmp_path / "adapters" / "bad" / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    threads = threading.active_count()
    roots = (*spec_of(home).roots, str(tmp_path / "adapters"))
    worker = LoadWorker(
        spec_of(home, roots=roots, host_cache_dir=str(tmp_path / "cache"), host_cache_bytes=200_000)
    )
    loader = ThreadLoader(worker)
    found = [found_at(home, name) for name in ("rank-7", "dora", "vera", "rank-33")]
    load_each(loader, [*found, found_at(tmp_path, "bad")], 20)
    before = num_descriptors(), num_mappings()
    load_each(loader, [*found, found_at(tmp_path, "bad")], 200)
    assert num_descriptors() == before[0]
    assert num_mappings() < before[1] + 20
    loader.close()
    worker.close()
    assert threading.active_count() == threads


def load_each(loader: ThreadLoader, found: list[Found], num_loads: int) -> None:
    for number in range(0, num_loads, len(found)):
        results = results_of(loader, *(LoadJob(number + i, each) for i, each in enumerate(found)))
        assert [type(result) for result in results[-2:]] == [Loaded, JobFailed]


def num_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def is_readable(loader: Any) -> bool:
    return bool(select.select([loader.fileno()], [], [], 0)[0])


def wait_until(holds: Any) -> bool:
    return any(holds() or threading.Event().wait(0.01) for _ in range(500))


def test_a_loader_over_real_adapters_serves_several_at_once(home: Path, worker: LoadWorker):
    loader = ThreadLoader(worker)
    found = [found_at(home, name) for name in ("rank-1", "rank-7", "rank-33", "dora")]
    results = results_of(loader, *(LoadJob(number, each) for number, each in enumerate(found)))
    for each, result in zip(found, results, strict=True):
        assert isinstance(result, Loaded), result
        assert_same_image(result.image, expected_image(home, each))
    assert load(loader, found[0], 9).image.info.name == "rank-1"
    loader.close()
