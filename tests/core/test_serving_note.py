"""What a serving process tells others: counters that are seen at once, and a life that nobody has to declare over."""

import subprocess
import sys
from pathlib import Path

import pytest

from onebase.serving_note import FORMAT, Load, SeenServer, ServerNote, living_servers

CORE = Path(__file__).parents[2] / "core"


def abandoned(folder: Path) -> Path:
    """The note of a busy server that was killed."""
    code = (
        "import os, signal, sys; from pathlib import Path; from onebase.serving_note import ServerNote\n"
        f"note = ServerNote.open(Path({str(folder)!r})); note.ready({{'device': 'cpu'}}); note.tell(3, 0, 9)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(CORE)})
    assert died.returncode == -9
    (path,) = folder.glob("*.load")
    return path


def test_a_reader_sees_load_and_base_as_they_are_told(tmp_path: Path) -> None:
    note = ServerNote.open(tmp_path / "serving")
    (seen,) = living_servers(tmp_path / "serving").values()
    assert not seen.is_ready
    assert seen.load() == Load(0, 0, 0)
    note.tell(2, 5, 17)
    assert seen.load() == Load(2, 5, 17)
    assert seen.load().is_busy
    note.ready({"device": "cpu"})
    assert seen.is_ready
    assert seen.base() == {"device": "cpu"}
    note.tell(0, 0, 18)
    assert not seen.load().is_busy
    note.close()
    assert living_servers(tmp_path / "serving", {seen.path: seen}) == {}


def test_only_the_owner_may_read_a_note(tmp_path: Path) -> None:
    note = ServerNote.open(tmp_path / "serving")
    note.ready({"handles": {}})
    (path,) = (tmp_path / "serving").glob("*.load")
    assert (tmp_path / "serving").stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    assert path.with_suffix(".json").stat().st_mode & 0o077 == 0
    note.close()


def test_a_killed_server_is_known_to_be_dead_though_its_note_says_busy(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    assert SeenServer(path).load().is_busy
    assert living_servers(tmp_path) == {}


def test_the_next_server_removes_the_notes_of_dead_ones_and_no_others(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    first = ServerNote.open(tmp_path)
    assert not path.exists()
    assert not path.with_suffix(".json").exists()
    second = ServerNote.open(tmp_path)
    assert len(living_servers(tmp_path)) == 2
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_a_note_of_another_format_is_left_alone(tmp_path: Path) -> None:
    note = ServerNote.open(tmp_path)
    (path,) = tmp_path.glob("*.load")
    with path.open("r+b") as file:
        file.write((FORMAT + 1).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="format"):
        SeenServer(path)
    assert living_servers(tmp_path) == {}
    note.close()
