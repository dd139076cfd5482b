"""The catalog serves what is good, explains what is not, and never stops for one bad directory."""

from __future__ import annotations

import logging
import os

import pytest

from adapter_factory import CONFIG_FILE, SMALL_SHAPE, WEIGHTS_FILE, save_random_adapter
from locked_files import lock
from loraswarm.adapters import catalog as catalog_module
from loraswarm.adapters.catalog import Catalog
from loraswarm.errors import AdapterError, ConfigError, UnknownAdapter

KASA = {"kasa_config": {"beta": 1e-4}}


def catalog_of(*roots, model_name: str | None = None) -> Catalog:
    catalog = Catalog([str(root) for root in roots], SMALL_SHAPE, model_name)
    catalog.scan()
    return catalog


def refusals(catalog: Catalog) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in catalog.refused}


def test_every_directory_of_a_root_is_an_adapter_named_by_it(tmp_path):
    for seed, name in enumerate(["sql", "router v2", "b.c-d"]):
        save_random_adapter(tmp_path / name, SMALL_SHAPE, seed=seed)
    catalog = catalog_of(tmp_path)
    assert list(catalog.served) == ["b.c-d", "router v2", "sql"]
    assert catalog.refused == ()
    assert catalog.resolve("sql").path == tmp_path / "sql"
    assert catalog.resolve("sql").name == "sql"


def test_a_root_with_a_config_is_one_adapter(tmp_path, monkeypatch):
    save_random_adapter(tmp_path / "sql", SMALL_SHAPE)
    save_random_adapter(tmp_path / "sql" / "checkpoint-7", SMALL_SHAPE)
    assert list(catalog_of(tmp_path / "sql").served) == ["sql"]
    assert list(catalog_of(f"{tmp_path}/sql/").served) == ["sql"]
    monkeypatch.chdir(tmp_path / "sql")
    assert list(catalog_of(".").served) == ["sql"]


def test_no_roots_and_empty_roots_serve_nothing(tmp_path):
    assert catalog_of().summaries() == ()
    assert catalog_of(tmp_path).summaries() == ()


def test_a_bad_directory_is_refused_and_the_others_are_served(tmp_path):
    save_random_adapter(tmp_path / "good", SMALL_SHAPE)
    save_random_adapter(tmp_path / "kasa", SMALL_SHAPE, config_overrides=KASA)
    (tmp_path / "empty").mkdir()
    catalog = catalog_of(tmp_path)
    assert list(catalog.served) == ["good"]
    assert set(refusals(catalog)) == {"kasa", "empty"}
    assert "kasa_config" in refusals(catalog)["kasa"]
    assert CONFIG_FILE in refusals(catalog)["empty"]


def test_asking_for_a_refused_adapter_gives_the_reason(tmp_path):
    save_random_adapter(tmp_path / "kasa", SMALL_SHAPE, config_overrides=KASA)
    with pytest.raises(AdapterError, match=r"'kasa'.*kasa_config") as caught:
        catalog_of(tmp_path).resolve("kasa")
    assert caught.value.http_status == 422


def test_asking_for_an_unknown_adapter_lists_the_served_ones(tmp_path):
    save_random_adapter(tmp_path / "sql", SMALL_SHAPE)
    (tmp_path / "broken").mkdir()
    with pytest.raises(UnknownAdapter, match=r"'sqk'; known: sql$") as caught:
        catalog_of(tmp_path).resolve("sqk")
    assert caught.value.http_status == 404


def test_hidden_directories_and_plain_files_are_passed_over(tmp_path):
    save_random_adapter(tmp_path / ".cache", SMALL_SHAPE)
    (tmp_path / "README.md").write_text("adapters")
    (tmp_path / "link.md").symlink_to(tmp_path / "README.md")
    catalog = catalog_of(tmp_path)
    assert catalog.summaries() == ()


def test_a_link_to_a_directory_is_an_adapter_named_by_the_link(tmp_path):
    save_random_adapter(tmp_path / "store" / "v7", SMALL_SHAPE)
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / "sql").symlink_to(tmp_path / "store" / "v7")
    assert list(catalog_of(tmp_path / "roots").served) == ["sql"]


