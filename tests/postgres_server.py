"""A real PostgreSQL for the tests: the `pgserver` wheel's binaries, or those on PATH, in a folder of its own.

PostgreSQL refuses to run as root, so root starts it under another uid. Only a Unix socket is opened.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


def binaries() -> Path:
    """The folder of `initdb` and `postgres`. Its package is not imported: it would start threads and warn."""
    spec = importlib.util.find_spec("pgserver")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "pginstall" / "bin"
    found = shutil.which("postgres")
    if found is None:
        raise RuntimeError("no PostgreSQL: install the dev extra (pgserver), or put `postgres` and `initdb` on PATH")
    return Path(found).resolve().parent


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty server that is gone afterwards."""
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="onebase-pg-", dir="/tmp"))  # a socket's path has to be short
    folder.chmod(0o700)
    if user:
        os.chown(folder, NOBODY, NOBODY)
    data = folder / "data"
    initdb: list[str | Path] = [
        binaries() / "initdb",
        "-D",
        data,
        "-U",
        "onebase",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)  # type: ignore[call-overload]
    log = (folder / "log").open("wb")
    settings = [f"unix_socket_directories={folder}", "listen_addresses=", "fsync=off", "max_connections=40"]
    server = subprocess.Popen(
        [binaries() / "postgres", "-D", data, *(word for each in settings for word in ("-c", each))],
        stdout=log, stderr=log, cwd="/", **user,
    )  # type: ignore[call-overload]  # fmt: skip
    try:
        ready: list[str | Path] = [binaries() / "pg_isready", "-q", "-h", folder, "-U", "onebase"]
        while subprocess.run(ready, check=False).returncode != 0:
            if server.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
        yield f"postgresql://onebase@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown: open sessions are cut
        server.wait()
        log.close()
        shutil.rmtree(folder)
