"""The `onebase` command over a store in a temporary home: what it prints, what it changes, how it fails."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onebase.errors import OnebaseError
from onebase.store import AdapterStore
from onebase_server.cli.main import app
from sample_adapters import BASE, SHAPES, tensors, write_adapter

runner = CliRunner()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    store = AdapterStore(tmp_path / "home" / "adapters")
    for seed in (1, 2):
        source = write_adapter(tmp_path / f"adapter{seed}", tensors(seed=seed))
        store.publish(source, "pirate", base=BASE, base_shapes=SHAPES)
    return tmp_path / "home"


def run(*words: str) -> str:
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_ls_shows_each_adapter_with_what_it_serves(home: Path) -> None:
    shown = run("adapters", "ls")
    assert "pirate" in shown
    assert "@2" in shown


def test_show_prints_the_manifest_as_json(home: Path) -> None:
    shown = json.loads(run("adapters", "show", "pirate@1"))
    assert (shown["id"], shown["base"]["id"]) == ("pirate@1", BASE.id)


def test_rollback_moves_the_name_to_the_version_before(home: Path) -> None:
    assert "@1" in run("adapters", "rollback", "pirate")
    assert AdapterStore(home / "adapters").resolve("pirate").version == 1


def test_rm_refuses_the_served_version_unless_forced(home: Path) -> None:
    with pytest.raises(OnebaseError, match="version 2 is served"):
        run("adapters", "rm", "pirate@2")
    run("adapters", "rm", "pirate@2", "--force")
    assert AdapterStore(home / "adapters").resolve("pirate").version == 1


@pytest.mark.parametrize("command", [("export",), ("adapters", "export")])
def test_export_writes_a_folder_that_can_be_published_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(os, "execv", lambda _program, words: subprocess.run(words, check=True))
    run(*command, "pirate@1", str(tmp_path / "out"), "--form", "peft")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    version = AdapterStore(home / "adapters").import_folder(tmp_path / "out", "again", base=BASE, base_shapes=SHAPES)
    assert version.digest == AdapterStore(home / "adapters").resolve("pirate@1").digest


def test_import_without_its_base_says_how_to_get_it(home: Path, tmp_path: Path) -> None:
    with pytest.raises(OnebaseError, match="onebase base fetch nobody/nothing"):
        run("adapters", "import", str(tmp_path / "adapter1"), "copy", "--base", "nobody/nothing")


def test_an_empty_home_says_what_to_do_next(tmp_path: Path) -> None:
    assert "onebase train" in run("adapters", "ls", "--home", str(tmp_path / "new"))
    assert "onebase base fetch" in run("base", "ls", "--home", str(tmp_path / "new"))


def test_the_version_is_printed() -> None:
    assert run("--version").startswith("onebase ")


@pytest.mark.parametrize("command", ["serve", "chat", "bench", "adapters", "base"])
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in run(command, "--help")


def test_schedules_are_added_listed_and_removed(home: Path) -> None:
    assert "no schedule yet" in run("schedules", "ls")
    added = run("schedules", "add", "pirate", "--cron", "0 3 * * *", "--stored-chats", "--from-current", "--gate")
    schedule_id = added.partition(":")[0]
    listed = run("schedules", "ls")
    assert schedule_id in listed
    assert "0 3 * * * UTC" in listed
    assert "removed" in run("schedules", "rm", schedule_id)
    with pytest.raises(OnebaseError, match="no schedule"):
        run("schedules", "rm", schedule_id)
    with pytest.raises(OnebaseError, match="no cron line"):
        run("schedules", "add", "pirate", "--cron", "at night", "--dataset", "x.jsonl")
