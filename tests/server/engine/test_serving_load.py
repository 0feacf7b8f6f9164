"""What the engine tells training processes: busy from before its first step to after its last, and then nothing."""

import asyncio
import time
from pathlib import Path

from fakes import FakeRunner, FakeTokenizer
from onebase.serving_note import Load, SeenServer, ServerNote, living_servers
from onebase_server.engine.engine import Engine
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.runner import StepBatch, StepResult
from onebase_server.engine.types import GenerationRequest, SamplingParams


class WatchingRunner(FakeRunner):
    """Looks at its own server's note in the middle of every step, as another process would."""

    def __init__(self, seen: SeenServer) -> None:
        super().__init__()
        self.looks: list[Load] = []
        self._seen = seen

    def run(self, batch: StepBatch) -> StepResult:
        self.looks.append(self._seen.load())
        return super().run(batch)


def test_the_load_is_told_around_every_step_and_ends_with_the_engine(tmp_path: Path) -> None:
    note = ServerNote.open(tmp_path)
    (seen,) = living_servers(tmp_path).values()
    runner = WatchingRunner(seen)
    engine = Engine(runner, FakeTokenizer(), note=note)
    engine.start()
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    for round_ in range(3):
        asked = [engine.submit(GenerationRequest(str(i), (1, 2, 3 + i), sampling, None)) for i in range(3)]
        asyncio.run(all_of(asked))
        while seen.load().is_busy:  # answers go out a moment before the step is over
            time.sleep(0.001)
        assert seen.load().steps == engine.stats().num_steps > round_
    assert all(look.is_busy for look in runner.looks)
    steps = [look.steps for look in runner.looks]
    assert steps == sorted(set(steps)), "a step that is not counted looks like a stuck server"
    engine.stop()
    assert living_servers(tmp_path, {seen.path: seen}) == {}
    assert list(tmp_path.iterdir()) == []


async def all_of(handles: list[RequestHandle]) -> None:
    await asyncio.gather(*(handle.complete() for handle in handles))
