"""The jobs half of a server in the test's process: real table, files, store and supervisor over scripted trainers."""

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_trainer
from migrated import give_tables
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_server.jobs.files import FileService
from onebase_server.jobs.job_limits import JobLimits
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.orders import Base, FineTuningOrder, Once, RetrainOrder
from onebase_server.jobs.process import RunCommand
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.service import JobService
from onebase_server.jobs.supervisor import Supervisor, SupervisorConfig
from onebase_server.jobs.watch import RunTimes
from onebase_server.records.chats import ChatRecords
from onebase_server.records.database import Database
from onebase_server.records.files import FileRecords
from onebase_server.records.jobs import JobRecords
from onebase_server.records.tables import EventRow, FileRow, JobRow
from scripted_base import SCRIPTED_BASE

TINY = Base("tiny/base", "tiny")
FAST = RunTimes(poll_s=0.01, cancel_grace_s=0.3, report_again_s=0.05, max_losses=3)
LINE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}


@dataclass
class JobsWorld:
    home: Home
    database: Database
    ledger: Ledger
    files: FileService
    chats: ChatRecords
    jobs: JobService
    store: AdapterStore
    supervisor: Supervisor
    plan: Path
    supervisor_over: Callable[[Callable[[], Awaitable[None]]], Supervisor]
    """Another supervisor of this home, with work of its own each round."""

    def script(self, **plan: Any) -> None:
        """What trainers that start from now on do. Those that hold wait for `let_go`, or for `let_measure`."""
        for name in ("go", "measure"):
            self.plan.with_name(name).unlink(missing_ok=True)
        beside = self.plan.with_suffix(".new")
        beside.write_text(json.dumps(plan))
        beside.replace(self.plan)  # one that starts just now reads a whole plan

    def let_go(self) -> None:
        self.plan.with_name("go").touch()

    def let_measure(self) -> None:
        self.plan.with_name("measure").touch()

    def folder(self, job: JobRow) -> RunFolder:
        return RunFolder(self.home.runs, job.id)

    def starts(self, job: JobRow) -> list[str]:
        """ "train" or "evaluate", a word for each process of the job."""
        path = self.folder(job).path / "starts"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    async def upload(self, lines: int = 10, owner: str = "ann") -> FileRow:
        upload = self.files.begin()
        upload.write(b"".join(json.dumps(LINE).encode() + b"\n" for _ in range(lines)))
        return await self.files.keep(upload, filename="train.jsonl", purpose="fine-tune", owner=owner)

    async def fine_tune(self, *, lines: int = 10, key: str | None = None, **order: Any) -> JobRow:
        file_id = order.pop("training_file", None) or (await self.upload(lines)).id
        given = {"owner": "ann", "base": TINY, "model": "tiny/base", "training_file": file_id, "seed": 1, **order}
        once = None if key is None else Once.of(key, "test", {"file": file_id, **order})
        return await self.jobs.fine_tune(FineTuningOrder(**given), "ann", once)

    async def retrain(self, **order: Any) -> JobRow:
        return await self.jobs.retrain(RetrainOrder(**{"owner": "ann", "base": TINY, "adapter": "bot", **order}), None)

    async def until(self, job: JobRow, holds: Callable[[JobRow], bool]) -> JobRow:
        while not holds(job):
            await self.ledger.news.wait(0.05)
            job = await self.ledger.get(job.id)
        return job

    async def ended(self, job: JobRow) -> JobRow:
        return await self.until(job, lambda row: row.state in ("succeeded", "failed", "cancelled") and not row.run_open)

    async def told(self, job: JobRow) -> list[EventRow]:
        """Events, oldest first."""
        return list(await self.ledger.records.events_since(job.id, 0))


@asynccontextmanager
async def jobs_world(root: Path, *, start: bool = True, **options: Any) -> AsyncIterator[JobsWorld]:
    """`times`: RunTimes; `running`, `waiting`, `waiting_of_owner`: limits; `database`: a URL. On a `root` used before:
    a restart."""
    home = Home(root).create()
    path = root / "onebase.db"
    if "database" not in options:
        give_tables(path)
    database = Database.at(options["database"]) if "database" in options else Database.file(path)
    await database.migrate()
    ledger = Ledger(JobRecords(database))
    files = FileService(home.files, FileRecords(database))
    chats = ChatRecords(database)
    store = AdapterStore(home.adapters)
    plan = root / "plan.json"
    if not plan.exists():
        plan.write_text("{}")
    command = RunCommand(program=(sys.executable, str(Path(fake_trainer.__file__)), str(plan)))
    config = SupervisorConfig(max_running=options.get("running", 1), look_s=0.05, times=options.get("times", FAST))

    def supervisor_over(each_round: Callable[[], Awaitable[None]] | None) -> Supervisor:
        return Supervisor(home, ledger, files, store, command, config, lambda _: SCRIPTED_BASE, each_round)

    supervisor = supervisor_over(None)
    limits = JobLimits(options.get("waiting", 16), options.get("waiting_of_owner"))
    jobs = JobService(home, ledger, files, chats, limits)
    if start:
        await supervisor.start()
    try:
        yield JobsWorld(home, database, ledger, files, chats, jobs, store, supervisor, plan, supervisor_over)
    finally:
        if start:
            await supervisor.stop()
        await database.close()
