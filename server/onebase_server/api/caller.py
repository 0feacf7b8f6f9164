"""Who is calling, and what that opens. Made once a request by the guard (auth.py); handlers read it by `caller_of`.

Rows belong to an owner. A key from the environment is an owner of its own, named by a piece of its hash; a key from the
table names its owner, so that two keys can share one (a new key takes an old one's place, and loses nothing).
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from litestar.connection import ASGIConnection

from onebase_server.records.tables import LOCAL_OWNER

Scope = Literal["inference", "training", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
STATE_KEY = "onebase_caller"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None: no limit. Requests and tokens a minute, sequences at a time."""

    rpm: int | None = None
    tpm: int | None = None
    parallel: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """`owner` is written on what the caller makes; `sees` limits what it may read, None being everything."""

    owner: str
    sees: str | None
    id: str = LOCAL_OWNER
    """For logs, limits and the audit log: says which key, opens nothing."""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    models: frozenset[str] | None = None
    """Names that it may call, besides the adapters that it trained. None: all that nobody else trained."""
    limits: KeyLimits = field(default_factory=KeyLimits)

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    def may(self, scope: str) -> bool:
        return scope in self.scopes or self.is_admin


LOCAL = Caller(LOCAL_OWNER, None)
"""Everyone, on a server without keys."""


def caller_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    """The caller that the guard let in."""
    caller = connection.scope["state"][STATE_KEY]
    assert isinstance(caller, Caller)
    return caller
