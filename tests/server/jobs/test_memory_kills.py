"""Memory that runs out beside a run: the kernel is offered the run and not the server, and no work is lost by it."""

import os
import signal
import sys
from pathlib import Path

import pytest

from jobs_world import JobsWorld
from onebase_server.jobs.process import OOM_SCORE, holders

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel kills for memory by a score"),
]


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_the_kernel_takes_a_run_before_its_server_and_the_run_goes_on_afterwards(world: JobsWorld) -> None:
    world.script(steps=6, every=1, ends=["hang", "succeed"])
    job = await world.fine_tune()
    job = await world.until(job, lambda row: row.state == "running" and row.step >= 3)
    [trainer] = holders(world.folder(job))
    assert score(trainer.pid) == OOM_SCORE > score(os.getpid())
    trainer.send_signal(signal.SIGKILL)  # as the kernel does it
    job = await world.ended(job)
    assert (job.state, world.starts(job)) == ("succeeded", ["train", "train"])
    warnings = [event.message for event in await world.told(job) if event.level == "warn"]
    assert warnings == ["The training process was killed by signal 9 (out of memory?); the job goes back to the queue"]
    steps = [event.data["step"] for event in await world.told(job) if event.type == "metrics" and event.data]
    assert steps == [1, 2, 3, 4, 5, 6], "from its checkpoint"
