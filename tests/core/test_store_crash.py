"""The store under kill -9 and under several publishing processes: as before or as after, never between."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from onebase.adapter import digest
from onebase.store import AdapterStore
from sample_adapters import BASE, SHAPES, write_adapter
from store_crasher import check_whole

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from onebase.durable import Staging, locked
root = Path(sys.argv[1])
with Staging(root / ".staging", root / ".lock").folder() as scratch:
    (scratch / "half").write_text("x")
    with locked(root / ".lock"):
        print("ready", flush=True)
        sys.stdin.read()
"""


ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("core", "tests"))}


def crasher(mode: str, root: Path, source: Path) -> int:
    """Runs store_crasher.py, whose checks raise; the number of versions that it leaves."""
    command = [sys.executable, "-m", "store_crasher", mode, str(root), str(source)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_publisher_killed_at_any_moment_leaves_a_whole_store(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    store = AdapterStore(tmp_path / "adapters")
    count = crasher("kill", store.root, source)
    assert count >= 4  # those before the first kill; how many kills came between two, chance decides
    store.sweep()
    assert list((store.root / ".staging").iterdir()) == []
    assert {path.name for path in (store.root / "bot").iterdir()} == {"current.json", "versions"}
    assert len(list((store.root / "bot/versions").iterdir())) == check_whole(store.root) == count
    assert store.publish(source, "bot", base=BASE, base_shapes=SHAPES).version == count + 1


def test_a_killed_lock_holder_blocks_nobody_and_its_scratch_is_swept(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    store = AdapterStore(tmp_path / "adapters")
    store.publish(source, "bot", base=BASE)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    assert len(list((store.root / ".staging").glob("*.lock"))) == 1
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert store.publish(source, "bot", base=BASE).version == 2
    assert list((store.root / ".staging").iterdir()) == []


def test_scratch_of_a_living_owner_is_left_alone(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    store.root.mkdir()
    with store._staging.folder() as scratch:
        (scratch / "half").write_text("x")
        AdapterStore(store.root).sweep()
        assert (scratch / "half").read_text() == "x"
    assert list((store.root / ".staging").iterdir()) == []


def test_publishers_in_several_processes_get_distinct_versions(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    store = AdapterStore(tmp_path / "adapters")
    assert crasher("race", store.root, source) == 15


def test_a_version_folder_that_was_never_committed_does_not_exist(tmp_path: Path) -> None:
    """What a power cut between the two renames leaves."""
    source = write_adapter(tmp_path / "source")
    store = AdapterStore(tmp_path / "adapters")
    store.publish(source, "bot", base=BASE)
    write_adapter(store.root / "bot/versions/2")
    assert check_whole(store.root) == 1
    version = store.publish(source, "bot", base=BASE)
    assert version.version == 2
    assert digest(version.path) == version.digest


def test_the_lock_is_a_kernel_lock(tmp_path: Path) -> None:
    """A lock file that lies around locks nothing: only a living holder does."""
    store = AdapterStore(tmp_path / "adapters")
    store.root.mkdir()
    (store.root / ".lock").write_text("stale")
    store.sweep()
    with (store.root / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
