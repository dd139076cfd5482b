"""A local store lists adapters without reading them; no path of a request leads out of it."""

from __future__ import annotations

import builtins
import os
import shutil

import pytest

from adapter_factory import CONFIG_FILE, SMALL_SHAPE, WEIGHTS_FILE, save_random_adapter
from loraswarm.adapters.local_store import LocalStore
from loraswarm.adapters.stores import DRIVERS, Driver, Found, open_store
from loraswarm.errors import ConfigError, PathNotFound, StoreError


def fake_adapter(path, weights: bytes = b"x"):
    """An adapter as far as a look can tell."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).write_text("{}")
    (path / WEIGHTS_FILE).write_bytes(weights)
    return path


def stamp_of(path) -> str:
    (found,) = LocalStore(str(path)).look()
    return found.stamp


@pytest.fixture
def root(tmp_path):
    fake_adapter(tmp_path / "adapters" / "sql")
    fake_adapter(tmp_path / "adapters" / "deep" / "er" / "a7")
    fake_adapter(tmp_path / "adapters-evil" / "sql")
    fake_adapter(tmp_path / "outside")
    return tmp_path / "adapters"


def test_a_look_opens_no_file(tmp_path, monkeypatch):
    for index in range(3):
        fake_adapter(tmp_path / f"a{index}")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / CONFIG_FILE).write_text("{}")
    store = LocalStore(str(tmp_path))

    def refuse(*arguments, **options):
        raise AssertionError(f"opened {arguments}")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    found = store.look()
    assert [(item.name, item.location) for item in found] == [
        (name, str(tmp_path / name)) for name in ("a0", "a1", "a2", "weightless")
    ]
    assert [item.problem is None for item in found] == [True, True, True, False]
    assert f"{WEIGHTS_FILE} is missing" in (found[-1].problem or "")


def test_a_stamp_stays_until_a_file_of_the_adapter_changes(tmp_path):
    path = fake_adapter(tmp_path / "sql")
    stamp = stamp_of(path)
    (path / "README.md").write_text("changes nothing")
    (path / ".hidden.nemo").write_text("changes nothing")
    assert stamp_of(path) == stamp
    seen = {stamp}
    for change in (
        lambda: (path / WEIGHTS_FILE).write_bytes(b"longer"),
        lambda: os.utime(path / WEIGHTS_FILE, ns=(5, 5)),
        lambda: os.utime(path / CONFIG_FILE, ns=(5, 5)),
        lambda: (path / "adapter_model.bin").write_bytes(b"x"),
        lambda: (path / CONFIG_FILE).unlink(),
    ):
        change()
        assert stamp_of(path) not in seen
        seen.add(stamp_of(path))


def test_a_file_replaced_by_one_of_the_same_size_and_time_has_another_stamp(tmp_path):
    path = fake_adapter(tmp_path / "sql", b"old")
    before = os.stat(path / WEIGHTS_FILE)
    stamp = stamp_of(path)
    (path / "new").write_bytes(b"new")
    os.utime(path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.rename(path / "new", path / WEIGHTS_FILE)
    assert (path / WEIGHTS_FILE).stat().st_mtime_ns == before.st_mtime_ns
    assert stamp_of(path) != stamp


def test_what_a_link_leads_to_is_in_the_stamp(tmp_path):
    one, two = fake_adapter(tmp_path / "v1"), fake_adapter(tmp_path / "v2")
    link = tmp_path / "root" / "sql"
    link.parent.mkdir()
    link.symlink_to(one)
    (before,) = LocalStore(str(link.parent)).look()
    link.unlink()
    link.symlink_to(two)
    (after,) = LocalStore(str(link.parent)).look()
    assert before.location == after.location == str(link)
    assert before.stamp != after.stamp


def test_a_store_that_is_gone_cannot_be_looked_at(root):
    store = LocalStore(str(root))
    assert [found.name for found in store.look()] == ["deep", "sql"]
    shutil.rmtree(root)
    with pytest.raises(StoreError, match=r"adapters.*does not exist") as caught:
        store.look()
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="gone"):
        store.locate("sql")


@pytest.mark.parametrize(
    "path", ["sql", "./sql", "sql/", "{root}/sql", "{root}//sql/.", "{root}/link"]
)
def test_a_path_within_the_root_is_located(root, path):
    (root / "link").symlink_to(root / "sql")
    store = LocalStore(str(root))
    found = store.locate(path.format(root=root))
    (listed,) = [item for item in store.look() if item.name == "sql"]
    assert found == listed
    assert store.fetch(found, root / "unused") == root / "sql"


def test_what_lies_deeper_is_located(root):
    found = LocalStore(str(root)).locate("deep/er/a7")
    assert (found.name, found.location) == ("a7", str(root / "deep" / "er" / "a7"))


def test_a_root_that_is_a_link_locates_by_both_its_names(root, tmp_path):
    (tmp_path / "current").symlink_to(root)
    store = LocalStore(str(tmp_path / "current"))
    for path in (tmp_path / "current" / "sql", root / "sql"):
        assert store.locate(str(path)).location == str(tmp_path / "current" / "sql")


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "sql/../../outside",
        "sql/../sql",
        "{root}/../outside",
        "{tmp}/outside",
        "{tmp}/adapters-evil/sql",
        "{tmp}/nothing/there",
        "{tmp}",
        "/",
        "/etc/passwd",
        "link-out",
        "{root}/link-out",
        "link-to-parent/outside",
        "has-linked-weights",
        "sql\0",
        "\0",
        "file://{root}/sql",
        "s3://bucket/sql",
        "http://127.0.0.1/sql",
        "simplecache::file://{root}/sql",
    ],
)
def test_no_path_leads_out_of_the_root(root, tmp_path, path):
    (root / "link-out").symlink_to(tmp_path / "outside")
    (root / "link-to-parent").symlink_to(tmp_path)
    (root / "has-linked-weights").mkdir()
    (root / "has-linked-weights" / CONFIG_FILE).write_text("{}")
    (root / "has-linked-weights" / WEIGHTS_FILE).symlink_to(tmp_path / "outside" / WEIGHTS_FILE)
    store = LocalStore(str(root))
    path = path.format(root=root, tmp=tmp_path)
    if path.startswith("simplecache"):
        with pytest.raises(PathNotFound):  # a path like any other, and nothing is there
            store.locate(path)
    else:
        assert store.locate(path) is None
    assert store.locate("sql") is not None


def test_a_link_out_of_the_root_is_served_where_an_operator_put_it(root, tmp_path):
    (root / "link-out").symlink_to(tmp_path / "outside")
    (found,) = [item for item in LocalStore(str(root)).look() if item.name == "link-out"]
    assert found.problem is None


@pytest.mark.parametrize(
    "path", ["nothing", "sql/nothing", "deep", "x" * 300, "", "loop", "%2e%2e"]
)
def test_a_path_within_the_root_without_an_adapter_is_not_found(root, path):
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(PathNotFound, match="no adapter"):
        LocalStore(str(root)).locate(path)


def test_an_archive_may_be_named_itself(root):
    (root / "deep" / "mine.nemo").write_bytes(b"x")
    store = LocalStore(str(root))
    found = store.locate("deep/mine.nemo")
    assert (found.name, found.problem) == ("mine.nemo", None)
    assert store.fetch(found, root) == root / "deep" / "mine.nemo"


def test_the_root_itself_may_be_the_adapter(tmp_path):
    path = save_random_adapter(tmp_path / "sql", SMALL_SHAPE)
    store = LocalStore(str(path))
    assert store.locate(str(path)) == store.locate("") == store.look()[0]


def test_stores_are_opened_by_their_scheme(tmp_path, monkeypatch):
    assert open_store(str(tmp_path)).root == str(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        open_store(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"unknown scheme 'ftp'.*s3, gs, hf, http"):
        open_store("ftp://host/adapters")
    with pytest.raises(ConfigError, match="unknown scheme 'file'"):
        open_store(f"file://{tmp_path}")
    monkeypatch.setitem(DRIVERS, "s3", Driver("no_such_module", "s3"))
    with pytest.raises(ConfigError, match=r"needs no_such_module.*pip install 'loraswarm\[s3\]'"):
        open_store("s3://bucket/adapters")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://", "names no host or bucket"),
        ("https:///adapters", "names no host or bucket"),
        ("https://host/a?token=secret", "no query"),
        ("https://host/a#b", "no query"),
        ("https://me:secret@host/a", "no credentials"),
        ("s3://bucket/../other", "not plain"),
    ],
)
def test_a_url_that_holds_more_than_a_place_is_refused(url, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        open_store(url)
    assert "me:secret" not in str(caught.value)


def test_what_is_found_is_the_same_whenever_it_was_written():
    assert Found("a", "/a", "1", changed_s=1.0) == Found("a", "/a", "1", changed_s=2.0)
    assert Found("a", "/a", "1") != Found("a", "/a", "2")
