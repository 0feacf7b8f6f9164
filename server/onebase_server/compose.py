"""The composition root: settings -> app, with the base loaded behind it -> HTTP server. Everything meets here only."""

import logging
import os
import sys
import threading
from collections.abc import Callable

from litestar import Litestar

from onebase.errors import BaseModelError, OnebaseError
from onebase.store import AdapterStore
from onebase_server.api.backend import Backend, BackendSlot
from onebase_server.api.deps import AppDeps
from onebase_server.api.metrics import Metrics
from onebase_server.api.tracing import otlp_tracer
from onebase_server.app import create_app
from onebase_server.http_server import HttpServer, Lifecycle
from onebase_server.jobs.assembly import DurableConfig, assemble
from onebase_server.jobs.checkpoints import FindBase
from onebase_server.jobs.job_limits import JobLimits
from onebase_server.jobs.process import RunCommand
from onebase_server.jobs.supervisor import SupervisorConfig
from onebase_server.loading import load_backend
from onebase_server.logs import configure_logging
from onebase_server.memory import keep_giving_back, keep_what_stands, share_heaps
from onebase_server.settings import Settings
from onebase_server.startup import (
    allow_many_files,
    check_base_there,
    check_exposed,
    check_port_free,
    is_out_of_memory,
    open_records,
    prepare_home,
)

logger = logging.getLogger(__name__)

SWITCH_S = 0.001
"""The engine's thread asks for the interpreter several times a step; while a burst of requests is parsed it would wait
5 ms each time, Python's default."""

LoadBackend = Callable[[Settings], Backend]


def build_deps(settings: Settings, command: RunCommand | None = None, find_base: FindBase | None = None) -> AppDeps:
    """Everything but the base. `command` and `find_base`: another trainer than ours, for tests."""
    store = AdapterStore(settings.home.adapters)
    config = DurableConfig(
        database=settings.database,
        max_file=settings.max_file_mb * 1_000_000,
        limits=JobLimits(settings.retrain_queue, settings.key_jobs),
        supervisor=SupervisorConfig(max_running=settings.training_jobs),
    )
    command = command or RunCommand(env=_trainer_env(settings), nice=settings.retrain_nice)
    return AppDeps(
        settings=settings,
        store=store,
        backend=BackendSlot(),
        durable=assemble(settings.home, store, command, config, find_base),
        metrics=Metrics(settings.metrics_versions),
        tracer=otlp_tracer(settings.otlp_endpoint) if settings.otlp_endpoint else None,
    )


def _trainer_env(settings: Settings) -> dict[str, str] | None:
    """None, for embedders who build their settings by hand: the process' own."""
    env = dict(settings.trainer_env)
    return {**env, "ONEBASE_TRAIN_POLICY": settings.train_policy} if env else None


def build_app(settings: Settings) -> Litestar:
    """The app without a base: for openapi.yaml, and for embedders that fill the slot themselves."""
    return create_app(build_deps(settings))


def serve(settings: Settings, load: LoadBackend = load_backend) -> int:
    """Serve until a signal. The exit code: 0 after a clean end, 1 if the base could not be loaded."""
    configure_logging(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_S)
    share_heaps()
    allow_many_files()
    prepare_home(settings.home)
    has_keys = settings.has_keys | open_records(settings)
    check_exposed(settings, has_keys)
    if not has_keys:
        logger.warning("no API keys are made or set: whoever reaches %s may do everything", settings.host)
    check_base_there(settings)
    check_port_free(settings.host, settings.port)
    server = Server(settings, load)
    server.run()
    if not server.loaded.is_set():
        # The thread that loads the base is inside torch: to end the interpreter beneath it would abort the process.
        logging.shutdown()
        os._exit(0)
    return 1 if server.failed else 0


class Server:
    """One serving process: the HTTP server, the thread that loads the base."""

    def __init__(self, settings: Settings, load: LoadBackend, deps: AppDeps | None = None) -> None:
        self._settings = settings
        self._load = load
        self.deps = deps or build_deps(settings)
        self.url = ""
        """Known once the port is open."""
        self.loaded = threading.Event()
        """The base is loaded, or has failed to."""
        self.ended = threading.Event()
        """The engine has been stopped."""
        self.failed = False
        lifecycle = Lifecycle(self._on_bound, self._drain, self._is_dead, self._end_backend)
        self.http = HttpServer(create_app(self.deps), settings, lifecycle)

    def run(self) -> None:
        """Until a signal, or until the base turns out not to load. The event loop runs in the calling thread."""
        self.http.run()
        logger.info("bye")

    def stop(self) -> None:
        """End as a SIGTERM ends it; from any thread, any number of times."""
        self.http.begin_exit()

    def _on_bound(self, url: str) -> None:
        self.url = url
        logger.info("listening at %s; loading the base", url)
        threading.Thread(target=self._load_base, name="onebase-load", daemon=True).start()

    def _drain(self) -> None:
        self.deps.backend.drain()
        self.deps.jobs.stop_following()

    def _is_dead(self) -> bool:
        backend = self.deps.backend.loaded
        if backend is not None and not backend.engine.is_healthy and not self.failed:
            self.failed = True
            logger.critical("the engine has died (%s): ending, to be started anew", backend.engine.error)
        return self.failed

    def _load_base(self) -> None:
        try:
            backend = self._load(self._settings)
        except Exception as error:
            self.failed = True
            known = isinstance(error, OnebaseError)
            logger.critical("the base can't be loaded: %s", error, exc_info=None if known else error)
            if is_out_of_memory(error):
                logger.critical("memory ran out: a smaller base, a smaller ONEBASE_KV_TOKENS, or more memory")
            self.deps.backend.fail(BaseModelError("The base model could not be loaded; the server's log says why."))
            self.http.should_exit = True
            self.loaded.set()
            return
        keep_what_stands()
        keep_giving_back(self.ended)
        self.deps.backend.fill(backend)
        self.loaded.set()
        logger.info("ready: %s at %s/v1 (prompt format %s)", backend.base.id, self.url, backend.base_format)

    def _end_backend(self) -> None:
        backend = self.deps.backend.loaded
        if backend is not None:
            backend.engine.stop()
        if self.deps.tracer is not None:
            self.deps.tracer.close()
        self.ended.set()
