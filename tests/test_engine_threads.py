"""How many threads an engine takes by default."""

import psutil
import pytest

from loraswarm.engine import devices


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 3)],
)
def test_a_containers_quota_limits_the_threads(text, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 3)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(devices, "CPU_QUOTA_FILE", tmp_path / "cpu.max")
    assert devices.physical_cores() == 3
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert devices.physical_cores() == expected
