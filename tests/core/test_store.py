"""The adapter store: versions, pointers, names, imports. Crashes and races are in test_store_crash.py."""

import json
import os
import threading
from pathlib import Path

import pytest

from onebase.adapter import AdapterFiles, BaseIdentity, digest
from onebase.errors import AdapterInvalid, Conflict, InvalidInput, ModelNotFound, OnebaseError
from onebase.store import AdapterStore, Version
from onebase.store_hold import Hold, unheld
from sample_adapters import BASE, SHAPES, config, tensors, write_adapter

FT = "ft:tiny:acme:bot:abcd1234"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "home/adapters")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "source")


def publish(store: AdapterStore, source: Path, name: str = "bot", **options: object) -> Version:
    return store.publish(source, name, base=BASE, base_shapes=SHAPES, **options)  # type: ignore[arg-type]


def test_a_published_version_resolves_by_name_number_and_alias(store: AdapterStore, source: Path) -> None:
    first = publish(store, source, aliases=[FT])
    second = publish(store, source, training={"lr": 1e-4}, metrics={"loss": 0.5})
    assert (store.resolve("bot").id, store.resolve("bot@1").id, store.resolve(FT).id) == ("bot@2", "bot@1", "bot@1")
    assert first.digest == digest(first.path) == second.digest
    assert second.manifest.base == BASE
    assert second.manifest.metrics == {"loss": 0.5}
    assert len(second.manifest.training_hash) == 64
    assert store.aliases() == {FT: "bot@1"}


def test_a_version_has_exactly_its_three_files(store: AdapterStore, source: Path) -> None:
    (source / "README.md").write_text("x")
    (source / "training_args.bin").write_bytes(b"pickle")
    version = publish(store, source)
    names = {path.name for path in version.path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "onebase.json"}


def test_publishing_need_not_serve(store: AdapterStore, source: Path) -> None:
    publish(store, source, make_current=False)
    with pytest.raises(ModelNotFound):
        store.resolve("bot")
    assert store.resolve("bot@1").version == 1
    publish(store, source)
    publish(store, source, make_current=False)
    assert store.resolve("bot").version == 2


@pytest.mark.parametrize(
    ("asked", "near"),
    [("bott", ("bot",)), ("bot@9", ("bot@1", "bot@2")), ("bot@", ("bot@1", "bot@2")), ("zzz", ()), (f"{FT}x", (FT,))],
)
def test_an_unknown_model_lists_near_names(
    store: AdapterStore, source: Path, asked: str, near: tuple[str, ...]
) -> None:
    publish(store, source, aliases=[FT])
    publish(store, source)
    with pytest.raises(ModelNotFound) as caught:
        store.resolve(asked)
    assert caught.value.near == near


