"""The `onebase` command over a store in a temporary home: what it prints, what it changes, how it fails."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from onebase.errors import OnebaseError
from onebase.store import AdapterStore
from onebase_server.cli.main import app, main
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


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group of the command line, but those that hand their words over to the trainer."""
    for name, command in group.commands.items():
        if not command.context_settings.get("ignore_unknown_options"):
            yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands(get_command(app))), ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    assert "Usage" in run(*path, "--help")


WRONG = [
    (["keys", "create"], 2, "'--name'"),
    (["keys", "create", "--name", "x", "--scope", "root"], 2, "'--scope': expected one of 'inference'"),
    (["keys", "create", "--name", "x", "--models", " , "], 2, "'--models': it names no model"),
    (["keys", "create", "--name", "x", "--rpm", "0"], 2, "'--rpm'"),
    (["keys", "create", "--name", "x", "--tpm", "many"], 2, "'--tpm'"),
    (["keys", "create", "--name", "x", "--tpm", "9999999999999"], 2, "'--tpm': integer above max value"),
    (["keys", "create", "--name", "x", "--expires", "soon"], 2, "'--expires': 'soon' is no span of time"),
    (["keys", "create", "--name", "x", "--expires", "900000000y"], 2, "'--expires': integer above max value"),
    (["keys", "create", "--name", "x", "--owner", "../x"], 2, "'--owner': expected to match"),
    (["keys", "revoke", "key_1"], 1, "no key 'key_1': `onebase keys ls` lists them"),
    (["serve", "--port", "99999"], 2, "'--port'"),
    (["serve", "--dtype", "int4"], 2, "--dtype: 'int4' must be one of auto"),
    (["serve", "--nope"], 2, "--nope"),
    (["schedules", "add", "pirate", "--cron", "at night", "--stored-chats"], 2, "'--cron': 'at night' is no cron line"),
    (["schedules", "add", "pirate", "--every", "1d"], 2, "give either --dataset or --stored-chats"),
    (["adapters", "show", "nobody"], 1, "`nobody` does not exist"),
    (["adapters", "ls", "--home", "/proc/nowhere"], 1, "/proc/nowhere"),
    (["restore", "/nowhere/b.tar", "--home", "/proc/nowhere"], 1, "/nowhere/b.tar is no file"),
    (["chat", "Hi", "--url", "nonsense"], 2, "'--url': nonsense is no URL"),
    (["chat", "Hi", "--url", "http://127.0.0.1:1/v1"], 1, "no server at http://127.0.0.1:1/v1"),
    (["bench", "m", "--extra", "{"], 2, "'--extra': it is not JSON"),
    (["nonsense"], 2, "No such command 'nonsense'"),
]


@pytest.mark.parametrize(("words", "code", "told"), WRONG, ids=[" ".join(words) for words, _, _ in WRONG])
def test_what_is_wrong_is_one_line_that_names_the_option(
    home: Path,
    words: list[str],
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["onebase", *words])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (code, "")
    assert err.startswith("error ")
    assert err.count("\n") == 1, err
    assert told in err


def test_exit_codes_of_commands_are_their_own(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def code_of(*words: str) -> object:
        monkeypatch.setattr("sys.argv", ["onebase", *words])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0

    monkeypatch.setenv("ONEBASE_PORT", "0")
    assert (code_of("keys", "ls"), code_of("keys"), code_of("doctor")) == (0, 2, 0)
    (home / "version").write_text("99\n")
    assert code_of("doctor") == 1


def test_a_key_for_a_model_that_is_not_there_is_made_and_said(home: Path) -> None:
    done = runner.invoke(app, ["keys", "create", "--name", "x", "--models", "pirate,pirat", "--rpm", "60"])
    assert done.exit_code == 0
    assert "'pirat' is no adapter or base here yet" in done.stderr
    assert "'pirate'" not in done.stderr
    assert "60 rpm" in run("keys", "ls")


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
