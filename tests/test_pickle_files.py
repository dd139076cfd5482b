"""adapter_model.bin is read as torch.load reads it, or refused; nothing in it is ever run."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from adapter_factory import (
    CONFIG_FILE,
    SMALL_SHAPE,
    WEIGHTS_FILE,
    make_peft_adapter,
    save_random_adapter,
    shape_of,
    tiny_llama,
)
from general_form import check_equals_peft
from loraswarm.adapters.inert_pickle import MAX_INSTRUCTIONS, read_state_dict_pickle
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.source import open_source
from loraswarm.errors import AdapterError

PICKLE_FILE = "adapter_model.bin"
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    return tmp_path


def save(directory: Path, state: object) -> Path:
    torch.save(state, directory / PICKLE_FILE)
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(AdapterError) as caught, open_source(directory):
        pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(PICKLE_FILE)
    return str(caught.value)


def saved_members(state: object) -> dict[str, bytes]:
    """What torch.save writes, by name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(directory: Path, members: dict[str, bytes], method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(directory / PICKLE_FILE, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return directory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_those_of_torch_load(directory, dtype):
    generator = torch.Generator().manual_seed(3)
    state = {
        f"t{shape}": (torch.rand(shape, generator=generator) * 100).to(dtype)
        for shape in [(), (1,), (7, 133), (3, 1, 2), (0, 5)]
    }
    save(directory, state)
    expected = torch.load(directory / PICKLE_FILE, weights_only=True)
    with open_source(directory) as source:
        assert {name: spec.shape for name, spec in source.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        for name, tensor in expected.items():
            stored = b"".join(source.chunks(name))
            assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            if dtype in READABLE:
                assert torch.equal(source.read(name), tensor)


def test_what_modules_and_trainers_save_is_read(directory):
    """A module's state dict has attributes; parameters and views of one storage are usual."""
    torch.manual_seed(0)
    state = nn.Linear(3, 7).state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert state._metadata
    rows = torch.randn(6, 4)
    state["parameter"] = nn.Parameter(torch.randn(5))
    state["view"] = rows[2:5]
    state["same view"] = rows[2:5]
    state["one row of a transposed matrix"] = torch.randn(1, 9).T.contiguous().T
    save(directory, state)
    expected = torch.load(directory / PICKLE_FILE, weights_only=True)
    with open_source(directory) as source:
        assert source.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(source.read(name), tensor)


def test_an_adapter_saved_as_pickle_gives_pefts_logits(tmp_path):
    model = tiny_llama()
    adapted = make_peft_adapter(model, tmp_path, {"r": 3, "target_modules": ["q_proj", "up_proj"]})
    adapted.save_pretrained(str(tmp_path), safe_serialization=False, save_embedding_layers=False)
    (tmp_path / WEIGHTS_FILE).unlink()
    assert (tmp_path / PICKLE_FILE).exists()
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.file_format == "peft-pickle"
    assert adapter.info.num_bytes == (tmp_path / PICKLE_FILE).stat().st_size


def test_safetensors_is_read_where_both_files_are_there(tmp_path):
    """As PEFT does."""
    save_random_adapter(tmp_path, SMALL_SHAPE)
    (tmp_path / PICKLE_FILE).write_bytes(b"not even a zip")
    assert read_adapter_info(tmp_path, "a", SMALL_SHAPE).file_format == "peft"


def test_a_rewritten_pickle_has_another_digest(directory):
    digests = set()
    for seconds in (1000, 2000):
        save(directory, {"a": torch.ones(2)})
        os.utime(directory / PICKLE_FILE, (seconds, seconds))
        with open_source(directory) as source:
            digests.add(source.digest())
            assert source.digest() in digests
    assert len(digests) == 2


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_never_run(directory):
    marker = directory / "marker"
    save(directory, {"a": Runs(marker)})
    assert "asks for 'posix.mkdir'" in refusal(directory)
    assert not marker.exists()
    # The file does run code for those who let it.
    torch.load(directory / PICKLE_FILE, weights_only=False)
    assert marker.exists()


REFUSED_STATES = {
    "nested": ({"a": {"b": torch.ones(1)}}, "'a' is a nested dict"),
    "a number": ({"a": 3}, "'a' is a int, not a tensor"),
    "a list": ([torch.ones(1)], "instruction"),
    "a tensor": (torch.ones(1), "no dict"),
    "a module": (nn.Linear(1, 1), "asks for 'torch.nn.modules.linear.Linear'"),
    "number keys": ({1: torch.ones(1)}, "keys are not names"),
    "transposed": ({"a": torch.ones(3, 4).T}, "'a' has shape [4, 3] and strides [1, 4]"),
    "every other": ({"a": torch.ones(8)[::2]}, "strides [2]"),
    "expanded": ({"a": torch.ones(1, 4).expand(1000, 4)}, "strides [0, 1]"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, "asks for 'torch.ComplexFloat"),
    "float8": ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "asks for 'torch."),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "asks for 'torch._utils._rebuild_sparse"),
    "meta": ({"a": torch.ones(2, device="meta")}, "asks for 'torch."),
}


@pytest.mark.parametrize("case", REFUSED_STATES)
def test_what_is_no_flat_dict_of_row_major_tensors_is_refused_by_name(directory, case):
    state, message = REFUSED_STATES[case]
    assert message in refusal(save(directory, state))


def test_older_and_other_files_are_refused(directory):
    state = {"a": torch.ones(3)}
    torch.save(state, directory / PICKLE_FILE, _use_new_zipfile_serialization=False)
    assert "since torch 1.6" in refusal(directory)
    torch.save(state, directory / PICKLE_FILE, pickle_protocol=4)
    assert "not of pickle protocol 2" in refusal(directory)
    (directory / PICKLE_FILE).write_bytes(b"")
    assert "not a zip file" in refusal(directory)
    write_zip(directory, {"readme": b"hello"})
    assert "not a torch file" in refusal(directory)


def test_compressed_members_are_refused(directory):
    members = saved_members({"a": torch.ones(3)})
    write_zip(directory, members, zipfile.ZIP_DEFLATED)
    assert "compressed member" in refusal(directory)
    write_zip(directory, members)
    with open_source(directory) as source:
        assert source.read("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("archive/byteorder", b"big", "little-endian"),
        ("archive/data/0", b"1234", "needs a storage of 3 F32 elements; the file holds 4 bytes"),
        ("archive/data/0", None, "the file holds none"),
        ("archive/data.pkl", None, "not a torch file"),
        ("archive/data.pkl", b"\x80\x02}.x", "does not end where"),
        ("archive/data.pkl", b"\x80\x02}q\x00", "is cut short"),
        ("archive/data.pkl", b"\x80\x02u.", "malformed or cut short"),
        ("other/data.pkl", b"\x80\x02}.", "not a torch file"),
    ],
)
def test_members_that_contradict_each_other_are_refused(directory, name, content, message):
    members = saved_members({"a": torch.ones(3)})
    if content is None:
        del members[name]
    else:
        members[name] = content
    assert message in refusal(write_zip(directory, members))


