"""The catalog serves what is good, explains what is not, and never stops for one bad directory."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle

import pytest

from adapter_factory import CONFIG_FILE, SMALL_SHAPE, WEIGHTS_FILE, save_random_adapter
from locked_files import lock
from loraswarm.adapters import catalog as catalog_module
from loraswarm.adapters import describing
from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.adapters.describing import describe_entries, scan_now
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.stores import Found, ScanChange
from loraswarm.core.client import AdapterSummary
from loraswarm.errors import AdapterError, ConfigError, InvalidRequest, Overloaded, UnknownAdapter

KASA = {"kasa_config": {"beta": 1e-4}}


def catalog_of(*roots, model_name: str | None = None) -> Catalog:
    return scan_now([str(root) for root in roots], SMALL_SHAPE, model_name)


def refusals(catalog: Catalog) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in catalog.refusals}


def test_every_directory_of_a_root_is_an_adapter_named_by_it(tmp_path):
    for seed, name in enumerate(["sql", "router v2", "b.c-d"]):
        save_random_adapter(tmp_path / name, SMALL_SHAPE, seed=seed)
    catalog = catalog_of(tmp_path)
    assert list(catalog.served) == ["b.c-d", "router v2", "sql"]
    assert catalog.refusals == ()
    assert catalog.resolve("sql").location == str(tmp_path / "sql")
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
    assert catalog.resolve("sql").location == str(first)
    (refusal,) = catalog.refusals
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
    assert z.digest == catalog.resolve("z").key[1]
    assert z.path == str(tmp_path / "z")
    assert m.name == "m"
    assert m.refusal == refusals(catalog)["m"]


def test_whatever_describing_an_adapter_raises_refuses_that_adapter_alone(
    tmp_path, monkeypatch, caplog
):
    for name in ("a", "bad", "z"):
        save_random_adapter(tmp_path / name, SMALL_SHAPE)
    describe = describing.read_adapter_info

    def failing(path, name, shape):
        if name == "bad":
            raise KeyError("surprise")
        return describe(path, name, shape)

    monkeypatch.setattr(describing, "read_adapter_info", failing)
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
    assert catalog.refusals == ()


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


def found(name: str, stamp: str = "1", location: str | None = None, **others) -> Found:
    return Found(name, location or f"/adapters/{name}", stamp, **others)


def change(*changed: Found, **others) -> ScanChange:
    return ScanChange(found=changed, **others)


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    """A description to be passed off as that of any adapter."""
    path = save_random_adapter(tmp_path_factory.mktemp("info") / "sql", SMALL_SHAPE, layers=[0])
    return read_adapter_info(path, "sql", SMALL_SHAPE)


def described(info, entry: Entry, digest: str):
    return dataclasses.replace(info, name=entry.name, digest=digest)


def test_what_a_scan_has_changed_is_reported_and_entered():
    catalog = Catalog()
    report = catalog.apply(change(found("a"), found("b"), found("c"), is_first=True, elapsed_s=0.1))
    assert (report.added, report.changed, report.removed) == (("a", "b", "c"), (), ())
    assert report.elapsed_s == 0.1
    report = catalog.apply(change(found("b", "2"), found("d"), removed=(found("a"),)))
    assert (report.added, report.changed, report.removed) == (("d",), ("b",), ("a",))
    assert [row.name for row in catalog.summaries()] == ["b", "c", "d"]
    with pytest.raises(UnknownAdapter, match=r"known: b, c, d$"):
        catalog.resolve("a")


def test_the_same_content_found_again_is_no_new_generation(info):
    catalog = Catalog()
    catalog.apply(change(found("a"), is_first=True))
    entry = catalog.learned(catalog.resolve("a"), described(info, catalog.resolve("a"), "x"))
    report = catalog.apply(change(found("a"), is_first=True))
    assert (report.added, report.changed, report.removed) == ((), (), ())
    assert catalog.resolve("a") is entry


def test_a_change_of_content_is_a_new_generation_and_the_old_key_is_not_current(info):
    catalog = Catalog()
    catalog.apply(change(found("a")))
    old = catalog.learned(catalog.resolve("a"), described(info, catalog.resolve("a"), "x"))
    assert catalog.is_current(old.key)
    catalog.apply(change(found("a", "2")))
    new = catalog.resolve("a")
    assert (old.generation, new.generation, new.info) == (1, 2, None)
    assert not catalog.is_current(old.key)
    assert catalog.undescribed() == [new]
    new = catalog.learned(new, described(info, new, "y"))
    assert catalog.entry_of(("a", "y")) is new
    assert catalog.entry_of(old.key) is None
    assert catalog.undescribed() == []


def test_a_vanished_adapter_that_comes_back_counts_on_and_may_have_its_old_key(info):
    catalog = Catalog()
    catalog.apply(change(found("a")))
    old = catalog.learned(catalog.resolve("a"), described(info, catalog.resolve("a"), "x"))
    catalog.apply(change(removed=(found("a"),)))
    assert not catalog.is_current(old.key)
    catalog.apply(change(found("a", "2")))
    new = catalog.learned(catalog.resolve("a"), described(info, catalog.resolve("a"), "x"))
    assert (new.generation, new.key) == (2, old.key)


def test_files_that_turn_out_to_have_changed_are_a_new_generation(info):
    catalog = Catalog()
    catalog.apply(change(found("a")))
    asked = catalog.resolve("a")
    first = catalog.learned(asked, described(info, asked, "x"))
    assert catalog.learned(first, described(info, asked, "x")) == first
    second = catalog.learned(first, described(info, asked, "y"))
    assert (first.generation, second.generation) == (1, 2)
    assert catalog.resolve("a") is second
    assert catalog.summary("a").generation == 2


def test_what_is_learned_of_an_old_generation_changes_nothing(info):
    catalog = Catalog()
    catalog.apply(change(found("a")))
    old = catalog.resolve("a")
    catalog.apply(change(found("a", "2")))
    learned = catalog.learned(old, described(info, old, "x"))
    catalog.refused(old, "bad")
    assert learned.key == ("a", "x")
    assert not catalog.is_current(learned.key)
    assert catalog.resolve("a").info is None
    catalog.remove("a")
    assert catalog.learned(old, described(info, old, "x")).key == ("a", "x")
    assert catalog.summaries()[0].digest == ""


def test_what_is_still_being_written_is_asked_for_later():
    catalog = Catalog()
    report = catalog.apply(change(found("a"), pending=(found("new"), found("a", "2"))))
    assert report.pending == ("a", "new")
    with pytest.raises(Overloaded, match=r"'new' is still being written"):
        catalog.resolve("new")
    assert catalog.state_of("new")[0] == "pending"
    assert catalog.resolve("a").stamp == "1"
    assert catalog.state_of("a") == ("served", "its files are being replaced")
    catalog.apply(change(found("new")))
    assert catalog.resolve("new").generation == 1
    assert catalog.state_of("a") == ("served", None)


def test_a_refused_adapter_whose_files_are_being_written_anew_is_pending():
    catalog = Catalog()
    catalog.apply(change(found("a", problem="no weights")))
    with pytest.raises(AdapterError, match="no weights"):
        catalog.resolve("a")
    catalog.apply(change(pending=(found("a", "2"),)))
    with pytest.raises(Overloaded):
        catalog.resolve("a")
    catalog.apply(change(found("a", "3")))
    assert catalog.resolve("a").generation == 1


def test_unloading_lasts_until_the_files_change():
    catalog = Catalog()
    catalog.apply(change(found("a")))
    assert catalog.remove("a").name == "a"
    with pytest.raises(UnknownAdapter):
        catalog.resolve("a")
    with pytest.raises(UnknownAdapter):
        catalog.remove("a")
    assert catalog.state_of("a") == ("unloaded", "it was unloaded")
    report = catalog.apply(change(found("a"), is_first=True))
    assert report.added == ()
    assert catalog.entry_named("a") is None
    catalog.apply(change(found("a", "2")))
    assert catalog.resolve("a").generation == 2


def test_what_was_shadowed_when_its_name_was_unloaded_stays_away_too():
    catalog = Catalog()
    shadow = found("a", "2", "/2/a", shadowed_by="/adapters/a")
    catalog.apply(change(found("a"), shadow))
    catalog.remove("a")
    catalog.apply(change(found("a"), shadow, is_first=True))
    assert catalog.refusals == ()
    freed = dataclasses.replace(shadow, shadowed_by=None)
    assert catalog.apply(change(freed, removed=(found("a"),))).added == ()
    assert catalog.apply(change(dataclasses.replace(freed, stamp="3"))).added == ("a",)


def test_an_unloaded_adapter_that_vanishes_is_forgotten():
    catalog = Catalog()
    catalog.apply(change(found("a")))
    catalog.remove("a")
    catalog.apply(change(removed=(found("a"),)))
    assert catalog.summaries() == ()
    with pytest.raises(UnknownAdapter):
        catalog.state_of("a")


def test_a_name_in_use_is_loaded_only_in_place():
    catalog = Catalog("base")
    catalog.apply(change(found("a")))
    other = found("a", "9", "/adapters/deep/a")
    with pytest.raises(InvalidRequest) as caught:
        catalog.register(other, in_place=False)
    assert str(caught.value) == (
        "The lora adapter 'a' has already been loaded. If you want to load the adapter in place,"
        " set 'load_inplace' to True."
    )
    entry = catalog.register(other, in_place=True)
    assert (entry.generation, entry.location) == (2, "/adapters/deep/a")
    for name in ("base", "", " a", "a\nb"):
        with pytest.raises(InvalidRequest):
            catalog.check_free(name, in_place=True)
    catalog.check_free("free", in_place=False)


def test_a_refused_name_may_be_loaded_from_elsewhere():
    catalog = Catalog()
    catalog.apply(change(found("a", problem="no weights")))
    catalog.register(found("a", "2", "/adapters/b/a"), in_place=False)
    assert catalog.resolve("a").location == "/adapters/b/a"


def test_what_a_request_loaded_goes_before_what_a_scan_finds():
    catalog = Catalog()
    catalog.apply(change(found("a")))
    catalog.register(found("a", "2", "/adapters/b/a"), in_place=True)
    catalog.apply(change(found("a", "3")))
    assert catalog.resolve("a").location == "/adapters/b/a"
    assert catalog.state_of("a") == ("served", "'/adapters/a' has its name too")
    catalog.remove("a")
    report = catalog.apply(change(found("a", "3"), removed=(found("a", "2", "/adapters/b/a"),)))
    assert report.added == ()
    catalog.apply(change(found("a", "4")))
    assert catalog.resolve("a").location == "/adapters/a"


def test_a_scan_that_ran_meanwhile_does_not_bring_back_what_a_request_unloaded():
    catalog = Catalog()
    loaded = found("a", "1", "/adapters/b/a", is_by_request=True)
    catalog.register(loaded, in_place=False)
    catalog.remove("a")
    changed = dataclasses.replace(loaded, stamp="2")
    assert catalog.apply(change(changed)).added == ()
    catalog.register(changed, in_place=False)
    assert catalog.apply(change(removed=(loaded,))).removed == ()
    assert catalog.resolve("a").stamp == "2"
    assert catalog.apply(change(removed=(changed,))).removed == ("a",)


def test_the_first_scan_of_a_new_scanner_removes_what_is_gone_but_not_what_cannot_be_seen():
    catalog = Catalog()
    catalog.apply(change(found("a"), found("b"), is_first=True))
    catalog.register(found("c", "1", "/adapters/deep/c"), in_place=False)
    report = catalog.apply(change(found("b"), is_first=True, failures=("store down",)))
    assert (report.removed, report.failures) == ((), ("store down",))
    assert catalog.apply(change(found("b"), is_first=True)).removed == ("a",)
    assert [row.name for row in catalog.summaries()] == ["b", "c"]


def test_an_earlier_root_takes_a_name_over_and_gives_it_back():
    catalog = Catalog()
    second = found("a", "2", "/2/a")
    catalog.apply(change(second))
    shadow = dataclasses.replace(second, shadowed_by="/1/a")
    report = catalog.apply(change(shadow, found("a", "1", "/1/a")))
    assert report.changed == ("a",)
    assert catalog.resolve("a").location == "/1/a"
    assert [str(refusal.path) for refusal in catalog.refusals] == ["/2/a"]
    report = catalog.apply(change(second, removed=(found("a", "1", "/1/a"),)))
    assert (report.added, report.changed, report.removed) == ((), ("a",), ())
    assert catalog.resolve("a").location == "/2/a"
    assert catalog.refusals == ()


def test_changed_rows_are_taken_once():
    catalog = Catalog()
    catalog.apply(change(found("a"), found("b")))
    changed, removed = catalog.take_changes()
    assert (sorted(changed), removed) == (["a", "b"], ())
    assert catalog.take_changes() == ({}, ())
    catalog.remove("a")
    catalog.refused(catalog.resolve("b"), "no")
    changed, removed = catalog.take_changes()
    assert removed == ("a",)
    assert changed["b"].refusal == "no"


def test_a_survey_fills_listings_but_never_overrides_what_was_read(info):
    catalog = Catalog()
    catalog.apply(change(found("a"), found("b"), found("c")))
    row = AdapterSummary(name="a", path="/tmp/x", method="lora", digest="x", generation=7)
    catalog.surveyed(found("a"), row)
    assert catalog.summary("a") == dataclasses.replace(row, path="/adapters/a", generation=1)
    assert catalog.resolve("a").info is None
    assert [entry.name for entry in catalog.undescribed()] == ["b", "c"]
    same = catalog.learned(catalog.resolve("a"), described(info, catalog.resolve("a"), "x"))
    assert same.generation == 1
    catalog.surveyed(found("a"), "too late")
    catalog.surveyed(found("b", "2"), "another content")
    catalog.surveyed(found("c"), "bad")
    assert catalog.resolve("a") is same
    assert catalog.entry_named("b") is not None
    with pytest.raises(AdapterError, match="bad"):
        catalog.resolve("c")


def test_descriptions_are_bounded_and_listings_stay(info, monkeypatch):
    monkeypatch.setattr(catalog_module, "MAX_INFOS", 3)
    catalog = Catalog()
    catalog.apply(change(*(found(f"a{i}") for i in range(5))))
    for i in (0, 1, 2):
        entry = catalog.resolve(f"a{i}")
        catalog.learned(entry, described(info, entry, f"x{i}"))
    catalog.resolve("a0")
    entry = catalog.resolve("a3")
    catalog.learned(entry, described(info, entry, "x3"))
    assert sorted(catalog.served) == ["a0", "a2", "a3"]
    assert catalog.resolve("a1").info is None
    assert catalog.is_current(("a1", "x1"))
    assert catalog.summary("a1").method == info.method
    assert [entry.name for entry in catalog.undescribed()] == ["a4"]
    again = catalog.learned(catalog.resolve("a1"), described(info, catalog.resolve("a1"), "x1"))
    assert again.generation == 1


def test_loading_and_unloading_a_name_500_times_leaves_nothing_behind(info):
    catalog = Catalog()
    sizes = []
    for round_ in range(500):
        place = found("a", f"{round_:03}", f"/adapters/v{round_:03}/a")
        entry = catalog.register(place, in_place=False)
        catalog.learned(entry, described(info, entry, f"{round_:03}"))
        assert entry.generation == round_ + 1
        catalog.remove("a")
        catalog.take_changes()
        sizes.append(len(pickle.dumps(vars(catalog))))
    assert max(sizes) - min(sizes) < 32
    assert catalog.served == {}
    assert catalog.undescribed() == []


def test_describing_stops_when_its_time_is_spent(tmp_path):
    for seed in range(3):
        save_random_adapter(tmp_path / f"a{seed}", SMALL_SHAPE, seed=seed)
    catalog = describing.find_now([str(tmp_path)])
    assert describe_entries(catalog, catalog.undescribed(), SMALL_SHAPE, budget_s=0.0) == 0
    assert len(catalog.undescribed()) == 3
    assert catalog.served == {}
    assert describe_entries(catalog, catalog.undescribed(), SMALL_SHAPE, budget_s=60.0) == 3
    assert len(catalog.served) == 3


def test_remote_adapters_are_not_described_before_they_are_here():
    catalog = Catalog()
    catalog.apply(change(found("a", location="s3://bucket/a")))
    assert describe_entries(catalog, catalog.undescribed(), SMALL_SHAPE) == 0
    assert catalog.resolve("a").info is None
    assert catalog.refusals == ()
