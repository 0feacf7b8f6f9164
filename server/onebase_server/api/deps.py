"""What the app is made of: one frozen object, handed to every handler. Nothing in `api/` is global."""

from dataclasses import dataclass

from litestar.di import NamedDependency

from onebase.store import AdapterStore
from onebase_server.api.backend import BackendSlot
from onebase_server.api.metrics import HttpMetrics
from onebase_server.jobs.supervisor import Supervisor
from onebase_server.settings import Settings


@dataclass(frozen=True, slots=True)
class AppDeps:
    settings: Settings
    store: AdapterStore
    backend: BackendSlot
    jobs: Supervisor
    metrics: HttpMetrics


Deps = NamedDependency[AppDeps]
