"""Files made to break the reader: each is refused at once, in one line, without much memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from adapter_factory import CONFIG_FILE, SMALL_SHAPE, WEIGHTS_FILE, save_random_adapter
from counted_work import at_most_calls
from loraswarm.adapters.bounded_yaml import MAX_YAML_BYTES, read_yaml
from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.describing import scan_now
from loraswarm.adapters.expression_cost import MAX_WAYS, num_ways
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.tar_directory import MAX_MEMBERS, read_tar
from loraswarm.core.base_shape import TARGETS, BaseShape
from loraswarm.errors import AdapterError
from nemo_factory import Layout, nemo_config, write_tar

LIMIT_CALLS = 1_000_000
LIMIT_BYTES = 64 * 2**20
PICKLE_FILE = "adapter_model.bin"
NEMO_FILE = "a.nemo"
CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def refusal(path: Path, shape: BaseShape = SMALL_SHAPE) -> str:
    """The message, after checking that it is one bounded line."""
    with pytest.raises(AdapterError) as caught:
        read_adapter_info(path, "a", shape)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1000
    return text


def check_is_cheap(path: Path) -> str:
    """`refusal` within LIMIT_CALLS, then within LIMIT_BYTES."""
    with at_most_calls(LIMIT_CALLS):
        text = refusal(path)
    tracemalloc.start()
    try:
        assert refusal(path) == text
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    return text


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(**changes: object) -> bytes:
    return safetensors({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


HOSTILE_SAFETENSORS = {
    "empty": (b"", "cut short or not"),
    "header of 2 GB": (struct.pack("<Q", 2**31) + b"{}", "declares a header of 2147483648"),
    "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", "declares a header"),
    "deep header": (safetensors(b"[" * 100_000), "not valid JSON"),
    "deep value": (safetensors(b'{"t":' * 100_000 + b"}" * 100_000), "not valid JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (safetensors([]), "not a JSON object"),
    "two million lists": (
        safetensors(b'{"t": [' + b"[]," * 2_000_000 + b"1]}"),
        "more than 200000 lists",
    ),
    "a million dimensions": (one_tensor(shape=[2**62] * 300_000), "more than 8 dimensions"),
    "negative shape": (one_tensor(shape=[-2]), "not whole numbers"),
    "shape of text": (one_tensor(shape="2"), "not whole numbers"),
    "shape of floats": (one_tensor(shape=[2.0]), "not whole numbers"),
    "shape of booleans": (one_tensor(shape=[True]), "not whole numbers"),
    "huge shape": (one_tensor(shape=[2**62, 2**62]), "has 8 bytes, not those"),
    "outside the file": (one_tensor(shape=[2**40], data_offsets=[0, 2**42]), "cut short"),
    "unknown dtype": (one_tensor(dtype="F4"), "unknown dtype 'F4'"),
    "dtype of a list": (one_tensor(dtype=["F32"]), "unknown dtype"),
    "long name": (safetensors({"x" * 100_000: 3}), "lacks dtype"),
    "name of control characters": (safetensors({"\n\x1b[2J": 3}), "lacks dtype"),
}


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused_at_once(tmp_path, case):
    content, message = HOSTILE_SAFETENSORS[case]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG))
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    assert message in check_is_cheap(tmp_path)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path):
    """It takes no room on disk; to read it would take all memory."""
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG))
    for name, message in ((PICKLE_FILE, "not a zip"), (WEIGHTS_FILE, "'t' has 8 bytes|too long")):
        (tmp_path / name).write_bytes(one_tensor())
        os.truncate(tmp_path / name, 2**40)
        assert re.search(message, check_is_cheap(tmp_path))
    os.truncate(tmp_path / CONFIG_FILE, 2**40)
    assert "adapter_config.json has more than" in check_is_cheap(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 133, 1000])
def test_truncated_files_are_refused(tmp_path, length):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=2)
    assert read_adapter_info(tmp_path, "a", SMALL_SHAPE).modules
    os.truncate(tmp_path / WEIGHTS_FILE, length)
    assert "cut short" in check_is_cheap(tmp_path)


HOSTILE_CONFIGS = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 1_000_000,
    "deep value": b'{"r":' * 100_000,
    "long": b" " * (4 * 2**20 + 1),
    "many lists": b'{"peft_type": [' + b"[]," * 300_000 + b"0]}",
    "a number of a million digits": b'{"r": ' + b"9" * 1_000_000 + b"}",
    "rank 0": json.dumps(CONFIG | {"r": 0}).encode(),
    "rank of a billion": json.dumps(CONFIG | {"r": 10**9}).encode(),
    "infinite alpha": b'{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1e999}',
    "NaN alpha": b'{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": NaN}',
    "surrogates": b'{"peft_type": "\\ud800"}',
    "control characters": b'{"peft_type": "\\u001b[2J\\n"}',
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_hostile_configs_are_refused_at_once(tmp_path, case):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=2)
    (tmp_path / CONFIG_FILE).write_bytes(HOSTILE_CONFIGS[case])
    assert CONFIG_FILE in check_is_cheap(tmp_path)


SLOW_EXPRESSIONS = [
    r"(a+)+$",
    r"(.*)*x",
    r"(.*a){20}",
    r".*.*.*.*.*.*x",
    r"(a|aa)+x",
    r"(a|a)*x",
    "(ab|ab|c)" * 30,
    "a?" * 30 + "a" * 30,
    r"(?:a?){30}x",
    r"(\w+\s?)*$",
    r"((a|b)*c*)*",
    r"(?:.*,){9}P",
    r"([a-z_.]+)+\d",
    r"(.*)\1(.*)*",
    r"(?=(.*)*x).*",
    r"(x(y(z+)+)+)+",
]
USUAL_EXPRESSIONS = [
    r".*layers\.[02]\..*\.(q|v|gate)_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(.*\.)?(layers\.[01]\.self_attn\..*)$",
    r"^(?!.*(visual|merger)).*\.(q_proj|k_proj)$",
    r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.",
    r"model\.layers\.(1?[0-9]|2[0-3])\.self_attn\.(q|k|v|o)_proj",
    # What unsloth writes.
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\."
    r"[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj)))",
]


@pytest.mark.parametrize("expression", SLOW_EXPRESSIONS)
def test_expressions_that_can_take_exponential_time_are_refused(tmp_path, expression):
    for key in ("target_modules", "exclude_modules"):
        with pytest.raises(AdapterError, match=f"{key} .*too long to match"):
            ConfigKeys(CONFIG | {key: expression}).selection()
    with pytest.raises(AdapterError, match=r"rank_pattern\[.*too long to match"):
        ConfigKeys({"rank_pattern": {expression: 2}}).rank_patterns("rank_pattern")
    save_random_adapter(tmp_path, SMALL_SHAPE, config_overrides={"target_modules": expression})
    assert "too long to match" in check_is_cheap(tmp_path)


@pytest.mark.parametrize("expression", USUAL_EXPRESSIONS)
def test_expressions_that_people_use_are_not(expression):
    assert num_ways(expression) <= MAX_WAYS


def test_the_costliest_expression_that_is_let_through_ends(tmp_path):
    """Four unbounded repeats in a row, each of which must be tried at each character."""
    expression = ".*.*.*.*!"
    assert num_ways(expression) <= MAX_WAYS
    assert not re.fullmatch(expression, "model.layers.1000.self_attn.down_proj")


def place_fifo(path: Path) -> None:
    os.mkfifo(path)


def place_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def place_directory(path: Path) -> None:
    path.mkdir()


def place_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, NEMO_FILE])
@pytest.mark.parametrize("place", [place_fifo, place_endless_device, place_directory, place_loop])
def test_what_is_no_regular_file_is_never_waited_for(
    tmp_path, name: str, place: Callable[[Path], None]
):
    if name != NEMO_FILE:
        save_random_adapter(tmp_path, SMALL_SHAPE)
        (tmp_path / name).unlink(missing_ok=True)
        if name == PICKLE_FILE:
            (tmp_path / WEIGHTS_FILE).unlink()
    place(tmp_path / name)
    text = check_is_cheap(tmp_path)
    assert name in text or "missing" in text


def nemo_members(**changes: bytes | None) -> dict[str, bytes]:
    config = nemo_config(SMALL_SHAPE, set(TARGETS), 2, Layout())
    members: dict[str, bytes | None] = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights.ckpt": b"",
    }
    return {key: value for key, value in (members | changes).items() if value is not None}


def tar_of(*infos: tuple[tarfile.TarInfo, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for info, content in infos:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a size field that tarfile would not write."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HOSTILE_TARS = {
    "empty": (b"", "cut short or not a tar"),
    "no tar": (b"x" * 2000, "not a tar"),
    "no members": (bytes(1024), "holds no model_config.yaml"),
    "parent": (tar_of(member("../model_config.yaml")), "leads out of the archive"),
    "inner parent": (tar_of(member("a/../../x")), "leads out of the archive"),
    "absolute": (tar_of(member("/etc/passwd")), "leads out of the archive"),
    "symbolic link": (
        tar_of(member("model_config.yaml", tarfile.SYMTYPE, linkname="/etc/passwd")),
        "a symbolic link",
    ),
    "hard link": (
        tar_of(member("model_config.yaml", tarfile.LNKTYPE, linkname="/etc/passwd")),
        "a hard link",
    ),
    "device": (tar_of(member("model_config.yaml", tarfile.CHRTYPE)), "a device"),
    "pipe": (tar_of(member("model_config.yaml", tarfile.FIFOTYPE)), "a pipe"),
    "twice": (tar_of(member("a"), member("./a")), "two members named 'a'"),
    "sparse": (tar_of(member("a", b"S")), "a sparse file"),
    "sparse by header": (
        tar_of(member("a", pax_headers={"GNU.sparse.size": "1"})),
        "a sparse member",
    ),
    "huge extended header": (
        tar_of(member("a", pax_headers={"comment": "x" * 1_000_000})),
        "extended header of 1000",
    ),
    "size for all": (
        tar_of(member("a"), format=tarfile.PAX_FORMAT, pax_headers={"path": "b"}),
        "one name or size",
    ),
    "thousands": (
        tar_of(*(member(f"{index}") for index in range(MAX_MEMBERS + 1))),
        f"more than {MAX_MEMBERS} members",
    ),
    "cut short": (raw_header(b"a", b"00000010000\0"), "cut short"),
    "size of 8 EiB": (raw_header(b"a", b"\x80" + b"\x7f" * 11), "cut short"),
    "negative size": (raw_header(b"a", b"\xff" * 12), "malformed number"),
    "size of text": (raw_header(b"a", b"hello\0"), "malformed number"),
    "endless long names": (raw_header(b"a", b"0\0", b"L") * 9, "too many headers"),
    "name that is not UTF-8": (raw_header(b"\xff\xfe", b"0\0"), "not UTF-8"),
    "huge gzip": (gzip.compress(bytes(64 * 2**20)), "unpacks to more than"),
    "broken gzip": (gzip.compress(bytes(4096))[:-9], "cannot be unpacked"),
    "no gzip": (b"\x1f\x8b" + b"x" * 99, "cannot be unpacked"),
}


@pytest.mark.parametrize("case", HOSTILE_TARS)
def test_hostile_archives_are_refused_at_once(tmp_path, case):
    content, message = HOSTILE_TARS[case]
    (tmp_path / NEMO_FILE).write_bytes(content)
    text = check_is_cheap(tmp_path)
    assert message in text
    assert NEMO_FILE in text
    assert [path.name for path in tmp_path.iterdir()] == [NEMO_FILE]


def test_long_names_and_large_sizes_of_honest_archives_are_read(tmp_path):
    """All three ways in which tarfile writes a long name."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        name = "d" * 60 + "/" + "e" * 80
        (tmp_path / "a").write_bytes(tar_of(member(name, content=b"hello"), format=form))
        with (tmp_path / "a").open("rb") as file:
            members = read_tar(file, "a")
            span = members[name]
            file.seek(span.begin)
            assert file.read(span.num_bytes) == b"hello"


