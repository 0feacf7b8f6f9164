"""The server's own process over real weights, on a free port of loopback."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from onebase.base_fetch import fetch_embedded
from onebase.home import Home

PREPARED = Path(__file__).parents[1] / ".pytest_cache" / "onebase-home"


def prepare_home(home: Path) -> Home:
    """A home of its own that has the embedded base already: fetched once for all tests, then linked file by file.

    Compiled CPU kernels are shared too; adapters, runs and records are not."""
    prepared = Home(PREPARED).create()
    base = fetch_embedded(prepared)
    made = Home(home).create()
    shutil.copytree(base.path, made.bases / base.path.name, copy_function=link_or_copy)
    shutil.rmtree(made.cache, ignore_errors=True)
    made.cache.symlink_to(prepared.cache)
    return made


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem
        shutil.copy2(source, target)


class Process:
    """`python -m onebase_server` on a free port; on the embedded base, or another folder's."""

    def __init__(self, home: Path, base: Path | None = None) -> None:
        self.home = prepare_home(home) if base is None else Home(home).create()
        env = {
            **os.environ,
            "ONEBASE_HOME": str(home),
            "ONEBASE_PORT": "0",
            "ONEBASE_KV_TOKENS": os.environ.get("ONEBASE_KV_TOKENS", "8192"),
        }
        env["ONEBASE_DRAIN_S"] = "600"  # however slow the machine is, what runs at the end is to be finished
        if base is not None:
            env["ONEBASE_BASE"] = str(base)
        self.log = home.with_suffix(".log")
        with self.log.open("wb") as log:
            self.child = subprocess.Popen([sys.executable, "-m", "onebase_server"], env=env, stderr=log)
        self.url = self.wait_for(r"listening at (\S+?);")

    def wait_for(self, pattern: str) -> str:
        while True:
            found = re.search(pattern, self.log.read_text("utf-8"))
            if found:
                return found[1] if found.groups() else found[0]
            assert self.child.poll() is None, self.log.read_text("utf-8")
            time.sleep(0.05)
