"""`serve()` as a process of its own, over a base that a test scripts: `python serving_process.py HOW`.

stuck: the base never comes. no disk: nothing is left on it. no memory: torch asks for more than there is. Any else:
`FakeRunner`. Settings are the environment's, as for `python -m onebase_server`.
"""

import os
import shutil
import sys
import time

from fakes import FakeRunner
from live_server import load_fake
from onebase.errors import OnebaseError
from onebase_server.api.backend import Backend
from onebase_server.compose import serve
from onebase_server.settings import Settings, load_settings


def load(settings: Settings) -> Backend:
    if "stuck" in sys.argv:
        while True:
            time.sleep(60)
    if "no memory" in sys.argv:
        import torch

        torch.empty(1 << 60, dtype=torch.uint8)
    return load_fake(settings, FakeRunner(reply=lambda digest, prompt: [ord("x")] * 5))


if __name__ == "__main__":
    if "no disk" in sys.argv:
        full = shutil.disk_usage(".")._replace(free=1_000_000)
        shutil.disk_usage = lambda _: full  # type: ignore[assignment,misc]
    try:
        sys.exit(serve(load_settings(os.environ), load))
    except OnebaseError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(1)
