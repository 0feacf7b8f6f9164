"""Who may call what: one guard, run before the body is read. A key's hash is compared, in constant time.

Without any key the server listens on loopback only (settings see to it) and everyone there may do everything.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable
from typing import Any, Literal

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from onebase.errors import Forbidden, Unauthenticated

Scope = Literal["inference", "admin"]
Connection = ASGIConnection[Any, Any, Any, Any]
Guard = Callable[[Connection, BaseRouteHandler], None]

NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


class KeyRing:
    """The keys from the settings, hashed. An admin key may do all that an API key may."""

    def __init__(self, api_keys: Iterable[str] = (), admin_key: str | None = None) -> None:
        self._api = [_digest(key) for key in api_keys]
        self._admin = _digest(admin_key) if admin_key else None

    def check(self, header: str | None, client_host: str | None, scope: Scope) -> None:
        """Raises Unauthenticated (no or unknown key) or Forbidden (known, but may not)."""
        if scope == "admin" and self._admin is None:
            self._check_loopback(client_host)
            return
        if not self._api and self._admin is None:
            return
        key = _bearer(header)
        if key is None:
            raise Unauthenticated(NO_KEY)
        digest = _digest(key)
        if self._admin is not None and hmac.compare_digest(digest, self._admin):
            return
        # every key is compared, so that the time taken says nothing about which one fits
        known = [hmac.compare_digest(digest, each) for each in self._api]
        if not any(known):
            raise Unauthenticated(f"Incorrect API key provided: {_masked(key)}.")
        if scope == "admin":
            raise Forbidden("This key may not do this: an admin key is needed.")

    @staticmethod
    def _check_loopback(client_host: str | None) -> None:
        if not is_loopback(client_host):
            raise Forbidden(
                "Without an admin key (ONEBASE_ADMIN_KEY) this may be called from the server's machine only."
            )


def require(keys: KeyRing) -> Guard:
    """The guard for a router. A handler asks for more by `opt={"scope": "admin"}`."""

    def guard(connection: Connection, handler: BaseRouteHandler) -> None:
        client = connection.client
        scope: Scope = "admin" if handler.opt.get("scope") == "admin" else "inference"
        keys.check(connection.headers.get("authorization"), client.host if client else None, scope)

    return guard


def is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bearer(header: str | None) -> str | None:
    kind, _, key = (header or "").partition(" ")
    return key.strip() or None if kind.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _masked(key: str) -> str:
    return f"{key[:3]}***{key[-4:]}" if len(key) >= 16 else "***"
