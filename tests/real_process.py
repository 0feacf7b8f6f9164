"""The server's own process over real weights, on a free port of loopback."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from onebase.home import Home


class Process:
    """`python -m onebase_server` on a free port."""

    def __init__(self, home: Path) -> None:
        self.home = Home(home)
        env = {**os.environ, "ONEBASE_HOME": str(home), "ONEBASE_PORT": "0", "ONEBASE_KV_TOKENS": "8192"}
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
