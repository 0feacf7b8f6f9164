"""Who may call what: one guard, run before the body is read. It finds the caller, its scope, and its request limit.

Without any key the server listens on loopback only (settings see to it) and everyone there may do everything; web pages
may not: a browser on the same machine must not be talked into calling for them.
"""

import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from onebase.errors import Forbidden
from onebase_server.api.caller import LOCAL, STATE_KEY, Caller
from onebase_server.api.keys import KeyRing, bearer, digest_of
from onebase_server.api.limits import Limiter
from onebase_server.api.metrics import STARTED_KEY
from onebase_server.api.request_id import client_request_id
from onebase_server.settings import LOOPBACK, Settings

Connection = ASGIConnection[Any, Any, Any, Any]
Guard = Callable[[Connection, BaseRouteHandler], Awaitable[None]]
ADMIN = "admin"
FREE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Not counted against the requests a minute: polling a job must not use up a key."""


def require(keys: KeyRing, limiter: Limiter, settings: Settings) -> Guard:
    """The guard for a router. Every handler needs `opt={"scope": ...}`, its own or its router's; else none gets in."""

    async def guard(connection: Connection, handler: BaseRouteHandler) -> None:
        connection.scope["state"][STARTED_KEY] = time.perf_counter()
        client_request_id(connection.headers)  # refused before anything is done
        caller = await keys.identify(connection.headers.get("authorization"))
        connection.scope["state"][STATE_KEY] = caller  # before it may be refused: the audit log tells who was
        scope = str(handler.opt.get("scope", ADMIN))
        if caller is LOCAL:
            check_local(connection, scope, settings)
        elif not caller.may(scope):
            raise Forbidden(refusal(caller, scope))
        if connection.scope.get("method") not in FREE_METHODS:
            limiter.take_request(caller)

    return guard


def require_for_metrics(admin: Guard, settings: Settings) -> Guard:
    """The guard of /metrics, which tells names of adapters and how much they are used: the metrics key or `admin`'s.

    A server that listens on loopback and has no metrics key shows them to its own machine, under its address.
    """
    known = None if settings.metrics_key is None else digest_of(settings.metrics_key)

    async def guard(connection: Connection, handler: BaseRouteHandler) -> None:
        given = bearer(connection.headers.get("authorization"))
        if known is None:
            is_open = settings.host in LOOPBACK and names_address(connection)
        else:
            is_open = given is not None and hmac.compare_digest(known, digest_of(given))
        if not is_open:
            await admin(connection, handler)

    return guard


def refusal(caller: Caller, scope: str) -> str:
    has = ", ".join(sorted(caller.scopes)) or "nothing"
    return f"This key may not do this: it needs the scope '{scope}' and has {has}."


def check_local(connection: Connection, scope: str, settings: Settings) -> None:
    """On a server without keys: /admin from this machine only, and nothing for other sites' pages in a browser."""
    if scope == ADMIN:
        check_admin_place(connection)
    origin = connection.headers.get("origin")
    if origin is not None and not {"*", origin} & set(settings.cors_origins) and not same_site(origin, connection):
        raise Forbidden(f"Pages of {origin[:100]} may not call this server: see ONEBASE_CORS_ORIGINS.")
    if not settings.allow_no_keys and not names_address(connection):
        host = connection.headers.get("host", "")
        raise Forbidden(f"Without keys this server answers to its address and to localhost, not to '{host[:100]}'.")


def check_admin_place(connection: Connection) -> None:
    """Raises Forbidden unless the caller, who needs no key, is on this machine."""
    client = connection.client
    if not is_loopback(client.host if client else None):
        raise Forbidden(
            "Without an admin key (ONEBASE_ADMIN_KEY, or `onebase keys create --scope admin`) this may be called from "
            "the server's machine only."
        )


def names_address(connection: Connection) -> bool:
    """A site that points its own name at 127.0.0.1 (DNS rebinding) is the same origin as itself; so is a proxy's."""
    host = host_of("//" + connection.headers.get("host", ""))
    return host is None or is_address(host)


def same_site(origin: str, connection: Connection) -> bool:
    return urlsplit(origin).netloc == connection.headers.get("host") if origin != "null" else False


def host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return ""


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