@pytest.mark.parametrize("target", ["nowhere", "sql"])
def test_a_broken_link_is_refused_as_such(tmp_path, target):
    (tmp_path / "sql").symlink_to(tmp_path / target)
    assert "broken symbolic link" in refusals(catalog_of(tmp_path))["sql"]


@pytest.mark.parametrize("problem", ["does not exist", "is not a directory"])
def test_a_root_that_is_no_directory_is_a_config_error(tmp_path, problem):
    root = tmp_path / "adapters"
    if problem == "is not a directory":
        root.write_text("x")
    with pytest.raises(ConfigError, match=f"adapters' {problem}"):
        catalog_of(root)


def test_a_name_taken_in_an_earlier_root_is_refused_in_a_later_one(tmp_path):
    first = save_random_adapter(tmp_path / "1" / "sql", SMALL_SHAPE, seed=1)
    second = save_random_adapter(tmp_path / "2" / "sql", SMALL_SHAPE, seed=2)
    catalog = catalog_of(tmp_path / "1", tmp_path / "2")
    assert catalog.resolve("sql").path == first
    (refusal,) = catalog.refused
    assert refusal.path == second
    assert str(first) in refusal.reason


def test_a_refused_directory_owns_its_name_too(tmp_path):
    (tmp_path / "1" / "sql").mkdir(parents=True)
    save_random_adapter(tmp_path / "2" / "sql", SMALL_SHAPE)
    catalog = catalog_of(tmp_path / "1", tmp_path / "2")
    assert catalog.served == {}
    with pytest.raises(AdapterError, match=CONFIG_FILE):
        catalog.resolve("sql")


def test_the_name_of_the_base_model_is_refused(tmp_path):
    save_random_adapter(tmp_path / "base", SMALL_SHAPE)
    assert list(catalog_of(tmp_path, model_name="other").served) == ["base"]
    reason = refusals(catalog_of(tmp_path, model_name="base"))["base"]
    assert "name of the base model" in reason


@pytest.mark.parametrize("name", [b" sql", b"sql ", b"a\nb", b"a\x1bb", b"\xff\xfe"])
def test_a_name_that_cannot_be_an_id_is_refused_and_can_be_listed(tmp_path, name):
    directory = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    os.mkdir(directory)
    catalog = catalog_of(tmp_path)
    (summary,) = catalog.summaries()
    assert "cannot be a model id" in (summary.refusal or "")
    assert (summary.name + summary.path + (summary.refusal or "")).isprintable()
    summary.name.encode("utf-8")


def test_summaries_show_served_and_refused_sorted_by_name(tmp_path):
    save_random_adapter(
        tmp_path / "z", SMALL_SHAPE, rank={"q_proj": 3, "up_proj": 5}, targets=["q_proj", "up_proj"]
    )
    save_random_adapter(tmp_path / "a", SMALL_SHAPE, config_overrides={"use_rslora": True})
    (tmp_path / "m").mkdir()
    catalog = catalog_of(tmp_path)
    a, m, z = catalog.summaries()
    assert (a.name, a.method, a.max_rank, a.refusal) == ("a", "rslora", 8, None)
    assert (z.name, z.method, z.max_rank, z.refusal) == ("z", "lora", 5, None)
    assert z.num_bytes == (tmp_path / "z" / "adapter_model.safetensors").stat().st_size
    assert z.digest == catalog.resolve("z").digest
    assert z.path == str(tmp_path / "z")
    assert m.name == "m"
    assert m.refusal == refusals(catalog)["m"]


def test_a_new_scan_sees_what_came_changed_and_went(tmp_path):
    save_random_adapter(tmp_path / "gone", SMALL_SHAPE)
    save_random_adapter(tmp_path / "kept", SMALL_SHAPE, rank=3)
    save_random_adapter(tmp_path / "changed", SMALL_SHAPE, rank=3)
    catalog = catalog_of(tmp_path)
    before = dict(catalog.served)
    os.rename(tmp_path / "gone", tmp_path / "come")
    save_random_adapter(tmp_path / "changed", SMALL_SHAPE, rank=4)
    assert dict(catalog.served) == before
    catalog.scan()
    assert set(catalog.served) == {"come", "kept", "changed"}
    assert catalog.resolve("kept") == before["kept"]
    assert catalog.resolve("changed").key != before["changed"].key