HOSTILE = [
    "..", ".", "../x", "a/b", "/etc", "", "A", "a b", "ä", "a\n", "-a", ".staging", "x" * 65, "a\x00", "bot@01",
    "bot@-1", "bot@1/../1", "bot@٣", "bot@1e0", "ft:", "ft:a b", "ft:../../x",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_never_becomes_a_path(store: AdapterStore, source: Path, name: str) -> None:
    publish(store, source)
    before = sorted(store.root.rglob("*"))
    with pytest.raises(ModelNotFound):
        store.resolve(name)
    with pytest.raises(OnebaseError):
        publish(store, source, name)
    with pytest.raises(OnebaseError):
        store.remove(name)
    assert sorted(store.root.rglob("*")) == before


def test_rollback_walks_back_through_what_was_served(store: AdapterStore, source: Path) -> None:
    for _ in range(3):
        publish(store, source)
    assert store.rollback("bot").weights == {2: 1.0}
    assert store.rollback("bot").weights == {1: 1.0}
    with pytest.raises(Conflict, match="no earlier"):
        store.rollback("bot")
    assert publish(store, source).version == 4
    assert store.rollback("bot").weights == {1: 1.0}
    store.set_current("bot", 4)
    assert store.rollback("bot", to=2).weights == {2: 1.0}
    with pytest.raises(InvalidInput, match="version 9 does not exist"):
        store.rollback("bot", to=9)


def test_a_move_from_what_is_no_more_served_is_refused(store: AdapterStore, source: Path) -> None:
    for _ in range(3):
        publish(store, source)
    assert store.set_current("bot", 1, expected={3: 1.0}).weights == {1: 1.0}
    with pytest.raises(Conflict, match="moved meanwhile"):
        store.set_current("bot", 2, expected={3: 1.0})
    assert store.resolve("bot").version == 1


def test_a_canary_splits_by_weight_and_sticks(store: AdapterStore, source: Path) -> None:
    for _ in range(2):
        publish(store, source)
    store.set_current("bot", {1: 9, 2: 1})
    draws = [store.resolve("bot", draw=i / 1000).version for i in range(1000)]
    assert (draws.count(1), draws.count(2)) == (900, 100)
    users = {f"user-{i}": store.resolve("bot", sticky=f"user-{i}").version for i in range(500)}
    assert 20 < list(users.values()).count(2) < 90
    assert all(store.resolve("bot", sticky=user).version == version for user, version in users.items())
    assert store.rollback("bot").weights == {2: 1.0}


@pytest.mark.parametrize("weights", [{}, {1: 0.0}, {1: -1.0, 2: 2.0}, {1: float("nan")}, {1: float("inf")}, {7: 1.0}])
def test_bad_weights_are_refused(store: AdapterStore, source: Path, weights: dict[int, float]) -> None:
    for _ in range(2):
        publish(store, source)
    with pytest.raises(InvalidInput):
        store.set_current("bot", weights)
    assert store.resolve("bot").version == 2


def test_removing_what_is_served_needs_a_word(store: AdapterStore, source: Path) -> None:
    for _ in range(3):
        publish(store, source)
    with pytest.raises(Conflict, match="version 3 is served"):
        store.remove("bot@3")
    store.remove("bot@3", new_current=1)
    assert store.resolve("bot").version == 1
    store.remove("bot@1", force=True)
    assert store.resolve("bot").version == 2
    assert [v.version for v in store.list()[0].versions] == [2]
    with pytest.raises(ModelNotFound):
        store.resolve("bot@1")
    assert publish(store, source).version == 4


def test_a_removed_adapter_is_gone_and_its_numbers_are_not_reused(store: AdapterStore, source: Path) -> None:
    publish(store, source, aliases=[FT])
    store.remove("bot")
    assert store.list() == []
    for model in ("bot", "bot@1", FT):
        with pytest.raises(ModelNotFound):
            store.resolve(model)
    assert not (store.root / "bot/versions/1").exists()
    assert publish(store, source, aliases=[FT]).id == "bot@2"


def test_an_alias_means_one_version(store: AdapterStore, source: Path) -> None:
    publish(store, source, aliases=[FT])
    with pytest.raises(Conflict, match="taken"):
        publish(store, source, "other", aliases=[FT])
    assert store.get("other") is None
    publish(store, source)
    with pytest.raises(Conflict, match="already means bot@1"):
        store.set_alias(FT, "bot@2")
    store.set_alias(FT + "x", "bot")
    assert store.resolve(FT + "x").id == "bot@2"
    store.remove(FT)
    with pytest.raises(ModelNotFound):
        store.resolve(FT)


def test_a_foreign_peft_folder_is_imported(store: AdapterStore, source: Path) -> None:
    version = store.import_folder(source, "bot", base=BASE, base_shapes=SHAPES)
    assert version.manifest.base == BASE
    assert version.manifest.prompt_format == "human_response"
    unchecked = store.import_folder(source, "bot")
    assert unchecked.manifest.base == BaseIdentity(id="someone/tiny", quantization="unknown")


def test_an_exported_version_comes_back_the_same(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    version = publish(store, source, prompt_format="chat_template", training={"epochs": 2}, metrics={"loss": 1.0})
    store.export("bot", tmp_path / "out")
    again = store.import_folder(tmp_path / "out", "again", base=BASE, base_shapes=SHAPES)
    assert again.digest == version.digest
    assert again.manifest.prompt_format == "chat_template"
    assert again.manifest.training == {"epochs": 2}
    with pytest.raises(Conflict, match="not an empty folder"):
        store.export("bot", tmp_path / "out")


def refused(store: AdapterStore, folder: Path) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        store.import_folder(folder, "bot", base=BASE, base_shapes=SHAPES)
    with pytest.raises(AdapterInvalid):
        store.publish(folder, "bot", base=BASE, base_shapes=SHAPES)
    assert {path.name for path in store.root.rglob("*")} <= {".lock", ".staging"}
    return "; ".join(caught.value.problems)


def test_links_are_refused(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    target = (source / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (source / "adapter_model.safetensors").symlink_to(target)
    assert "symbolic link" in refused(store, source)


def test_a_pipe_in_place_of_a_file_does_not_block(store: AdapterStore, source: Path) -> None:
    (source / "adapter_config.json").unlink()
    os.mkfifo(source / "adapter_config.json")
    with pytest.raises(AdapterInvalid, match="not a plain file"):
        publish(store, source)


def test_broken_adapters_are_refused_and_leave_nothing(store: AdapterStore, source: Path) -> None:
    weights = source / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "cut off" in refused(store, source)
    weights.unlink()
    (source / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle" in refused(store, source)
    (source / "adapter_model.bin").unlink()
    assert "missing" in refused(store, source)
    write_adapter(source, tensors(rank=3), config(base_model_name_or_path="someone/else"))
    reasons = refused(store, source)
    assert "someone/else" in reasons
    assert reasons.count("expected [4, 8] (rank 4)") == 4
    assert "nowhere is missing" not in refused(store, source.with_name("nowhere"))


def test_another_process_is_seen_at_once(store: AdapterStore, source: Path) -> None:
    """Two stores on one folder share nothing but the disk, as two processes do."""
    other = AdapterStore(store.root)
    for number in range(1, 6):
        publish(other, source)
        assert store.resolve("bot").version == number
    other.rollback("bot")
    assert store.resolve("bot").version == 4
    other.remove("bot")
    with pytest.raises(ModelNotFound):
        store.resolve("bot")


def test_an_old_pointer_is_read_once(store: AdapterStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, source)
    os.utime(store.root / "bot/current.json", (1, 1))
    store.resolve("bot")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
        assert store.resolve("bot").version == 1
    publish(store, source)
    assert store.resolve("bot").version == 2


def test_a_damaged_pointer_says_so(store: AdapterStore, source: Path) -> None:
    publish(store, source)
    (store.root / "bot/current.json").write_text("{")
    with pytest.raises(OnebaseError, match="damaged"):
        store.resolve("bot")


def test_an_empty_or_absent_store_lists_nothing(store: AdapterStore) -> None:
    assert store.list() == []
    store.sweep()
    with pytest.raises(ModelNotFound):
        store.resolve("bot")


def test_the_manifest_on_disk_is_the_versions(store: AdapterStore, source: Path) -> None:
    version = publish(store, source)
    assert json.loads((version.path / "onebase.json").read_text())["name"] == "bot"


def test_history_outlives_a_pointer_that_is_read_from_memory(store: AdapterStore, source: Path) -> None:
    for _ in range(3):
        publish(store, source)
    pointer = store.root / "bot" / "current.json"
    os.utime(pointer, (1e9, 1e9))  # old enough to be remembered
    for _ in range(2):
        assert store.resolve("bot").version == 3
    assert publish(store, source, make_current=False).version == 4
    os.utime(pointer, (1e9, 1e9))
    assert store.resolve("bot").version == 3
    assert store.rollback("bot").weights == {2: 1.0}
    assert store.rollback("bot").weights == {1: 1.0}


def test_the_settings_of_a_training_are_read_when_they_are_asked_for(store: AdapterStore, source: Path) -> None:
    version = publish(store, source, training={"lr": 1e-4})
    assert version.manifest.training == {"lr": 1e-4}
    store.remove("bot@1", force=True)
    with pytest.raises(AdapterInvalid, match="manifest can't be read"):
        _ = version.manifest


@pytest.mark.parametrize("wait", [False, True])
def test_the_files_of_a_removed_version_stay_while_somebody_holds_them(
    store: AdapterStore, source: Path, wait: bool
) -> None:
    version = publish(store, source)
    hold, other = Hold(version.path), Hold(version.path)
    AdapterStore(store.root).remove("bot")
    assert store.get("bot") is None
    hold.close()
    store.sweep()
    AdapterFiles.read(version.path)
    waiting = threading.Thread(target=store.discard, args=("bot", 1), kwargs={"wait": wait})
    waiting.start()
    if not wait:
        waiting.join()
    assert version.path.is_dir()
    other.close()
    waiting.join()
    store.sweep()
    assert not version.path.exists()
    with pytest.raises(FileNotFoundError):
        Hold(version.path)


def test_files_that_are_being_removed_can_not_be_held(store: AdapterStore, source: Path) -> None:
    version = publish(store, source)
    with unheld(version.path, wait=False) as is_free:
        assert is_free
        with pytest.raises(FileNotFoundError):
            Hold(version.path)
    Hold(version.path).close()
