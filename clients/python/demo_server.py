"""The demo's hold on `onebase serve`: start it on a free port, wait until it can serve, call its admin API, stop it.

It knows the server by its command line and by HTTP only, as any client does.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


class DemoError(Exception):
    """A step of the demo can't go on. The message is for the reader of the terminal."""


class ServerProcess:
    """`onebase serve` as a child process. `url` is its address without `/v1`."""

    def __init__(self, home: Path, datasets: Path) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home / "demo-server.log"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        environment = {**os.environ, "ONEBASE_DATASET_ROOTS": str(datasets)}
        command = ["onebase", "serve", "--host", "127.0.0.1", "--port", str(self.port), "--home", str(home)]
        # A demo streams without a pause: by the default policy, serve-first, its retrain would get a tenth of the time.
        command += ["--train-policy", "train-first"]
        self.command = " ".join(command)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops the server in order.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_for(self, path: str, limit_s: float, tick: Callable[[float], None]) -> float:
        """Seconds until `path` answers 200. `tick` is called a few times a second with the seconds so far."""
        started = time.monotonic()
        while (waited := time.monotonic() - started) < limit_s:
            if self._process.poll() is not None:
                raise DemoError(f"the server ended with code {self._process.returncode}:\n{self.last_lines()}")
            try:
                if self.http.get(path).status_code == 200:
                    return waited
            except httpx.TransportError:
                pass  # not listening yet
            tick(waited)
            time.sleep(0.2)
        raise DemoError(f"{path} did not answer 200 within {limit_s:.0f} s:\n{self.last_lines()}")

    def get(self, path: str) -> Any:
        return _body(self.http.get(path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return _body(self.http.post(path, json=body or {}))

    def stop(self, limit_s: float = 60) -> int:
        """SIGTERM; the exit code. A server that does not end in time is killed, and that is a failure."""
        self.http.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def wait(self) -> int:
        """Until the server ends by itself."""
        return self._process.wait()

    def last_lines(self, count: int = 15) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])


def _body(response: httpx.Response) -> Any:
    if response.is_error:
        raise DemoError(f"{response.request.method} {response.request.url}: {response.status_code} {response.text}")
    return response.json()


def _free_port(preferred: int = 8000) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError("no free port on 127.0.0.1")
