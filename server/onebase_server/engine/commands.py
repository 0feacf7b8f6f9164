"""What other threads ask of the engine thread. One queue carries all of it, so its order is total."""

from concurrent.futures import Future
from dataclasses import dataclass

from onebase_server.engine.grammar import GrammarMatcher
from onebase_server.engine.handle import RequestHandle
from onebase_server.engine.residence import AdapterStatus, Residence
from onebase_server.engine.runner import HostAdapter
from onebase_server.engine.sequence import RequestGroup
from onebase_server.engine.types import AdapterRef


@dataclass(frozen=True, slots=True)
class Submit:
    group: RequestGroup


@dataclass(frozen=True, slots=True)
class Cancel:
    handle: RequestHandle


@dataclass(frozen=True, slots=True)
class Preload:
    done: "Future[None]"
    ref: AdapterRef
    pin: bool


@dataclass(frozen=True, slots=True)
class Unload:
    done: "Future[None]"
    ref: AdapterRef
    forget: bool


@dataclass(frozen=True, slots=True)
class Unpin:
    done: "Future[None]"
    ref: AdapterRef


@dataclass(frozen=True, slots=True)
class ListAdapters:
    done: "Future[list[AdapterStatus]]"


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """A loader thread has finished reading."""

    residence: Residence
    host: HostAdapter | None
    error: Exception | None
    seconds: float


@dataclass(frozen=True, slots=True)
class GrammarCompiled:
    group: RequestGroup
    matcher: GrammarMatcher | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Stop:
    """End when all requests have ended, or at `deadline` (the engine's clock)."""

    deadline: float


Order = Preload | Unload | Unpin | ListAdapters
"""Commands that somebody waits for."""

Command = Submit | Cancel | AdapterLoaded | GrammarCompiled | Stop | Order