def test_a_pickle_cut_short_anywhere_is_refused(directory):
    save(directory, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    content = (directory / PICKLE_FILE).read_bytes()
    for length in range(0, len(content), 7):
        (directory / PICKLE_FILE).write_bytes(content[:length])
        refusal(directory)


def test_a_zip_with_two_members_of_one_name_is_refused(directory):
    members = saved_members({"a": torch.ones(3)})
    write_zip(directory, members | {"archive/data/X": bytes(12)})
    content = (directory / PICKLE_FILE).read_bytes()
    assert content.count(b"archive/data/X") == 2
    (directory / PICKLE_FILE).write_bytes(content.replace(b"archive/data/X", b"archive/data/0"))
    assert "two members named 'archive/data/0'" in refusal(directory)


ZIP_LIES = {
    "a comment": (20, b"\1\0", "not a zip"),
    "more members": (10, b"\x63\0", "in several files|malformed zip directory"),
    "another disk": (4, b"\1\0", "in several files"),
    "a directory elsewhere": (16, b"\1\0\0\0", "malformed zip directory"),
    "a directory of 2 GB": (12, b"\0\0\0\x80", "malformed zip directory"),
    "a 64-bit end that is not there": (16, b"\xff\xff\xff\xff", "malformed zip directory"),
}


@pytest.mark.parametrize("case", ZIP_LIES)
def test_a_zip_directory_that_lies_is_refused(directory, case):
    place, lie, message = ZIP_LIES[case]
    write_zip(directory, saved_members({"a": torch.ones(3)}))
    content = bytearray((directory / PICKLE_FILE).read_bytes())
    begin = len(content) - 22 + place
    content[begin : begin + len(lie)] = lie
    (directory / PICKLE_FILE).write_bytes(content)
    assert re.search(message, refusal(directory))


def test_a_zip64_directory_is_read(directory, monkeypatch):
    """As files of more than 4 GiB have it."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    write_zip(directory, saved_members({"a": torch.arange(3.0)}))
    with open_source(directory) as source:
        assert source.read("a").tolist() == [0, 1, 2]


def global_of(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_bytes(offset: bytes, shape: bytes, strides: bytes) -> bytes:
    """Instructions that make the dict {"a": a tensor of storage 0, which has 3 floats}."""
    storage = b"(" + text("storage") + global_of("torch.FloatStorage") + text("0") + text("cpu")
    storage += b"K\x03tQ"
    call = global_of("torch._utils._rebuild_tensor_v2") + b"(" + storage + offset + shape + strides
    return b"\x80\x02}" + text("a") + call + b"\x89}tRs."


LONG = b"\x8a\x08" + struct.pack("<q", 2**62)
NEGATIVE = b"J" + struct.pack("<i", -1)
HOSTILE_TENSORS = {
    "outside": (b"K\x01", b"K\x03\x85", b"K\x01\x85", "lies outside its storage of 3"),
    "before": (NEGATIVE, b"K\x01\x85", b"K\x01\x85", "lies outside its storage of 3"),
    "huge": (b"K\x00", LONG + b"\x85", b"K\x01\x85", "lies outside its storage of 3"),
    "negative size": (b"K\x00", NEGATIVE + b"\x85", b"K\x01\x85", "impossible shape"),
    "many dimensions": (b"K\x00", b"(" + b"K\x01" * 99 + b"t", b"K\x01\x85", "impossible shape"),
    "strides too few": (b"K\x00", b"K\x03\x85", b")", "not row-major"),
    "not numbers": (b"K\x00", b"N\x85", b"K\x01\x85", "as torch.save does not"),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_tensors_that_lie_about_their_storage_are_refused(directory, case):
    *parts, message = HOSTILE_TENSORS[case]
    members = {"archive/data.pkl": tensor_bytes(*parts), "archive/data/0": bytes(12)}
    assert message in refusal(write_zip(directory, members))


def test_the_tensor_of_those_tests_is_read_if_it_tells_the_truth(directory):
    pickled = tensor_bytes(b"K\x01", b"K\x02\x85", b"K\x01\x85")
    members = {"archive/data.pkl": pickled, "archive/data/0": torch.arange(3.0).numpy().tobytes()}
    with open_source(write_zip(directory, members)) as source:
        assert source.read("a").tolist() == [1, 2]


HOSTILE_PICKLES = {
    "deep tuples": b"\x80\x02" + b")" + b"\x85" * (MAX_INSTRUCTIONS - 9) + b".",
    "many dicts": b"\x80\x02" + b"}" * (MAX_INSTRUCTIONS + 10),
    "many marks": b"\x80\x02" + b"(" * (MAX_INSTRUCTIONS + 10),
    "memo of nothing": b"\x80\x02j\xff\xff\xff\xff.",
    "itself": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
    "doubled": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 1000 + b".",
    "long text": b"\x80\x02X\xff\xff\xff\xff.",
    "long number": b"\x80\x02\x8a\xff" + bytes(255) + b".",
    "surrogates": b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",
    "key twice": b"\x80\x02}" + (text("a") + b"Ns") * 2 + b".",
    "no arguments": b"\x80\x02" + global_of("torch._utils._rebuild_tensor_v2") + b")R.",
    "storage called": b"\x80\x02" + global_of("torch.FloatStorage") + b")R.",
    "state of a tuple": b"\x80\x02)}b.",
    "protocol 0": pickle.dumps({"a": 1}, protocol=0),
    "numpy": pickle.dumps({"a": torch.ones(1).numpy()}, protocol=2),
    "a set": pickle.dumps({1, 2}, protocol=2),
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"\x80\x02(iposix\nsystem\n.",
    "an object": b"\x80\x02(cposix\nsystem\no.",
    "empty": b"",
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused_in_one_line(case):
    with pytest.raises(AdapterError) as caught:
        read_state_dict_pickle(HOSTILE_PICKLES[case], PICKLE_FILE)
    assert str(caught.value).startswith(PICKLE_FILE)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_memo_of_four_billion_places_takes_no_memory():
    tracemalloc.start()
    try:
        assert read_state_dict_pickle(b"\x80\x02}r\xff\xff\xff\xff.", PICKLE_FILE) == {}
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_catalog_describes_a_pickle_without_torch(tmp_path):
    """What a scan costs must not depend on who saved the adapter how."""
    import subprocess
    import sys

    model = tiny_llama()
    adapted = make_peft_adapter(model, tmp_path, {"target_modules": ["q_proj"]})
    adapted.save_pretrained(str(tmp_path), safe_serialization=False, save_embedding_layers=False)
    (tmp_path / WEIGHTS_FILE).unlink()
    code = (
        "import sys; from pathlib import Path\n"
        "from loraswarm.adapters.reading import read_adapter_info\n"
        "from loraswarm.core.base_shape import BaseShape\n"
        f"shape = {shape_of(model)!r}\n"
        f"assert read_adapter_info(Path({str(tmp_path)!r}), 'a', shape).modules\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