def test_a_scan_that_fails_leaves_the_catalog_as_it_was(tmp_path):
    save_random_adapter(tmp_path / "root" / "sql", SMALL_SHAPE)
    catalog = catalog_of(tmp_path / "root")
    os.rename(tmp_path / "root", tmp_path / "moved")
    with pytest.raises(ConfigError, match="root"):
        catalog.scan()
    assert list(catalog.served) == ["sql"]


def test_whatever_describing_an_adapter_raises_refuses_that_adapter_alone(
    tmp_path, monkeypatch, caplog
):
    for name in ("a", "bad", "z"):
        save_random_adapter(tmp_path / name, SMALL_SHAPE)
    describe = catalog_module.read_adapter_info

    def failing(path, name, shape):
        if name == "bad":
            raise KeyError("surprise")
        return describe(path, name, shape)

    monkeypatch.setattr(catalog_module, "read_adapter_info", failing)
    catalog = catalog_of(tmp_path)
    assert list(catalog.served) == ["a", "z"]
    assert refusals(catalog)["bad"] == "adapter 'bad' could not be read: KeyError (see the log)"
    (traced,) = [record for record in caplog.records if record.exc_info]
    assert "KeyError: 'surprise'" in caplog.text
    assert "'bad'" in traced.getMessage()


def test_weights_without_a_config_are_refused_instead_of_overlooked(tmp_path):
    save_random_adapter(tmp_path / "sql", SMALL_SHAPE)
    (tmp_path / "sql" / CONFIG_FILE).unlink()
    assert CONFIG_FILE in refusals(catalog_of(tmp_path / "sql"))["sql"]


def test_a_config_that_is_a_broken_link_makes_its_directory_a_refused_adapter(tmp_path):
    save_random_adapter(tmp_path / "sql", SMALL_SHAPE)
    (tmp_path / "sql" / CONFIG_FILE).unlink()
    (tmp_path / "sql" / CONFIG_FILE).symlink_to(tmp_path / "blob")
    save_random_adapter(tmp_path / "sql" / "checkpoint-7", SMALL_SHAPE)
    assert list(refusals(catalog_of(tmp_path / "sql"))) == ["sql"]


def test_files_beside_adapters_do_not_make_an_adapter_of_their_root(tmp_path):
    save_random_adapter(tmp_path / "sql", SMALL_SHAPE)
    for name in (WEIGHTS_FILE, f"{WEIGHTS_FILE}.bak"):
        (tmp_path / name).write_bytes(b"x")
    catalog = catalog_of(tmp_path)
    assert list(catalog.served) == ["sql"]
    assert catalog.refused == ()


def test_a_root_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    save_random_adapter(tmp_path / "locked" / "sql", SMALL_SHAPE)
    lock(monkeypatch, tmp_path / "locked")
    with pytest.raises(ConfigError, match=r"locked' cannot be read: Permission denied"):
        catalog_of(tmp_path / "locked")


def test_the_message_about_an_unknown_name_is_short_whatever_was_asked_for(tmp_path):
    catalog = catalog_of(tmp_path)
    with pytest.raises(UnknownAdapter) as caught:
        catalog.resolve("x" * 201)
    assert "x" * 200 in str(caught.value)
    assert "x" * 201 not in str(caught.value)
    assert "201 characters" in str(caught.value)
    with pytest.raises(UnknownAdapter) as caught:
        catalog.resolve("x" * 200)
    assert str(caught.value) == f"no model or adapter is named {'x' * 200!r}; known: none"


def test_each_refusal_and_the_scan_are_one_log_line(tmp_path, caplog):
    save_random_adapter(tmp_path / "good", SMALL_SHAPE)
    (tmp_path / "bad").mkdir()
    with caplog.at_level(logging.INFO):
        catalog_of(tmp_path)
    refused, scanned = [record.getMessage() for record in caplog.records]
    assert refused.startswith("adapter refused name='bad' path=")
    assert CONFIG_FILE in refused
    assert "served=1 refused=1" in scanned
    assert "\n" not in refused + scanned
