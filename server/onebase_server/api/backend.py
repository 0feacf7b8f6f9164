"""What handlers need below them, and the slot that holds it: the server binds first and loads the base afterwards."""

import hashlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from onebase.bases import BaseSpec
from onebase.errors import NotReady, OnebaseError
from onebase.prompt import PromptFormat, PromptRenderer
from onebase.tokenizer import TextTokenizer
from onebase_server.engine.engine import Engine
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import TokenEvent


class Handle(Protocol):
    """A running request as handlers see it (the engine's RequestHandle is one). Every choice ends in exactly one
    event with a finish reason."""

    def events(self) -> AsyncIterator[TokenEvent]: ...

    async def complete(self) -> list[Completion]:
        """All choices in whole, by index. Raises the error of one that failed."""
        ...

    def cancel(self) -> None:
        """Frees everything within a step. May be called at any time, any number of times."""
        ...


class GetRenderer(Protocol):
    def __call__(self, prompt_format: PromptFormat) -> PromptRenderer: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """A loaded base and the engine that runs it."""

    engine: Engine
    tokenizer: TextTokenizer
    base: BaseSpec
    base_format: PromptFormat
    """The prompt format of the bare base; a version's manifest names its own."""
    renderer: GetRenderer
    max_context: int
    created: int
    """Unix seconds, for the base's model card: the same at every start."""

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes when the base, its quantisation or its tokenizer do."""
        identity = self.base.identity
        parts = (identity.id, identity.revision or "", identity.config_hash, identity.quantization)
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


class BackendSlot:
    """Empty until the base is loaded. Thread-safe: the loader sets it, handlers read it."""

    def __init__(self, backend: Backend | None = None) -> None:
        self._lock = threading.Lock()
        self._backend = backend
        self._error: OnebaseError | None = None
        self._draining = False

    def fill(self, backend: Backend) -> None:
        with self._lock:
            self._backend = backend

    def fail(self, error: OnebaseError) -> None:
        """The base could not be loaded: every request gets this until the process is restarted."""
        with self._lock:
            self._error = error

    def drain(self) -> None:
        """Take no new generation; running ones go on."""
        with self._lock:
            self._draining = True

    def get(self) -> Backend:
        """Raises NotReady while there is nothing to serve with, or the reason why there never will be."""
        with self._lock:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._draining:
                raise NotReady("The server is shutting down.", retry_after_s=5)
            if self._backend is None:
                raise NotReady("The base model is still being loaded.", retry_after_s=2)
            if not self._backend.engine.is_healthy:
                raise NotReady("The engine has stopped: the server must be restarted.", retry_after_s=10)
            return self._backend

    @property
    def loaded(self) -> Backend | None:
        """Whatever the state: for shutting down."""
        with self._lock:
            return self._backend

    @property
    def ready(self) -> bool:
        try:
            self.get()
        except OnebaseError:
            return False
        return True
