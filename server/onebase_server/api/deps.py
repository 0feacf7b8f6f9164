"""What the app is made of: one frozen object, handed to every handler. Nothing in `api/` is global."""

from dataclasses import dataclass, field

from litestar.di import NamedDependency

from onebase.store import AdapterStore
from onebase_server.api.audit import AuditLog
from onebase_server.api.backend import BackendSlot
from onebase_server.api.limits import Limiter
from onebase_server.api.metrics import Metrics
from onebase_server.api.tracing import Tracer
from onebase_server.api.upload_rooms import UploadRooms
from onebase_server.jobs.assembly import Durable
from onebase_server.jobs.files import FileService
from onebase_server.jobs.service import JobService
from onebase_server.records.chats import ChatRecords
from onebase_server.records.keys import KeyRecords
from onebase_server.settings import Settings


@dataclass(frozen=True, slots=True)
class AppDeps:
    settings: Settings
    store: AdapterStore
    backend: BackendSlot
    durable: Durable
    metrics: Metrics
    limiter: Limiter = field(default_factory=Limiter)
    uploads: UploadRooms = field(default_factory=UploadRooms)
    tracer: Tracer | None = None

    @property
    def audit(self) -> AuditLog:
        return AuditLog(self.settings.home.root / "audit")

    @property
    def keys(self) -> KeyRecords:
        return self.durable.keys

    @property
    def files(self) -> FileService:
        return self.durable.files

    @property
    def jobs(self) -> JobService:
        return self.durable.jobs

    @property
    def chats(self) -> ChatRecords:
        return self.durable.chats


Deps = NamedDependency[AppDeps]
