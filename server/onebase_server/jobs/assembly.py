"""The parts that keep files, jobs and chats, put together once for a server: nothing is opened before `start`."""

from dataclasses import dataclass, field
from pathlib import Path

from onebase.home import Home
from onebase.store import AdapterStore
from onebase_server.jobs.checkpoints import FindBase
from onebase_server.jobs.files import FileService
from onebase_server.jobs.job_limits import JobLimits
from onebase_server.jobs.ledger import Ledger
from onebase_server.jobs.process import RunCommand
from onebase_server.jobs.schedules import Scheduler
from onebase_server.jobs.service import JobService
from onebase_server.jobs.supervisor import Supervisor, SupervisorConfig
from onebase_server.records.chats import ChatRecords
from onebase_server.records.database import Database
from onebase_server.records.files import FileRecords
from onebase_server.records.homes import claim
from onebase_server.records.jobs import JobRecords
from onebase_server.records.keys import KeyRecords
from onebase_server.records.schedules import ScheduleRecords


@dataclass(frozen=True, slots=True)
class DurableConfig:
    """`database`: a URL, or None for SQLite in the home folder. `max_file`: bytes."""

    database: str | None = None
    max_file: int = 512 << 20
    limits: JobLimits = field(default_factory=JobLimits)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)


@dataclass(frozen=True, slots=True)
class Durable:
    """What outlives a request. Lives on one event loop: `start` and `stop` are its beginning and end."""

    database: Database
    ledger: Ledger
    files: FileService
    chats: ChatRecords
    keys: KeyRecords
    jobs: JobService
    scheduler: Scheduler
    supervisor: Supervisor
    shared_root: Path | None
    """The home folder, if the database lies elsewhere: then it could be another home's."""

    async def start(self) -> None:
        """Migrate the tables and begin to supervise. Raises InvalidInput for another home folder's database."""
        await self.database.migrate()
        if self.shared_root is not None:
            await claim(self.database, self.shared_root)
        await self.supervisor.start()

    async def stop(self) -> None:
        """Running processes go on: the next server takes them up."""
        self.jobs.stop_following()
        await self.supervisor.stop()
        await self.keys.close()
        await self.database.close()


def assemble(
    home: Home,
    store: AdapterStore,
    command: RunCommand,
    config: DurableConfig,
    find_base: FindBase | None = None,
) -> Durable:
    """Raises InvalidInput for a database URL that can't be used."""
    database = Database.at(config.database) if config.database else Database.file(home.root / "onebase.db")
    ledger = Ledger(JobRecords(database))
    files = FileService(home.files, FileRecords(database), limit=config.max_file)
    chats = ChatRecords(database)
    jobs = JobService(home, ledger, files, chats, config.limits)
    scheduler = Scheduler(ScheduleRecords(database), ledger, jobs)
    return Durable(
        database=database,
        ledger=ledger,
        files=files,
        chats=chats,
        keys=KeyRecords(database),
        jobs=jobs,
        scheduler=scheduler,
        supervisor=Supervisor(home, ledger, files, store, command, config.supervisor, find_base, scheduler.tick),
        shared_root=home.root if config.database else None,
    )
