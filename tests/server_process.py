"""`doomed_server.py` as a process of its own, and a client of its admin."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from onebase.home import Home

ROOT = Path(__file__).parents[1]
ADMIN = {"Authorization": "Bearer sk-admin-key-1"}
LINE = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}) + "\n"


@contextmanager
def server(home: Home) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server process and a client of its admin; killed at the end if it still runs."""
    path = os.pathsep.join(str(ROOT / part) for part in ("core", "server", "training", "tests"))
    command = [sys.executable, str(Path(__file__).parent / "doomed_server.py"), str(home.root)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http")
        with httpx.Client(base_url=url, headers=ADMIN, timeout=None) as http:
            yield process, http
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
