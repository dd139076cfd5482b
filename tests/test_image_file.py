"""Images in files: what was written is found again, mapped; what is not whole is never used."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from image_cases import SHAPE, pack
from loraswarm.errors import ConfigError
from loraswarm.memory import image_format
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.image import AdapterImage
from loraswarm.memory.image_file import ImageFiles, image_signature
from loraswarm.memory.mapping import map_file
from memory_cases import kinds, lora, random_adapter

KINDS = kinds(SHAPE)
GEOMETRY = page_geometry(SHAPE, 2)
SIGNATURE = image_signature(SHAPE, GEOMETRY, "bfloat16", "base")
CAPACITY_BYTES = 100_000_000


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "host" / "cache"


def files_of(directory: Path, signature: str = SIGNATURE, capacity_bytes: int = CAPACITY_BYTES):
    return ImageFiles(directory, signature, capacity_bytes)


def image_of(name: str) -> AdapterImage:
    torch.manual_seed(sum(name.encode()))
    return pack(random_adapter(KINDS[name], SHAPE, torch.bfloat16), GEOMETRY)


def assert_same(found: AdapterImage | None, image: AdapterImage) -> None:
    assert found is not None
    assert found.info == image.info
    assert np.array_equal(found.own, image.own)
    assert found.shared.keys() == image.shared.keys()
    for matrix, values in image.shared.items():
        assert np.array_equal(found.shared[matrix], values)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_every_kind_is_found_by_the_next_start(directory, name):
    image = image_of(name)
    assert_same(files_of(directory).write("/adapters/x", "1", image), image)
    assert_same(files_of(directory).find("/adapters/x", "1"), image)


def test_info_is_kept_whole(directory):
    info = replace(
        KINDS["rows"],
        name="näme \udcff",
        path=Path("/adapters/\udcff"),
        digest="abc",
        method="alora",
        num_bytes=133,
        invocation_tokens=(1, 7, 133),
        file_format="nemo",
    )
    image = replace(image_of("rows"), info=info)
    files = files_of(directory)
    files.write("/adapters/\udcff", "\udcff", image)
    assert_same(files.find("/adapters/\udcff", "\udcff"), image)


def test_an_image_is_of_one_location_and_one_stamp(directory):
    files = files_of(directory)
    files.write("/adapters/x", "1", image_of("lora"))
    files.write("/adapters/x", "2", image_of("mixed"))
    files.write("/adapters/y", "1", image_of("gains"))
    assert files.find("/adapters/x", "3") is None
    assert files.find("/adapters/z", "1") is None
    assert_same(files.find("/adapters/x", "1"), image_of("lora"))
    assert_same(files.find("/adapters/x", "2"), image_of("mixed"))
    assert_same(files.find("/adapters/y", "1"), image_of("gains"))


def test_an_image_written_again_replaces_the_file(directory):
    files = files_of(directory)
    first = files.write("/adapters/x", "1", image_of("lora"))
    num_bytes = files.num_bytes
    files.write("/adapters/x", "1", image_of("mixed"))
    assert_same(files.find("/adapters/x", "1"), image_of("mixed"))
    assert_same(first, image_of("lora"))
    assert files.num_bytes != num_bytes
    assert files.num_bytes == sum(path.stat().st_size for path in directory.iterdir())


def test_a_removed_image_is_not_found_but_what_is_mapped_stays(directory):
    files = files_of(directory)
    mapped = files.write("/adapters/x", "1", image_of("lora"))
    files.remove("/adapters/x", "1")
    assert files.find("/adapters/x", "1") is None
    assert_same(mapped, image_of("lora"))
    assert not list(directory.iterdir())
    assert files.num_bytes == 0
    files.remove("/adapters/x", "1")


def test_a_shared_matrix_has_one_file_for_all_adapters(directory):
    files = files_of(directory)
    names = ["vera", "vera-other", "vera-qv"]
    for name in names:
        files.write(name, "1", image_of(name))
    matrices = KINDS["vera"].shared_matrices()
    assert len(list(directory.iterdir())) == len(names) + len(matrices)
    for name in names:
        assert_same(files.find(name, "1"), image_of(name))


def test_an_image_whose_shared_matrix_has_no_file_is_not_found(directory):
    files = files_of(directory)
    files.write("x", "1", replace(image_of("vera"), shared={}))
    assert files.find("x", "1") is None
    files.write("y", "1", image_of("vera-other"))
    assert_same(files.find("x", "1"), image_of("vera"))


def damaged_files(directory: Path):
    """Paths of the files, and for each a few ways to spoil it by name."""
    ways = {
        "cut": lambda data: data[:-1],
        "cut in the header": lambda data: data[:133],
        "cut in the magic": lambda data: data[:7],
        "empty": lambda data: b"",
        "longer": lambda data: data + b"\0",
        "magic": lambda data: b"x" + data[1:],
        "header length": lambda data: data[:16] + b"\xff" * 8 + data[24:],
        "header": lambda data: flipped(data, 50),
        "scale in the header": lambda data: flipped(data, data.find(b"\xcb\x3f\xf0") + 1),
        "first byte": lambda data: flipped(data, len(data) - 4096),
        "last byte": lambda data: flipped(data, len(data) - 1),
    }
    return sorted(directory.iterdir()), ways


def flipped(data: bytes, index: int) -> bytes:
    """The data with one bit of a byte changed."""
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


@pytest.mark.parametrize("name", ["lora", "vera"])
def test_a_file_that_is_not_whole_is_reported_and_removed_and_never_used(directory, name, caplog):
    files = files_of(directory)
    files.write("x", "1", image_of(name))
    paths, ways = damaged_files(directory)
    contents = {path: path.read_bytes() for path in paths}
    for path in paths:
        for way, damage in ways.items():
            path.write_bytes(damage(contents[path]))
            caplog.clear()
            assert files.find("x", "1") is None, way
            (record,) = caplog.records
            assert record.levelno == logging.WARNING
            assert path.name in record.getMessage()
            assert not path.exists()
            path.write_bytes(contents[path])
    assert_same(files.find("x", "1"), image_of(name))


def test_files_of_another_base_format_or_adapter_are_reported_and_removed(
    directory, caplog, monkeypatch
):
    image = image_of("lora")
    other = image_signature(SHAPE, GEOMETRY, "bfloat16", "other weights")
    assert len({SIGNATURE, other, image_signature(SHAPE, GEOMETRY, "float16", "base")}) == 3
    files_of(directory, other).write("x", "1", image)
    assert files_of(directory).find("x", "1") is None
    assert "another base" in caplog.text
    assert not list(directory.iterdir())

    files_of(directory).write("x", "1", image)
    with monkeypatch.context() as patch:
        patch.setattr(image_format, "FORMAT_VERSION", "next")
        assert files_of(directory).find("x", "1") is None
    assert "format" in caplog.text
    assert not list(directory.iterdir())

    files_of(directory).write("x", "1", image)
    (mine,) = directory.iterdir()
    files_of(directory).write("y", "1", image_of("mixed"))
    (others,) = set(directory.iterdir()) - {mine}
    others.replace(mine)
    assert files_of(directory).find("x", "1") is None
    assert "something else" in caplog.text


def test_a_header_that_says_other_things_than_ours_is_not_used(directory, caplog):
    files = files_of(directory)
    files.write("x", "1", image_of("lora"))
    (path,) = directory.iterdir()
    for number, body in enumerate([msgspec.msgpack.encode({"version": 7}), b"\xc1", b"\xc0"]):
        caplog.clear()
        prefix = image_format._PREFIX.pack(len(body), image_format.zlib.crc32(body))
        path.write_bytes(image_format._MAGIC + prefix + body + bytes(64))
        assert files.find("x", "1") is None, number
        assert "header cannot be read" in caplog.text


def test_a_matrix_that_is_spoiled_is_written_anew(directory, caplog):
    files = files_of(directory)
    files.write("x", "1", image_of("vera"))
    for path in directory.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    files.write("y", "1", image_of("vera-other"))
    assert "removed" in caplog.text
    assert_same(files.find("y", "1"), image_of("vera-other"))


def test_the_oldest_used_files_leave_when_there_are_too_many_bytes(directory):
    sizes = {}
    for name in ("lora", "mixed", "gains"):
        files = files_of(directory / name)
        files.write(name, "1", image_of(name))
        sizes[name] = files.num_bytes
    files = files_of(directory / "all", capacity_bytes=sum(sizes.values()))
    for name in sizes:
        files.write(name, "1", image_of(name))
    for turn, name in enumerate(["gains", "mixed", "lora"]):
        assert files.find(name, "1") is not None
        path = directory / "all" / next((directory / name).iterdir()).name
        os.utime(path, ns=(turn, turn))
    files.write("more", "1", image_of("ia3"))
    assert files.find("gains", "1") is None
    assert files.find("mixed", "1") is not None
    kept = sum(path.stat().st_size for path in (directory / "all").iterdir())
    assert files.num_bytes == kept <= sum(sizes.values())

    for turn, name in enumerate(["lora", "mixed"]):
        path = directory / "all" / next((directory / name).iterdir()).name
        os.utime(path, ns=(turn, turn))
    assert files.find("lora", "1") is not None
    again = files_of(directory / "all", capacity_bytes=kept - 1)
    assert again.find("mixed", "1") is None, "the next start knows which was used last"
    assert again.find("lora", "1") is not None


def test_an_image_larger_than_all_the_room_is_logged_and_not_written(directory, caplog):
    files = files_of(directory, capacity_bytes=1000)
    image = image_of("wide")
    assert files.write("x", "1", image) is image
    assert "larger than the host cache directory" in caplog.text
    assert files.find("x", "1") is None
    assert not list(directory.iterdir())


def test_a_full_disk_is_the_callers_to_know_and_leaves_no_partial_file(directory, monkeypatch):
    files = files_of(directory)
    files.write("x", "1", image_of("lora"))

    def full(descriptor: int, num_bytes: int):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(image_format, "map_file", full)
        with pytest.raises(OSError, match="No space left"):
            files.write("y", "1", image_of("vera"))
    assert len(list(directory.iterdir())) == 1
    assert_same(files.find("x", "1"), image_of("lora"))
    assert files.find("y", "1") is None
    assert_same(files.write("y", "1", image_of("vera")), image_of("vera"))


def test_a_write_that_is_cut_short_by_the_system_leaves_nothing(directory):
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from loraswarm.memory.image import AdapterImage
        from loraswarm.memory.image_file import ImageFiles
        from loraswarm.adapters.adapter import AdapterInfo

        info = AdapterInfo(
            name="x", path=Path("x"), digest="0", method="lora", modules=(), num_bytes=0
        )
        files = ImageFiles(Path(sys.argv[1]), "signature", 10_000_000)
        files.write("small", "1", AdapterImage(info, np.zeros(1000, dtype=np.uint8)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            files.write("x", "1", AdapterImage(info, np.zeros(1_000_000, dtype=np.uint8)))
        except OSError as error:
            print("refused", error.errno)
        assert files.find("small", "1") is not None
        """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout == f"refused {errno.EFBIG}\n"
    assert len(list(directory.iterdir())) == 1


