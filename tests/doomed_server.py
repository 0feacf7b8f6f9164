"""A whole server over the scripted model as a process of its own, for a test to kill: prints its URL when ready.

`python doomed_server.py HOME`. Publishes nothing, learns nothing; answers "x" for as long as it is asked to, slowly
while the file `slowly` lies in its home.
"""

import sys
import threading
import time
from pathlib import Path

import fake_trainer
from fakes import FakeRunner
from live_server import load_fake
from onebase.home import Home
from onebase_server.compose import Server, build_deps
from onebase_server.engine.runner import StepBatch, StepResult
from onebase_server.jobs.process import RunCommand
from onebase_server.memory import share_heaps
from onebase_server.settings import Settings
from onebase_server.startup import open_records, prepare_home
from scripted_base import SCRIPTED_BASE


class SlowRunner(FakeRunner):
    """A step takes 5 ms, or 0.25 s: then an answer lasts for as long as a test may take to look at it."""

    def __init__(self, slowly: Path) -> None:
        super().__init__(reply=lambda digest, prompt: [ord("x")] * 400)
        self._slowly = slowly

    def run(self, batch: StepBatch) -> StepResult:
        time.sleep(0.25 if self._slowly.exists() else 0.005)
        return super().run(batch)


def main(root: str) -> None:
    share_heaps()
    settings = Settings(home=Home(Path(root)), port=0, admin_key="sk-admin-key-1", drain_s=600.0)
    prepare_home(settings.home)
    open_records(settings)
    runner = SlowRunner(settings.home.root / "slowly")
    plan = settings.home.root / "plan.json"
    plan.write_text("{}")
    trainer = RunCommand(program=(sys.executable, str(Path(fake_trainer.__file__)), str(plan)))
    deps = build_deps(settings, trainer, lambda _: SCRIPTED_BASE)
    server = Server(settings, lambda given: load_fake(given, runner), deps)

    def tell() -> None:
        server.loaded.wait()
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()

    threading.Thread(target=tell, daemon=True).start()
    server.run()


if __name__ == "__main__":
    main(sys.argv[1])