DOUBLED = "a0: &a0 {k: 1}\n" + "".join(
    f"a{index + 1}: &a{index + 1} {{<<: [*a{index}, *a{index}]}}\n" for index in range(40)
)
HOSTILE_YAML = {
    "doubled forty times": (DOUBLED, "aliases are not read"),
    "an alias": ("a: &x 1\nb: *x\n", "aliases are not read"),
    "an object": ("a: !!python/object/apply:os.system [id]\n", "object/apply:os.system' is not"),
    **{
        f"tagged {text}": (f"a: {text}\n", "write a plain value")
        for text in (
            "!!bool zzz",
            "!!int ''",
            "!!int '-'",
            "!!float ''",
            "!!timestamp foo",
            "!!str a",
            "!!set [x]",
            "!!omap x",
            "!!map 'ab'",
            "!!python/name:os.system",
            "! a",
            "!new a",
        )
    },
    "a hexadecimal number without digits": ("a: 0x_\n", "cannot be read"),
    "a binary number without digits": ("a: -0b_\n", "cannot be read"),
    "an offset of days": ("a: 2001-1-1 00:00:00 +99:99\n", "cannot be read"),
    "a number in base 60": ("a: 1" + ":1" * 80_000, "more than 10000 characters"),
    "deep": ("a: " + "[" * 100_000, "more than 32 levels"),
    "deep block": ("".join(" " * index + "a:\n" for index in range(200)), "more than 32 levels"),
    "many": ("a: [" + "1," * 60_000 + "1]", "or 50000 items"),
    "long": ("a: " + "x" * MAX_YAML_BYTES, "at most"),
    "twice": ("a: 1\na: 2\n", "'a' stands there twice"),
    "twice below": ("a:\n  b: 1\n  b: 2\n", "'b' stands there twice"),
    "a list": ("- 1\n", "not a YAML mapping"),
    "empty": ("", "not a YAML mapping"),
    "two documents": ("a: 1\n---\na: 2\n", "cannot be read"),
    "a date that is none": ("a: 2024-99-99\n", "cannot be read"),
    "a number of 100,000 digits": ("a: " + "9" * 100_000, "cannot be read"),
    "a key that is a list": ("? [1, 2]\n: 3\n", "cannot be read"),
    "control characters": ("a: \x01\n", "cannot be read"),
    "not UTF-8": (b"\xff\xff\xff", "cannot be read"),
    "not closed": ('a: "', "cannot be read"),
    "merged into a list": ("<<: 3\n", "cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_yaml_is_refused_at_once(tmp_path, case):
    text, message = HOSTILE_YAML[case]
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_yaml(content, "a.yaml")
    write_tar(tmp_path / NEMO_FILE, nemo_members(**{"model_config.yaml": content}))
    assert "model_config.yaml" in check_is_cheap(tmp_path)


def test_one_hostile_directory_hides_no_good_one(tmp_path):
    save_random_adapter(tmp_path / "good", SMALL_SHAPE)
    for index, (content, _) in enumerate(HOSTILE_SAFETENSORS.values()):
        path = tmp_path / f"bad{index}"
        path.mkdir()
        (path / CONFIG_FILE).write_text(json.dumps(CONFIG))
        (path / WEIGHTS_FILE).write_bytes(content)
    catalog = scan_now([str(tmp_path)], SMALL_SHAPE)
    assert list(catalog.served) == ["good"]
    assert len(catalog.refusals) == len(HOSTILE_SAFETENSORS)