def test_what_an_unfinished_write_left_is_removed_at_the_start(directory):
    directory.mkdir(parents=True)
    (directory / "abc.partial").write_bytes(b"x")
    (directory / "not ours.txt").write_bytes(b"x")
    assert files_of(directory).num_bytes == 0
    assert [path.name for path in directory.iterdir()] == ["not ours.txt"]


def test_a_directory_that_cannot_be_used_is_a_config_error_that_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file/cache"):
        files_of(tmp_path / "file" / "cache")


def test_mapped_images_hold_no_descriptors_and_go_with_the_last_reference(directory):
    files = files_of(directory)
    image = image_of("vera")
    before = num_open_files()
    found = [files.write("x", "1", image)]
    found += [files.find("x", "1") for _ in range(7)]
    assert num_open_files() == before
    assert maps_of(directory) > 7
    part = found[0].own[7:133]
    del found[1:], found[0]
    gc.collect()
    assert maps_of(directory) == 1
    assert np.array_equal(part, image.own[7:133])
    del part
    gc.collect()
    assert maps_of(directory) == 0


def maps_of(directory: Path) -> int:
    """Mappings of files of the directory that this process has."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(directory) in line for line in lines)


def test_threads_write_and_find_at_once(directory):
    files = files_of(directory)
    images = {name: image_of(name) for name in ("vera", "vera-other", "lora", "mixed")}
    errors = []

    def work(name: str) -> None:
        try:
            for turn in range(20):
                files.write(name, str(turn % 3), images[name])
                assert_same(files.find(name, str(turn % 3)), images[name])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files.num_bytes == sum(path.stat().st_size for path in directory.iterdir())


def test_memory_files_are_mapped_read_only_and_hold_no_descriptor():
    before = num_open_files()
    descriptor = os.memfd_create("image")
    os.write(descriptor, bytes(range(133)))
    mapped = map_file(descriptor, 133)
    with pytest.raises(ValueError, match="shorter"):
        map_file(descriptor, 134)
    assert map_file(descriptor, 0).nbytes == 0
    os.pwrite(descriptor, b"\xff", 7)
    os.close(descriptor)
    assert num_open_files() == before
    assert mapped.tolist() == [*range(7), 255, *range(8, 133)]
    assert not mapped.flags.writeable
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_file(descriptor, 133)


def test_a_file_that_cannot_be_mapped_is_an_error_of_the_system(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(7))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(PermissionError):
            map_file(descriptor, 7)
    finally:
        os.close(descriptor)


def test_a_large_image_is_checked_in_pieces(directory):
    torch.manual_seed(0)
    image = pack(random_adapter(lora("large", SHAPE, 997), SHAPE, torch.bfloat16), GEOMETRY)
    assert image.num_bytes > 3 << 20
    files = files_of(directory)
    files.write("x", "1", image)
    assert_same(files.find("x", "1"), image)
    (path,) = directory.iterdir()
    with path.open("r+b") as file:
        file.seek(-(2 << 20), os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert files.find("x", "1") is None
