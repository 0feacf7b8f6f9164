"""The real server, HTTP and all, on a port of loopback in a thread of the test's process; the model is `FakeRunner`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from api_world import base_spec, lora_folder
from fakes import FakeRunner, FakeTokenizer
from onebase.home import Home
from onebase.store import AdapterStore
from onebase.tokenizer import TextTokenizer
from onebase_server.api.backend import Backend
from onebase_server.compose import Server, build_deps
from onebase_server.loading import start_backend
from onebase_server.settings import Settings
from scripted_base import IDENTITY, SCRIPTED_BASE


@dataclass
class Live:
    """A serving process and what its model says."""

    settings: Settings
    runner: FakeRunner
    store: AdapterStore
    says: str = "Hello there."
    server: Server = field(init=False)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def backend(self) -> Backend:
        return self.server.deps.backend.get()

    def publish(self, name: str) -> None:
        self.store.publish(lora_folder(self.settings.home.root / "peft"), name, base=IDENTITY)

    def reply(self, digest: str | None) -> list[int]:
        named = {version.digest: version.id for entry in self.store.list() for version in entry.versions}
        prefix = f"{named[digest]} says: " if digest is not None else ""
        return list((prefix + self.says).encode())


@contextmanager
def live_server(
    root: Path, load: Callable[[Settings, FakeRunner], Backend] | None = None, **options: Any
) -> Iterator[Live]:
    """`settings`: overrides; `runner`: a FakeRunner of the test's own; `seen` gets the server and
    `before_wait` is called before the base is loaded; `trainer`: the RunCommand of training jobs."""
    home = Home(root / "home").create()
    settings = Settings(home=home, port=0, **options.get("settings", {}))
    runner = options.get("runner") or FakeRunner(reply=lambda digest, prompt: live.reply(digest))
    live = Live(settings, runner, AdapterStore(home.adapters))
    deps = build_deps(settings, options.get("trainer"), lambda _: SCRIPTED_BASE)
    server = Server(settings, lambda given: (load or load_fake)(given, runner), deps)
    live.server = server
    thread = threading.Thread(target=server.run, name="live-server")
    options.get("seen", []).append(live)
    thread.start()
    options.get("before_wait", lambda: None)()
    try:
        server.loaded.wait()
        yield live
    finally:
        server.stop()
        thread.join()


def load_fake(settings: Settings, runner: FakeRunner) -> Backend:
    spec = base_spec(settings.home.bases / "tiny")
    return start_backend(settings, spec, runner, cast(TextTokenizer, FakeTokenizer()))
